// bfloat16 in software, as CUDA's header names it.
#pragma once

#include <cstdint>
#include <cstring>

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t word = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}

inline __nv_bfloat16 __float2bfloat16(float x) {  // to the nearest, ties to even
  uint32_t word;
  std::memcpy(&word, &x, 4);
  return {uint16_t(x != x ? 0x7fff : (word + 0x7fff + ((word >> 16) & 1)) >> 16)};
}

inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
