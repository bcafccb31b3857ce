// float16 in software, as CUDA's header names it.
#pragma once

#include <cmath>
#include <cstdint>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  const float sign = x.bits & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 31) return fraction ? NAN : sign * HUGE_VALF;
  return sign * std::ldexp(float(exponent ? fraction + 1024 : fraction), (exponent ? exponent : 1) - 25);
}

inline __half __float2half(float x) {  // to the nearest, ties to even
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  if (x != x) return {uint16_t(0x7fff)};
  const float size = std::fabs(x);
  if (size >= 65520.0f) return {uint16_t(sign | 0x7c00)};
  int exponent = size < 6.103515625e-05f ? -14 : std::ilogb(size);  // below: subnormal
  const float scaled = std::nearbyint(std::ldexp(size, 10 - exponent));  // 1024 to 2048, less for subnormals
  const int fraction = static_cast<int>(scaled);
  if (fraction >= 2048) return {uint16_t(sign | (exponent + 16) << 10)};
  return {uint16_t(sign | (fraction >= 1024 ? (exponent + 15) << 10 | (fraction - 1024) : fraction))};
}

inline uint16_t __half_as_ushort(__half x) { return x.bits; }
