// The norms of a training step on a CPU, each row read and written once: LlamaGen's root mean square, and
// VAR's layer norm with an image's own weight and bias. Compiled once per instruction set.
//
// Letters: B images (one, where all rows share a weight), L positions of an image, D width.
//
//     y = (x - m) s w + b        m the mean (rms: 0), s = 1 / sqrt(mean((x - m)^2) + eps)
//     dx = s (g - mean(g) - n mean(g n))        n = (x - m) s, g = w dy, without mean(g) for rms
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

struct Rows {
  int64_t images, positions, width;

  Rows(const Tensor& x, const Tensor& weight_BD) : images(weight_BD.size(0)), positions(0), width(x.size(-1)) {
    const int64_t rows = width > 0 ? x.numel() / width : 0;
    TORCH_CHECK(weight_BD.dim() == 2 && weight_BD.size(1) == width && images > 0 && rows % images == 0 &&
                    weight_BD.scalar_type() == at::kFloat,
                "weights ", weight_BD.sizes(), " do not fit rows ", x.sizes());
    positions = rows / images;
  }
};

// f(i) for each whole vector of a row, then once for what is left, with `count` numbers.
template <class F>
inline void for_each_vector(int64_t width, F f) {
  for (int64_t i = 0; i < width; i += Vector::size()) f(i, std::min<int64_t>(Vector::size(), width - i));
}

inline Vector load(const float* from, int64_t count) {
  return count == Vector::size() ? Vector::loadu(from) : Vector::loadu(from, count);
}

// The mean (of a centred norm) and the factor s of a row.
template <bool kCentred>
std::pair<float, float> statistics_of(const float* row, int64_t width, float eps) {
  Vector sum(0.0f), squares(0.0f);
  float mean = 0.0f;
  if constexpr (kCentred) {
    for_each_vector(width, [&](int64_t i, int64_t count) { sum = sum + load(row + i, count); });
    mean = total(sum) / width;
  }
  const Vector shift(mean);
  for_each_vector(width, [&](int64_t i, int64_t count) {
    Vector x = load(row + i, count) - shift;
    if (count < Vector::size()) x = Vector::set(Vector(0.0f), x, count);
    squares = at::vec::fmadd(x, x, squares);
  });
  return {mean, 1.0f / std::sqrt(total(squares) / width + eps)};
}

// Normalises x [.., D] into `out`; returns means (rms: zeros) and factors, [2, B * L].
template <bool kCentred>
Tensor norm(const Tensor& x_in, const Tensor& weight_in, const Tensor& bias_in, double eps, Tensor& out) {
  const Tensor x = x_in.contiguous(), weight_BD = weight_in.contiguous();
  const Tensor bias_BD = kCentred ? bias_in.contiguous() : bias_in;
  const Rows rows(x, weight_BD);
  TORCH_CHECK(out.sizes() == x.sizes() && out.scalar_type() == x.scalar_type() && out.is_contiguous(), "a result ", out.sizes(),
              " does not fit ", x.sizes());
  const int64_t count = rows.images * rows.positions, width = rows.width;
  Tensor statistics = at::empty({2, count}, weight_BD.options());
  float* means = statistics.data_ptr<float>();
  const float* weights = weight_BD.const_data_ptr<float>();
  const float* biases = kCentred ? bias_BD.const_data_ptr<float>() : nullptr;
  with_float_type(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const T* from = x.const_data_ptr<T>();
    T* to = out.data_ptr<T>();
    at::parallel_for(0, count, 16, [&](int64_t first, int64_t last) {
      std::vector<float> rows_fp32(width);
      float* __restrict row = rows_fp32.data();
      for (int64_t n = first; n < last; ++n) {
        row_to_fp32(from + n * width, width, row);
        const auto [mean, factor] = statistics_of<kCentred>(row, width, eps);
        means[n] = mean;
        means[count + n] = factor;
        const float* __restrict weight = weights + n / rows.positions * width;
        const float* __restrict bias = biases ? biases + n / rows.positions * width : nullptr;
        for (int64_t i = 0; i < width; ++i) row[i] = (row[i] - mean) * factor * weight[i];
        for (int64_t i = 0; bias && i < width; ++i) row[i] += bias[i];
        row_from_fp32(row, width, to + n * width);
      }
    });
  });
  return statistics;
}

// Gradients of x, and of weight and bias [B, D] float32.
template <bool kCentred>
std::tuple<Tensor, Tensor, Tensor> norm_backward(const Tensor& grad_in, const Tensor& x_in, const Tensor& weight_in,
                                                 const Tensor& statistics) {
  const Tensor x = x_in.contiguous(), grad = grad_in.contiguous(), weight_BD = weight_in.contiguous();
  const Rows rows(x, weight_BD);
  const int64_t count = rows.images * rows.positions, width = rows.width, parts = at::get_num_threads();
  TORCH_CHECK(grad.sizes() == x.sizes() && grad.scalar_type() == x.scalar_type() && statistics.is_contiguous() &&
                  statistics.numel() == 2 * count,
              "a gradient ", grad.sizes(), " does not fit ", x.sizes());
  Tensor grad_x = at::empty_like(x);
  Tensor sums = at::zeros({2, parts, rows.images, width}, weight_BD.options());  // a part of the rows each
  float *weight_sums = sums.data_ptr<float>(), *bias_sums = weight_sums + parts * rows.images * width;
  const float *means = statistics.const_data_ptr<float>(), *weights = weight_BD.const_data_ptr<float>();
  with_float_type(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const T *from = x.const_data_ptr<T>(), *grads = grad.const_data_ptr<T>();
    T* to = grad_x.data_ptr<T>();
    at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> rows_fp32(2 * width);
      float *__restrict row = rows_fp32.data(), *__restrict slope = row + width;
      for (int64_t n = begin * count / parts; n < end * count / parts; ++n) {
        const int64_t image = n / rows.positions;
        const float* __restrict weight = weights + image * width;
        const float mean = means[n], factor = means[count + n];
        float* __restrict weight_sum = weight_sums + (begin * rows.images + image) * width;
        float* __restrict bias_sum = bias_sums + (begin * rows.images + image) * width;
        row_to_fp32(from + n * width, width, row);
        row_to_fp32(grads + n * width, width, slope);
        for (int64_t i = 0; i < width; ++i) {
          row[i] = (row[i] - mean) * factor;
          weight_sum[i] += slope[i] * row[i];
          if constexpr (kCentred) bias_sum[i] += slope[i];
          slope[i] *= weight[i];
        }
        const float mean_gx = dot(slope, row, width) / width;
        Vector sum(0.0f);
        if constexpr (kCentred) for_each_vector(width, [&](int64_t i, int64_t n) { sum = sum + load(slope + i, n); });
        const float mean_g = total(sum) / width;
        for (int64_t i = 0; i < width; ++i) slope[i] = (slope[i] - mean_g - row[i] * mean_gx) * factor;
        row_from_fp32(slope, width, to + n * width);
      }
    });
  });
  return {grad_x, sums[0].sum(0), sums[1].sum(0)};
}

Tensor rms_norm(const Tensor& x, const Tensor& weight_1D, double eps, Tensor out) {
  return norm<false>(x, weight_1D, Tensor(), eps, out);
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad, const Tensor& x, const Tensor& weight_1D,
                                             const Tensor& statistics) {
  auto [grad_x, grad_weight, grad_bias] = norm_backward<false>(grad, x, weight_1D, statistics);
  return {grad_x, grad_weight};
}

Tensor layer_norm(const Tensor& x, const Tensor& weight_BD, const Tensor& bias_BD, double eps, Tensor out) {
  TORCH_CHECK(bias_BD.sizes() == weight_BD.sizes() && bias_BD.scalar_type() == at::kFloat, "biases ", bias_BD.sizes(),
              " do not fit weights ", weight_BD.sizes());
  return norm<true>(x, weight_BD, bias_BD, eps, out);
}

TORCH_LIBRARY_IMPL(cca_ds, CPU, m) {
  m.impl("rms_norm", rms_norm);
  m.impl("rms_norm_backward", rms_norm_backward);
  m.impl("layer_norm", layer_norm);
  m.impl("layer_norm_backward", norm_backward<true>);
}

}  // namespace
}  // namespace cca_ds
