// Root-mean-square norm of a training step on a CPU, each row read and written once. Compiled once per instruction set.
//
// Letters: N rows, D width.
//
//     y = x s w                       s = 1 / sqrt(mean(x^2) + eps)
//     dx = s (g - n mean(g n))        n = x s, g = w dy
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "cpu/heads.h"

namespace cca_ds {
namespace {

using Vector = Vectorized<float>;

// The factor s of a row.
float factor_of(const float* row, int64_t width, float eps) {
  Vector squares(0.0f);
  for (int64_t i = 0; i < width; i += Vector::size()) {
    const int64_t count = std::min<int64_t>(Vector::size(), width - i);
    Vector x = count == Vector::size() ? Vector::loadu(row + i) : Vector::loadu(row + i, count);
    if (count < Vector::size()) x = Vector::set(Vector(0.0f), x, count);
    squares = at::vec::fmadd(x, x, squares);
  }
  return 1.0f / std::sqrt(total(squares) / width + eps);
}

int64_t count_rows(const Tensor& x, const Tensor& weight_D) {
  TORCH_CHECK(weight_D.dim() == 1 && x.size(-1) == weight_D.size(0) && weight_D.scalar_type() == at::kFloat,
              "weights ", weight_D.sizes(), " do not fit rows ", x.sizes());
  return weight_D.size(0) > 0 ? x.numel() / weight_D.size(0) : 0;
}

// Normalises x [.., D] into `out`; returns the factors s [N].
Tensor rms_norm(const Tensor& x_in, const Tensor& weight_in, double eps, Tensor out) {
  const Tensor x = x_in.contiguous(), weight_D = weight_in.contiguous();
  const int64_t count = count_rows(x, weight_D), width = weight_D.size(0);
  TORCH_CHECK(out.sizes() == x.sizes() && out.scalar_type() == x.scalar_type() && out.is_contiguous(), "a result ", out.sizes(),
              " does not fit ", x.sizes());
  Tensor factors_N = at::empty({count}, weight_D.options());
  float* factors = factors_N.data_ptr<float>();
  const float* __restrict weight = weight_D.const_data_ptr<float>();
  with_float_type(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const T* from = x.const_data_ptr<T>();
    T* to = out.data_ptr<T>();
    at::parallel_for(0, count, 16, [&](int64_t first, int64_t last) {
      std::vector<float> row_fp32(width);
      float* __restrict row = row_fp32.data();
      for (int64_t n = first; n < last; ++n) {
        row_to_fp32(from + n * width, width, row);
        const float factor = factor_of(row, width, eps);
        factors[n] = factor;
        for (int64_t i = 0; i < width; ++i) row[i] = row[i] * factor * weight[i];
        row_from_fp32(row, width, to + n * width);
      }
    });
  });
  return factors_N;
}

// Gradients of x, and of weight [D] float32.
std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad_in, const Tensor& x_in, const Tensor& weight_in,
                                             const Tensor& factors_N) {
  const Tensor x = x_in.contiguous(), grad = grad_in.contiguous(), weight_D = weight_in.contiguous();
  const int64_t count = count_rows(x, weight_D), width = weight_D.size(0), parts = at::get_num_threads();
  TORCH_CHECK(grad.sizes() == x.sizes() && grad.scalar_type() == x.scalar_type() && factors_N.is_contiguous() &&
                  factors_N.numel() == count,
              "a gradient ", grad.sizes(), " does not fit ", x.sizes());
  Tensor grad_x = at::empty_like(x);
  Tensor sums = at::zeros({parts, width}, weight_D.options());  // a part of the rows each
  float* weight_sums = sums.data_ptr<float>();
  const float *factors = factors_N.const_data_ptr<float>(), *__restrict weight = weight_D.const_data_ptr<float>();
  with_float_type(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const T *from = x.const_data_ptr<T>(), *grads = grad.const_data_ptr<T>();
    T* to = grad_x.data_ptr<T>();
    at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> rows_fp32(2 * width);
      float *__restrict row = rows_fp32.data(), *__restrict slope = row + width;
      float* __restrict weight_sum = weight_sums + begin * width;
      for (int64_t n = begin * count / parts; n < end * count / parts; ++n) {
        row_to_fp32(from + n * width, width, row);
        row_to_fp32(grads + n * width, width, slope);
        for (int64_t i = 0; i < width; ++i) {
          row[i] *= factors[n];
          weight_sum[i] += slope[i] * row[i];
          slope[i] *= weight[i];
        }
        const float mean_gx = dot(slope, row, width) / width;
        for (int64_t i = 0; i < width; ++i) slope[i] = (slope[i] - row[i] * mean_gx) * factors[n];
        row_from_fp32(slope, width, to + n * width);
      }
    });
  });
  return {grad_x, sums.sum(0)};
}

TORCH_LIBRARY_IMPL(cca_ds, CPU, m) {
  m.impl("rms_norm", rms_norm);
  m.impl("rms_norm_backward", rms_norm_backward);
}

}  // namespace
}  // namespace cca_ds
