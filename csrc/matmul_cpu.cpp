// Two matrix products that PyTorch's CPU side has no fast form of: bf16 x bf16 -> float32, and residual^T x hidden.
// Compiled once per instruction set, beside sequence_logp_cpu.cpp.
//
// Letters: N rows, V vocabulary, D width.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>
#include <torch/library.h>

#include <algorithm>
#include <exception>
#include <vector>

namespace cca_ds {
namespace {

using at::Tensor;

// Columns of the logits made at a time; the weights behind them (1.5 KiB each at D = 768) stay in the second-level cache.
constexpr int64_t kColumns = 256;
constexpr int64_t kRows = 128;
// Columns of the residual transposed at a time.
constexpr int64_t kTransposed = 2048;

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

#if defined(CPUBLAS_BRGEMM_BF16BF16F32)
// Whether the vendor's bf16 x bf16 -> float32 product runs on this processor (AMX, or AVX-512 with bf16): found by trying.
bool runs_wide_product() {
  std::vector<at::BFloat16> ones(32 * 32, at::BFloat16(1.0f));
  std::vector<float> out(32 * 32, 0.0f);
  try {
    at::native::cpublas::brgemm(32, 32, 32, 32, 32, 32, false, ones.data(), ones.data(), out.data(), /*is_vnni=*/true);
    at::native::cpublas::brgemm_release(/*is_vnni=*/true);
  } catch (const std::exception&) {
    return false;
  }
  return std::all_of(out.begin(), out.end(), [](float x) { return x == 32.0f; });
}
#endif

bool has_wide_product(const Tensor& weight_VD) {
#if defined(CPUBLAS_BRGEMM_BF16BF16F32)
  static const bool runs = runs_wide_product();
  return runs && weight_VD.scalar_type() == at::kBFloat16 && weight_VD.size(1) % 2 == 0 && weight_VD.numel() > 0;
#else
  return false;
#endif
}

// The weight as `wide_logits` reads it: float32 where there is no bf16 x bf16 -> float32 product; else [V / 256, D / 2,
// 256, 2], pairs of width side by side, made by transposing the pairs as if each were one 32-bit number.
Tensor pack_weight(const Tensor& weight_VD) {
  if (!has_wide_product(weight_VD)) return weight_VD.to(at::kFloat);
  const int64_t vocabulary = weight_VD.size(0), pairs = weight_VD.size(1) / 2;
  const int64_t blocks = (vocabulary + kColumns - 1) / kColumns;
  Tensor packed = at::empty({blocks, pairs, kColumns, 2}, weight_VD.options());
  const auto* from = reinterpret_cast<const float*>(weight_VD.const_data_ptr<at::BFloat16>());
  auto* to = reinterpret_cast<float*>(packed.data_ptr<at::BFloat16>());
  at::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      const int64_t columns = std::min(kColumns, vocabulary - block * kColumns);
      transpose<float, 16>(from + block * kColumns * pairs, pairs, to + block * pairs * kColumns, kColumns, columns, pairs);
    }
  });
  return packed;
}

// out [N, V] float32 = hidden [N, D] times the packed weight, never rounded to less than float32. Rows of `out` may be
// further apart than V: a stride of a power of two would put all rows of a tile in the same few lines of the caches.
void wide_logits(const Tensor& hidden_ND, const Tensor& packed, Tensor out_NV) {
  if (packed.dim() == 2) {
    at::mm_out(out_NV, hidden_ND.to(at::kFloat), packed.t());
    return;
  }
#if defined(CPUBLAS_BRGEMM_BF16BF16F32)
  const int64_t rows = hidden_ND.size(0), width = hidden_ND.size(1), vocabulary = out_NV.size(1);
  const int64_t stride = out_NV.stride(0);
  const auto* hidden = hidden_ND.const_data_ptr<at::BFloat16>();
  const auto* weight = packed.const_data_ptr<at::BFloat16>();
  float* out = out_NV.data_ptr<float>();
  at::parallel_for(0, packed.size(0), 1, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      const int64_t column = block * kColumns, columns = std::min(kColumns, vocabulary - column);
      for (int64_t row = 0; row < rows; row += kRows) {
        at::native::cpublas::brgemm(std::min(kRows, rows - row), columns, width, width, kColumns, stride, false,
                                    hidden + row * width, weight + block * width * kColumns,
                                    out + row * stride + column, /*is_vnni=*/true);
      }
    }
    at::native::cpublas::brgemm_release(/*is_vnni=*/true);
  });
#endif
}

// residual^T [V, N] x hidden [N, D]. In 16 bits the vendor's product is twice as slow from a transposed residual as
// from one transposed here, a block of columns at a time.
Tensor weight_gradient(const Tensor& residual_NV, const Tensor& hidden_ND) {
  if (residual_NV.scalar_type() != at::kBFloat16) return at::mm(residual_NV.t(), hidden_ND);
  const int64_t rows = residual_NV.size(0), vocabulary = residual_NV.size(1);
  Tensor out_VD = at::empty({vocabulary, hidden_ND.size(1)}, hidden_ND.options());
  Tensor turned = at::empty({std::min(kTransposed, vocabulary), rows}, residual_NV.options());
  const auto* from = residual_NV.const_data_ptr<at::BFloat16>();
  auto* to = turned.data_ptr<at::BFloat16>();
  for (int64_t column = 0; column < vocabulary; column += kTransposed) {
    const int64_t columns = std::min(kTransposed, vocabulary - column), tiles = (columns + 31) / 32;
    at::parallel_for(0, tiles, 1, [&](int64_t first, int64_t last) {
      const int64_t begin = first * 32, end = std::min(last * 32, columns);
      transpose<at::BFloat16, 32>(from + column + begin, vocabulary, to + begin * rows, rows, rows, end - begin);
    });
    Tensor slice = out_VD.narrow(0, column, columns);
    at::mm_out(slice, turned.narrow(0, 0, columns), hidden_ND);
  }
  return out_VD;
}

TORCH_LIBRARY_IMPL(cca_ds, CPU, m) {
  m.impl("pack_weight", pack_weight);
  m.impl("wide_logits", wide_logits);
  m.impl("weight_gradient", weight_gradient);
}

}  // namespace
}  // namespace cca_ds
