// The vendor's bf16 x bf16 -> float32 product of small blocks, where the processor has one (AMX, or AVX-512 with bf16).
#pragma once

#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <vector>

namespace cca_ds {

// out [rows, columns] float32 = (or, with `add`, +=) a [rows, depth] times b, whose pairs of depth lie side by side:
// [depth / 2, columns, 2]. Callers end a parallel region with `wide_product_done`.
inline void wide_product(int64_t rows, int64_t columns, int64_t depth, const at::BFloat16* a, int64_t a_stride,
                         const at::BFloat16* b, int64_t b_stride, float* out, int64_t out_stride, bool add = false) {
#if defined(CPUBLAS_BRGEMM_BF16BF16F32)
  at::native::cpublas::brgemm(rows, columns, depth, a_stride, b_stride, out_stride, add, a, b, out, /*is_vnni=*/true);
#endif
}

inline void wide_product_done() {
#if defined(CPUBLAS_BRGEMM_BF16BF16F32)
  at::native::cpublas::brgemm_release(/*is_vnni=*/true);
#endif
}

// Found by trying, once.
inline bool has_wide_product() {
#if defined(CPUBLAS_BRGEMM_BF16BF16F32)
  static const bool runs = [] {
    std::vector<at::BFloat16> ones(32 * 32, at::BFloat16(1.0f));
    std::vector<float> out(32 * 32, 0.0f);
    try {
      wide_product(32, 32, 32, ones.data(), 32, ones.data(), 32, out.data(), 32);
      wide_product_done();
    } catch (const std::exception&) {
      return false;
    }
    return std::all_of(out.begin(), out.end(), [](float x) { return x == 32.0f; });
  }();
  return runs;
#else
  return false;
#endif
}

// to[c, r] = from[r, c], elements of 2 or 4 bytes moved as they are.
template <class T, int64_t kTile>
void transpose(const T* from, int64_t from_stride, T* to, int64_t to_stride, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; r += kTile) {
    for (int64_t c = 0; c < columns; c += kTile) {
      const int64_t height = std::min(kTile, rows - r), width = std::min(kTile, columns - c);
      const T* tile = from + r * from_stride + c;
      T* turned = to + c * to_stride + r;
#if defined(CPU_CAPABILITY_AVX512)
      at::vec::transpose_mxn<T>(tile, from_stride, turned, to_stride, static_cast<int>(height), static_cast<int>(width));
#else
      for (int64_t i = 0; i < height; ++i) {
        for (int64_t j = 0; j < width; ++j) turned[j * to_stride + i] = tile[i * from_stride + j];
      }
#endif
    }
  }
}

// The second factor of `wide_product` from its transpose [columns, 2 * pairs]: each pair moved as one 32-bit number.
inline void pack_transposed(const at::BFloat16* from, int64_t pairs, at::BFloat16* to, int64_t to_stride, int64_t columns) {
  transpose<float, 16>(reinterpret_cast<const float*>(from), pairs, reinterpret_cast<float*>(to), to_stride, columns, pairs);
}

}  // namespace cca_ds
