// Matmuls of small blocks (oneDNN's brgemm) with a float32 result, of bf16 (AMX, or AVX-512 with bf16) or of float32, where
// the processor has them.
#pragma once

#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <vector>

namespace cca_ds {

inline int64_t rounded_up(int64_t count, int64_t multiple) {
  return (count + multiple - 1) / multiple * multiple;
}

// Whether a second factor's rows lie as pairs: two rows' numbers of a column side by side, [depth / 2, columns, 2].
template <class T>
constexpr bool kPaired = sizeof(T) == 2;

// out [rows, columns] float32 = (or, with `add`, +=) a [rows, depth] times b, which is [depth, columns], or of pairs in
// bf16. Callers end a parallel region with `block_matmul_done`.
template <class T>
inline void block_matmul(int64_t rows, int64_t columns, int64_t depth, const T* a, int64_t a_stride, const T* b,
                         int64_t b_stride, float* out, int64_t out_stride, bool add = false) {
#if defined(CPUBLAS_BRGEMM_F32F32F32)
  at::native::cpublas::brgemm(rows, columns, depth, a_stride, b_stride, out_stride, add, a, b, out, kPaired<T>);
#elif defined(CPUBLAS_BRGEMM_BF16BF16F32)
  if constexpr (kPaired<T>) at::native::cpublas::brgemm(rows, columns, depth, a_stride, b_stride, out_stride, add, a, b, out);
#endif
}

template <class T>
inline void block_matmul_done() {
#if defined(CPUBLAS_BRGEMM_BF16BF16F32)
  at::native::cpublas::brgemm_release(kPaired<T>);
#endif
}

// Found by trying, once.
template <class T>
inline bool has_block_matmul() {
  static const bool runs = [] {
    std::vector<T> ones(32 * 32, T(1.0f));
    std::vector<float> out(32 * 32, 0.0f);
    try {
      block_matmul<T>(32, 32, 32, ones.data(), 32, ones.data(), 32, out.data(), 32);
      block_matmul_done<T>();
    } catch (const std::exception&) {
      return false;
    }
    return std::all_of(out.begin(), out.end(), [](float x) { return x == 32.0f; });
  }();
  return runs;
}

// to[c, r] = from[r, c], elements of 2 or 4 bytes moved as they are.
template <class T, int64_t kTile>
void transpose(const T* from, int64_t from_stride, T* to, int64_t to_stride, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; r += kTile) {
    for (int64_t c = 0; c < columns; c += kTile) {
      const int64_t height = std::min(kTile, rows - r), width = std::min(kTile, columns - c);
      const T* tile = from + r * from_stride + c;
      T* transposed = to + c * to_stride + r;
#if defined(CPU_CAPABILITY_AVX512)
      at::vec::transpose_mxn<T>(tile, from_stride, transposed, to_stride, static_cast<int>(height), static_cast<int>(width));
#else
      for (int64_t i = 0; i < height; ++i) {
        for (int64_t j = 0; j < width; ++j) transposed[j * to_stride + i] = tile[i * from_stride + j];
      }
#endif
    }
  }
}

// The second factor of `block_matmul` from its transpose [columns, depth], rows of which are `stride` apart: a pair of
// bf16 is moved as one 32-bit number. `depth` and `stride` of bf16 are even.
template <class T>
inline void transpose_second(const T* from, int64_t stride, int64_t depth, T* to, int64_t to_stride, int64_t columns) {
  constexpr int64_t kNumbers = kPaired<T> ? 2 : 1;
  transpose<float, 16>(reinterpret_cast<const float*>(from), stride / kNumbers, reinterpret_cast<float*>(to), to_stride,
                       columns, depth / kNumbers);
}

template <class T>
struct SecondFactor {
  const T* data;
  int64_t stride;
};

// The second factor of `block_matmul` from rows [depth, columns]: themselves, or in bf16 their pairs in `space`, rows of
// which are `space_stride` pairs apart. The partner of an odd last row is 0.
template <class T>
inline SecondFactor<T> second_of(const T* rows, int64_t stride, int64_t depth, int64_t columns, T* space,
                                 int64_t space_stride) {
  if constexpr (!kPaired<T>) {
    return {rows, stride};
  } else {
    for (int64_t d = 0; d < depth; d += 2) {
      const auto* even = reinterpret_cast<const uint16_t*>(rows + d * stride);
      const auto* odd = even + stride;
      auto* pairs = reinterpret_cast<uint32_t*>(space + d * space_stride);
      if (d + 1 < depth) {
        for (int64_t c = 0; c < columns; ++c) pairs[c] = even[c] | static_cast<uint32_t>(odd[c]) << 16;
      } else {
        std::copy(even, even + columns, pairs);
      }
    }
    return {space, space_stride};
  }
}

}  // namespace cca_ds
