// Splits a projection into heads, with LlamaGen's rope or VAR's qk norm applied, and merges gradients of heads back into one:
// what runs before and after attention in a training step on a CPU, one pass each. Compiled once per instruction set;
// letters as in heads.h.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "cpu/heads.h"

namespace cca_ds {
namespace {

constexpr float kNormEps = 1e-12f;

// Moves the rows of all heads from one layout to the other: values as they are, queries and keys as `change(place, row)`
// leaves them, in float32. A few positions of a head at a time: one position of all heads would be as many streams of
// memory, a power of two apart.
template <class T, class From, class To, class Change>
void move_heads(const Shape& shape, const Tensor& source, From from, Tensor& target, To to, Change change) {
  constexpr int64_t kTile = 16;
  const int64_t tiles = (shape.positions + kTile - 1) / kTile, channels = shape.channels;
  const T* rows = source.const_data_ptr<T>();
  T* out = target.data_ptr<T>();
  at::parallel_for(0, shape.images * tiles, 1, [&](int64_t first, int64_t last) {
    float row_fp32[kMostChannels];
    for (int64_t n = first; n < last; ++n) {
      const int64_t begin = n % tiles * kTile, end = std::min(begin + kTile, shape.positions);
      for (int64_t stream = 0; stream < 3 * shape.heads; ++stream) {
        for (int64_t position = begin; position < end; ++position) {
          const Place place{stream / shape.heads, n / tiles, stream % shape.heads, position};
          const T* row = rows + (shape.*from)(place);
          if (place.part == 2) {
            std::copy(row, row + channels, out + (shape.*to)(place));
            continue;
          }
          row_to_fp32(row, channels, row_fp32);
          change(place, row_fp32);
          row_from_fp32(row_fp32, channels, out + (shape.*to)(place));
        }
      }
    }
  });
}

template <class Change>
Tensor heads_of(const Tensor& projection, const Shape& shape, Change change) {
  check_channels(shape);
  const Tensor from = projection.contiguous();
  Tensor out = at::empty({3, shape.images, shape.heads, shape.positions, shape.channels}, projection.options());
  with_float_type(projection.scalar_type(), [&](auto t) {
    move_heads<decltype(t)>(shape, from, &Shape::in_projection, out, &Shape::among_heads, change);
  });
  return out;
}

template <class Change>
void projection_of(const Tensor& heads, const Shape& shape, Change change, Tensor& out) {
  check_channels(shape);
  TORCH_CHECK(out.is_contiguous() && out.numel() == heads.numel() && out.scalar_type() == heads.scalar_type(),
              "a projection of ", out.sizes(), " does not fit heads ", heads.sizes());
  const Tensor from = heads.contiguous();
  with_float_type(heads.scalar_type(), [&](auto t) {
    move_heads<decltype(t)>(shape, from, &Shape::among_heads, out, &Shape::in_projection, change);
  });
}

// ---- LlamaGen's heads: rope on queries and keys, queries scaled ---------------------------------------------------

// Rotates pairs of neighbouring channels by their position's angles, (cos, sin) in `table`, or by their negatives (`back`).
struct Rotate {
  const float* table;
  int64_t channels;
  float scale, direction;

  Rotate(const Tensor& angles, const Shape& shape, double scale_of_queries, bool back)
      : channels(shape.channels), scale(scale_of_queries), direction(back ? -1.0f : 1.0f) {
    TORCH_CHECK(angles.scalar_type() == at::kFloat && angles.is_contiguous() &&
                    angles.numel() == shape.positions * shape.channels,
                "a rotary table of ", angles.sizes(), " does not fit ", shape.positions, " positions of ", shape.channels,
                " channels");
    table = angles.const_data_ptr<float>();
  }

  void operator()(const Place& place, float* row) const {
    const float* angles = table + place.position * channels;
    const float factor = place.part == 0 ? scale : 1.0f;
    for (int64_t i = 0; i < channels; i += 2) {
      const float cosine = angles[i] * factor, sine = angles[i + 1] * factor * direction;
      const float even = row[i], odd = row[i + 1];
      row[i] = even * cosine - odd * sine;
      row[i + 1] = even * sine + odd * cosine;
    }
  }
};

Tensor rope_heads(const Tensor& projection, const Tensor& table, int64_t heads, double scale) {
  const Shape shape = shape_of_projection(projection, heads);
  return heads_of(projection, shape, Rotate(table, shape, scale, /*back=*/false));
}

void rope_heads_backward(const Tensor& grad_heads, const Tensor& table, double scale, Tensor out) {
  const Shape shape = shape_of_heads(grad_heads);
  projection_of(grad_heads, shape, Rotate(table, shape, scale, /*back=*/true), out);
}

// ---- VAR's heads: queries of length scale_H, keys of length 1 ----------------------------------------------------

const float* scale_of(const Tensor& scale_H, const Shape& shape) {
  TORCH_CHECK(scale_H.scalar_type() == at::kFloat && scale_H.is_contiguous() && scale_H.numel() == shape.heads, "a scale of ",
              scale_H.sizes(), " does not fit ", shape.heads, " heads");
  return scale_H.const_data_ptr<float>();
}

// Also the factors that made them so, [2, B, H, L] float32.
std::tuple<Tensor, Tensor> qk_norm_heads(const Tensor& projection, const Tensor& scale_H) {
  const Shape shape = shape_of_projection(projection, scale_H.numel());
  const float* scale = scale_of(scale_H, shape);
  Tensor factors = at::empty({2, shape.images, shape.heads, shape.positions}, scale_H.options());
  float* factors_out = factors.data_ptr<float>();
  Tensor heads = heads_of(projection, shape, [&](const Place& place, float* row) {
    const float length = std::max(std::sqrt(dot(row, row, shape.channels)), kNormEps);
    const float factor = (place.part == 0 ? scale[place.head] : 1.0f) / length;
    for (int64_t i = 0; i < shape.channels; ++i) row[i] *= factor;
    factors_out[place.part * shape.rows() + shape.row(place)] = factor;
  });
  return {heads, factors};
}

// Through y = factor * x of length l: factor * (g - y (y . g) / l^2), into `out`. Returns y . g of the queries, [B, H, L],
// from which the gradient of the scale is made.
Tensor qk_norm_heads_backward(const Tensor& grad_heads, const Tensor& heads, const Tensor& factors, const Tensor& scale_H,
                                 Tensor out) {
  const Shape shape = shape_of_heads(heads);
  TORCH_CHECK(grad_heads.sizes() == heads.sizes() && grad_heads.scalar_type() == heads.scalar_type(), "gradients ",
              grad_heads.sizes(), " do not fit heads ", heads.sizes());
  const Tensor normed = heads.contiguous();
  const float *scale = scale_of(scale_H, shape), *factors_in = factors.const_data_ptr<float>();
  Tensor dot_yg = at::empty({shape.images, shape.heads, shape.positions}, factors.options());
  float* dot_yg_out = dot_yg.data_ptr<float>();
  with_float_type(heads.scalar_type(), [&](auto t) {
    const auto* rows = normed.const_data_ptr<decltype(t)>();
    const auto change = [&](const Place& place, float* g) {
      float y[kMostChannels];
      row_to_fp32(rows + shape.among_heads(place), shape.channels, y);
      const float dot_product = dot(y, g, shape.channels), length = place.part == 0 ? scale[place.head] : 1.0f;
      const float share = dot_product / (length * length), factor = factors_in[place.part * shape.rows() + shape.row(place)];
      for (int64_t i = 0; i < shape.channels; ++i) g[i] = factor * (g[i] - y[i] * share);
      if (place.part == 0) dot_yg_out[shape.row(place)] = dot_product;
    };
    projection_of(grad_heads, shape, change, out);
  });
  return dot_yg;
}

TORCH_LIBRARY_IMPL(cca_ds, CPU, m) {
  m.impl("rope_heads", rope_heads);
  m.impl("rope_heads_backward", rope_heads_backward);
  m.impl("qk_norm_heads", qk_norm_heads);
  m.impl("qk_norm_heads_backward", qk_norm_heads_backward);
}

}  // namespace
}  // namespace cca_ds
