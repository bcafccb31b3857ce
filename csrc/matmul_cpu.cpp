// Two matrix products that PyTorch's CPU side has no fast form of: bf16 x bf16 -> float32, and residual^T x hidden.
// Compiled once per instruction set, beside sequence_logp_cpu.cpp.
//
// Letters: N rows, V vocabulary, D width.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>

#include "wide_product.h"

namespace cca_ds {
namespace {

using at::Tensor;

// Columns of the logits made at a time; the weights behind them (1.5 KiB each at D = 768) stay in the second-level cache.
constexpr int64_t kColumns = 256;
constexpr int64_t kRows = 128;
// Columns of the residual transposed at a time.
constexpr int64_t kTransposed = 2048;

bool takes_wide_product(const Tensor& weight_VD) {
  return weight_VD.scalar_type() == at::kBFloat16 && weight_VD.size(1) % 2 == 0 && weight_VD.numel() > 0 &&
         has_wide_product<at::BFloat16>();
}

// The weight as `wide_logits` reads it: float32 where there is no bf16 x bf16 -> float32 product; else [V / 256, D / 2,
// 256, 2], pairs of width side by side.
Tensor pack_weight(const Tensor& weight_VD) {
  if (!takes_wide_product(weight_VD)) return weight_VD.to(at::kFloat);
  const int64_t vocabulary = weight_VD.size(0), pairs = weight_VD.size(1) / 2;
  const int64_t blocks = (vocabulary + kColumns - 1) / kColumns;
  Tensor packed = at::empty({blocks, pairs, kColumns, 2}, weight_VD.options());
  const auto* from = weight_VD.const_data_ptr<at::BFloat16>();
  auto* to = packed.data_ptr<at::BFloat16>();
  at::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      const int64_t columns = std::min(kColumns, vocabulary - block * kColumns);
      const int64_t offset = block * kColumns * pairs * 2;
      turn_second(from + offset, 2 * pairs, to + offset, kColumns, columns);
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
  const int64_t rows = hidden_ND.size(0), width = hidden_ND.size(1), vocabulary = out_NV.size(1);
  const int64_t stride = out_NV.stride(0);
  const auto* hidden = hidden_ND.const_data_ptr<at::BFloat16>();
  const auto* weight = packed.const_data_ptr<at::BFloat16>();
  float* out = out_NV.data_ptr<float>();
  at::parallel_for(0, packed.size(0), 1, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      const int64_t column = block * kColumns, columns = std::min(kColumns, vocabulary - column);
      for (int64_t row = 0; row < rows; row += kRows) {
        wide_product(std::min(kRows, rows - row), columns, width, hidden + row * width, width,
                     weight + block * width * kColumns, kColumns, out + row * stride + column, stride);
      }
    }
    wide_product_done<at::BFloat16>();
  });
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
