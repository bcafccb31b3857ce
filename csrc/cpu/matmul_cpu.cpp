// Matrix products for which PyTorch has no fast CPU code: bf16 x bf16 -> float32, float32 on processors MKL is not tuned for,
// and residual^T x hidden.
// Compiled once per instruction set, beside sequence_logp_cpu.cpp.
//
// Letters: N rows, V vocabulary, D width.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "cpu/heads.h"
#include "cpu/block_matmul.h"

namespace cca_ds {
namespace {

// Columns of the logits made at a time; the weights behind them (1.5 KiB each at D = 768 in bf16, 3 in float32) stay in
// the second-level cache.
template <class T>
constexpr int64_t kLogitColumns = 512 / sizeof(T);
constexpr int64_t kLogitRows = 128;
// Columns of the residual transposed at a time.
constexpr int64_t kTransposed = 2048;

// Whether small-block float32 matmuls beat MKL, which keeps its fastest code for Intel processors.
bool block_matmul_wins() {
#if defined(__x86_64__) && defined(CPU_CAPABILITY_AVX512)
  static const bool win = !__builtin_cpu_is("intel") && has_block_matmul<float>();
  return win;
#else
  return false;
#endif
}

bool takes_block_matmul(const Tensor& weight_VD) {
  if (weight_VD.numel() == 0) return false;
  if (weight_VD.scalar_type() == at::kFloat) return block_matmul_wins();
  return weight_VD.scalar_type() == at::kBFloat16 && weight_VD.size(1) % 2 == 0 && has_block_matmul<at::BFloat16>();
}

// [V / columns, D, columns], the last block not filled; in bf16 pairs of width side by side.
template <class T>
Tensor pack(const Tensor& weight_VD) {
  const int64_t vocabulary = weight_VD.size(0), width = weight_VD.size(1);
  const int64_t blocks = (vocabulary + kLogitColumns<T> - 1) / kLogitColumns<T>;
  Tensor packed = at::empty({blocks, width, kLogitColumns<T>}, weight_VD.options());
  const T* from = weight_VD.const_data_ptr<T>();
  T* to = packed.data_ptr<T>();
  at::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      const int64_t columns = std::min(kLogitColumns<T>, vocabulary - block * kLogitColumns<T>);
      const int64_t offset = block * kLogitColumns<T> * width;
      transpose_second(from + offset, width, width, to + offset, kLogitColumns<T>, columns);
    }
  });
  return packed;
}

// The weight as `fp32_logits` reads it: packed where a small-block matmul takes it, else float32.
Tensor pack_weight(const Tensor& weight_VD) {
  if (!takes_block_matmul(weight_VD)) return weight_VD.to(at::kFloat);
  return weight_VD.scalar_type() == at::kFloat ? pack<float>(weight_VD) : pack<at::BFloat16>(weight_VD);
}

template <class T>
void block_logits(const Tensor& hidden_ND, const Tensor& packed, Tensor& out_NV) {
  const int64_t rows = hidden_ND.size(0), width = hidden_ND.size(1), vocabulary = out_NV.size(1);
  const int64_t stride = out_NV.stride(0);
  const T* hidden = hidden_ND.const_data_ptr<T>();
  const T* weight = packed.const_data_ptr<T>();
  float* out = out_NV.data_ptr<float>();
  at::parallel_for(0, packed.size(0), 1, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      const int64_t column = block * kLogitColumns<T>, columns = std::min(kLogitColumns<T>, vocabulary - column);
      for (int64_t row = 0; row < rows; row += kLogitRows) {
        block_matmul(std::min(kLogitRows, rows - row), columns, width, hidden + row * width, width,
                     weight + block * width * kLogitColumns<T>, kLogitColumns<T>, out + row * stride + column, stride);
      }
    }
    block_matmul_done<T>();
  });
}

// out [N, V] float32 = hidden [N, D] times the packed weight, never rounded to less than float32. Rows of `out` may be
// further apart than V: a stride of a power of two would put all rows of a tile in the same few lines of the caches.
void fp32_logits(const Tensor& hidden_ND, const Tensor& packed, Tensor out_NV) {
  if (packed.dim() == 2) {
    at::mm_out(out_NV, hidden_ND.to(at::kFloat), packed.t());
  } else if (packed.scalar_type() == at::kFloat) {
    block_logits<float>(hidden_ND, packed, out_NV);
  } else {
    block_logits<at::BFloat16>(hidden_ND, packed, out_NV);
  }
}

// ---- linear layers -----------------------------------------------------------------------------------------------

// Bytes of a row of packed weights, and of their depth: 256 KiB, which stay in the second-level cache.
template <class T>
constexpr int64_t kLinearColumns = 256 / sizeof(T);
template <class T>
constexpr int64_t kDepth = 4096 / sizeof(T);
constexpr int64_t kLinearRows = 192;

// A matrix [columns, depth] to be read as a product's second factor [depth, columns], or such a factor's transposed view.
template <class T>
struct Weight {
  const T* data;
  int64_t stride;
  bool transposed;

  explicit Weight(const Tensor& weight)
      : data(weight.const_data_ptr<T>()), stride(weight.stride(weight.stride(1) == 1 ? 0 : 1)),
        transposed(weight.stride(1) != 1) {}

  void pack(int64_t column, int64_t columns, int64_t first, int64_t depth, T* to) const {
    if (!transposed) {
      transpose_second(data + column * stride + first, stride, depth, to, kLinearColumns<T>, columns);
      return;
    }
    const T* rows = data + first * stride + column;
    if constexpr (kPaired<T>) {
      second_of(rows, stride, depth, columns, to, kLinearColumns<T>);
    } else {
      for (int64_t d = 0; d < depth; ++d) std::copy(rows + d * stride, rows + d * stride + columns, to + d * kLinearColumns<T>);
    }
  }
};

// The depth in steps of even size.
template <class T>
int64_t even_steps(int64_t width) {
  const int64_t steps = (width + kDepth<T> - 1) / kDepth<T>;
  return rounded_up((width + steps - 1) / steps, 16);
}

// A thread's block of columns and of depth, over its rows.
template <class T>
struct LinearWork {
  int64_t step;  // of depth
  std::vector<T> packed;
  std::vector<float> sums, shift;

  LinearWork(int64_t rows, int64_t width)
      : step(even_steps<T>(width)), packed(step * kLinearColumns<T>),
        sums(kPaired<T> ? rows * kLinearColumns<T> : 0), shift(kLinearColumns<T>) {}
};

// Where a tile's float32 sums gather, and how far apart its rows are: the result's own place, or in bf16 beside it.
template <class T>
std::pair<float*, int64_t> sums_of(LinearWork<T>& work, T* out, int64_t row, int64_t own_row, int64_t column, int64_t outputs) {
  if constexpr (kPaired<T>) {
    return {work.sums.data() + own_row * kLinearColumns<T>, kLinearColumns<T>};
  } else {
    return {out + row * outputs + column, outputs};
  }
}

// out [N, F] = x [N, D] times the weight [F, D] + bias [F]. Sums run in float32 and are rounded once.
template <class T>
void linear_of(const Tensor& x_ND, const Weight<T>& weight, const T* bias, Tensor& out_NF) {
  constexpr int64_t kColumns = kLinearColumns<T>;
  const int64_t rows = x_ND.size(0), width = x_ND.size(1), outputs = out_NF.size(1);
  const int64_t tiles = (rows + kLinearRows - 1) / kLinearRows;
  const int64_t blocks = (outputs + kColumns - 1) / kColumns, threads = at::get_num_threads();
  const int64_t groups = std::min(tiles, blocks < 2 * threads ? (2 * threads + blocks - 1) / blocks : 1);  // of rows
  const int64_t rows_of_group = (tiles + groups - 1) / groups * kLinearRows;
  const T* x = x_ND.const_data_ptr<T>();
  T* out = out_NF.data_ptr<T>();
  at::parallel_for(0, blocks * groups, 1, [&](int64_t begin, int64_t end) {
    LinearWork<T> work(std::min(rows, rows_of_group), width);
    for (int64_t n = begin; n < end; ++n) {
      const int64_t column = n / groups * kColumns, columns = std::min(kColumns, outputs - column);
      const int64_t top = n % groups * rows_of_group, bottom = std::min(top + rows_of_group, rows);
      if (bias) row_to_fp32(bias + column, columns, work.shift.data());
      for (int64_t first = 0; first < width; first += work.step) {
        const int64_t depth = std::min(work.step, width - first);
        weight.pack(column, columns, first, depth, work.packed.data());
        for (int64_t row = top; row < bottom; row += kLinearRows) {
          const int64_t count = std::min(kLinearRows, bottom - row);
          const auto [to, stride] = sums_of(work, out, row, row - top, column, outputs);
          block_matmul(count, columns, depth, x + row * width + first, width, work.packed.data(), kColumns, to, stride,
                       /*add=*/first > 0);
          if (first + depth < width) continue;
          for (int64_t r = 0; r < count; ++r) {
            for (int64_t c = 0; bias && c < columns; ++c) to[r * stride + c] += work.shift[c];
            if constexpr (kPaired<T>) row_from_fp32(to + r * stride, columns, out + (row + r) * outputs + column);
          }
        }
      }
    }
    block_matmul_done<T>();
  });
}

bool has_amx() {
#if defined(__x86_64__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1);  // AMX-BF16
#else
  return false;
#endif
}

// Whether small-block matmuls make the fastest linear layer: in bf16 without AMX (with AMX, oneDNN is as fast).
bool has_block_linear(bool in_bf16) {
  static const bool in_16_bits = !has_amx() && has_block_matmul<at::BFloat16>();
  return in_bf16 ? in_16_bits : block_matmul_wins();
}

bool fits_blocks(const Tensor& x_ND) {
  const bool in_bf16 = x_ND.scalar_type() == at::kBFloat16;
  if (x_ND.numel() == 0 || (in_bf16 && x_ND.size(1) % 2 != 0)) return false;
  return (in_bf16 || x_ND.scalar_type() == at::kFloat) && has_block_linear(in_bf16);
}

// out [..., F] = x [..., D] times the weight [F, D], or its transposed view, + bias [F].
void block_linear(const Tensor& x, const Tensor& weight_FD, const std::optional<Tensor>& bias_F, Tensor out) {
  TORCH_CHECK(weight_FD.dim() == 2 && x.size(-1) == weight_FD.size(1) && x.scalar_type() == weight_FD.scalar_type() &&
                  (!bias_F || (bias_F->scalar_type() == x.scalar_type() && bias_F->numel() == weight_FD.size(0))) &&
                  out.is_contiguous() && out.scalar_type() == x.scalar_type() && out.size(-1) == weight_FD.size(0) &&
                  out.numel() / std::max<int64_t>(out.size(-1), 1) == x.numel() / std::max<int64_t>(x.size(-1), 1),
              "x ", x.sizes(), ", weight ", weight_FD.sizes(), ", bias and result ", out.sizes(), " do not fit");
  const Tensor x_ND = x.reshape({-1, x.size(-1)}).contiguous();
  const Tensor weight = weight_FD.stride(0) == 1 || weight_FD.stride(1) == 1 ? weight_FD : weight_FD.contiguous();
  if (!fits_blocks(x_ND)) {
    out.copy_(at::linear(x, weight, bias_F));
    return;
  }
  Tensor out_NF = out.view({-1, weight.size(0)});
  const Tensor bias = bias_F ? bias_F->contiguous() : Tensor();
  with_float_type(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    linear_of<T>(x_ND, Weight<T>(weight), bias_F ? bias.const_data_ptr<T>() : nullptr, out_NF);
  });
}

// residual^T [V, N] x hidden [N, D]. In 16 bits the vendor's product is twice as slow from a transposed residual as
// from one transposed here, a block of columns at a time.
Tensor weight_gradient(const Tensor& residual, const Tensor& hidden) {
  if (residual.scalar_type() != at::kBFloat16) return at::mm(residual.t(), hidden);
  const Tensor residual_NV = residual.contiguous(), hidden_ND = hidden.contiguous();
  const int64_t rows = residual_NV.size(0), vocabulary = residual_NV.size(1);
  Tensor out_VD = at::empty({vocabulary, hidden_ND.size(1)}, hidden_ND.options());
  Tensor transposed = at::empty({std::min(kTransposed, vocabulary), rows}, residual_NV.options());
  const auto* from = residual_NV.const_data_ptr<at::BFloat16>();
  auto* to = transposed.data_ptr<at::BFloat16>();
  for (int64_t column = 0; column < vocabulary; column += kTransposed) {
    const int64_t columns = std::min(kTransposed, vocabulary - column), tiles = (columns + 31) / 32;
    at::parallel_for(0, tiles, 1, [&](int64_t first, int64_t last) {
      const int64_t begin = first * 32, end = std::min(last * 32, columns);
      transpose<at::BFloat16, 32>(from + column + begin, vocabulary, to + begin * rows, rows, rows, end - begin);
    });
    Tensor slice = out_VD.narrow(0, column, columns), factor = transposed.narrow(0, 0, columns);
    if (fits_blocks(factor)) {
      linear_of<at::BFloat16>(factor, Weight<at::BFloat16>(hidden_ND.t()), nullptr, slice);
    } else {
      at::mm_out(slice, factor, hidden_ND);
    }
  }
  return out_VD;
}

TORCH_LIBRARY_IMPL(cca_ds, CompositeExplicitAutograd, m) {
  m.impl("has_block_linear", has_block_linear);
}

TORCH_LIBRARY_IMPL(cca_ds, CPU, m) {
  m.impl("block_linear", block_linear);
  m.impl("pack_weight", pack_weight);
  m.impl("fp32_logits", fp32_logits);
  m.impl("weight_gradient", weight_gradient);
}

}  // namespace
}  // namespace cca_ds
