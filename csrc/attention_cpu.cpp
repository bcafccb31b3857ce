// Attention of a training step on a CPU: heads out of a projection (turned as LlamaGen's, normalised as VAR's) and back,
// one pass each, and softmax(q k^T) v where every query sees the first so many keys, as both families' do.
// Compiled once per instruction set.
//
// Letters: B images, L positions, H heads, C channels of a head. Projections are [B, L, 3, H, C], heads [3, B, H, L, C].
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "vector_math.h"
#include "wide_product.h"

namespace cca_ds {
namespace {

using at::BFloat16;
using at::Tensor;

constexpr float kNormEps = 1e-12f;

struct Shape {
  int64_t images, positions, heads, channels;

  // First element of a head's position among the heads [3, B, H, L, C].
  int64_t among_heads(int64_t part, int64_t image, int64_t head, int64_t position) const {
    return (((part * images + image) * heads + head) * positions + position) * channels;
  }
  // ... and of its image and head among [B, H, L].
  int64_t row(int64_t image, int64_t head, int64_t position) const {
    return (image * heads + head) * positions + position;
  }
};

Shape shape_of_heads(const Tensor& heads) {
  TORCH_CHECK(heads.dim() == 5 && heads.size(0) == 3, "heads must be [3, B, H, L, C], not ", heads.sizes());
  return {heads.size(1), heads.size(3), heads.size(2), heads.size(4)};
}

Shape shape_of_projection(const Tensor& projection, int64_t heads) {
  TORCH_CHECK(projection.dim() == 3 && heads > 0 && projection.size(2) % (3 * heads) == 0, "a projection must be [B, L, 3 * ",
              heads, " * C], not ", projection.sizes());
  return {projection.size(0), projection.size(1), heads, projection.size(2) / (3 * heads)};
}

template <class T>
void widen_row(const T* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + step_of<T>() <= count; i += step_of<T>()) store_two<float>(to + i, load_two(from + i));
  for (; i < count; ++i) to[i] = static_cast<float>(from[i]);
}

template <class T>
void narrow_row(const float* from, int64_t count, T* to) {
  int64_t i = 0;
  for (; i + step_of<T>() <= count; i += step_of<T>()) store_two<T>(to + i, load_two<float>(from + i));
  for (; i < count; ++i) to[i] = static_cast<T>(from[i]);
}

float dot(const float* a, const float* b, int64_t count) {
  constexpr int64_t kLanes = Vectorized<float>::size();
  Vectorized<float> sum(0.0f);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    sum = at::vec::fmadd(Vectorized<float>::loadu(a + i), Vectorized<float>::loadu(b + i), sum);
  }
  float rest = total(sum);
  for (; i < count; ++i) rest += a[i] * b[i];
  return rest;
}

// to = pairs of neighbouring channels turned by their angles, (cos, sin) in `table`, and scaled.
void turn(const float* from, const float* table, int64_t channels, float scale, bool back, float* to) {
  for (int64_t i = 0; i < channels; i += 2) {
    const float cosine = table[i] * scale, sine = (back ? -table[i + 1] : table[i + 1]) * scale;
    to[i] = from[i] * cosine - from[i + 1] * sine;
    to[i + 1] = from[i] * sine + from[i + 1] * cosine;
  }
}

// visit(part, image, head, position) of all heads, a few positions of a head at a time: one position of all heads would
// be as many streams of memory, a power of two apart.
template <class Visit>
void for_each_head(const Shape& shape, Visit visit) {
  constexpr int64_t kTile = 16;
  const int64_t tiles = (shape.positions + kTile - 1) / kTile;
  at::parallel_for(0, shape.images * tiles, 1, [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; ++n) {
      const int64_t image = n / tiles, begin = n % tiles * kTile, end = std::min(begin + kTile, shape.positions);
      for (int64_t part = 0; part < 3; ++part) {
        for (int64_t head = 0; head < shape.heads; ++head) {
          for (int64_t position = begin; position < end; ++position) visit(part, image, head, position);
        }
      }
    }
  });
}

int64_t in_projection(const Shape& shape, int64_t part, int64_t image, int64_t head, int64_t position) {
  return (((image * shape.positions + position) * 3 + part) * shape.heads + head) * shape.channels;
}

template <class F>
void with_type(const Tensor& x, F run) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return run(float());
    case at::kBFloat16:
      return run(BFloat16());
    default:
      TORCH_CHECK(false, "attention takes float32 and bf16, not ", x.scalar_type());
  }
}

constexpr int64_t kMostChannels = 512;

void check_channels(const Shape& shape) {
  TORCH_CHECK(shape.channels % 2 == 0 && shape.channels <= kMostChannels, "a head has ", shape.channels,
              " channels; give an even number up to ", kMostChannels);
}

const float* table_of(const Tensor& table, const Shape& shape) {
  TORCH_CHECK(table.scalar_type() == at::kFloat && table.is_contiguous() && table.numel() == shape.positions * shape.channels,
              "a rotary table of ", table.sizes(), " does not fit ", shape.positions, " positions of ", shape.channels,
              " channels");
  return table.const_data_ptr<float>();
}

// Heads of LlamaGen: queries and keys turned, queries scaled.
Tensor turned_heads(const Tensor& projection, const Tensor& table, int64_t heads, double scale) {
  const Shape shape = shape_of_projection(projection, heads);
  check_channels(shape);
  const Tensor from = projection.contiguous();
  const float* angles = table_of(table, shape);
  Tensor out = at::empty({3, shape.images, heads, shape.positions, shape.channels}, projection.options());
  with_type(projection, [&](auto t) {
    using T = decltype(t);
    const T* source = from.const_data_ptr<T>();
    T* to = out.data_ptr<T>();
    for_each_head(shape, [&](int64_t part, int64_t image, int64_t head, int64_t position) {
      const T* row = source + in_projection(shape, part, image, head, position);
      T* target = to + shape.among_heads(part, image, head, position);
      if (part == 2) {
        std::copy(row, row + shape.channels, target);
        return;
      }
      float wide[kMostChannels], turned[kMostChannels];
      widen_row(row, shape.channels, wide);
      turn(wide, angles + position * shape.channels, shape.channels, part == 0 ? float(scale) : 1.0f, false, turned);
      narrow_row(turned, shape.channels, target);
    });
  });
  return out;
}

Tensor turned_heads_backward(const Tensor& grad_heads, const Tensor& table, double scale) {
  const Shape shape = shape_of_heads(grad_heads);
  check_channels(shape);
  const Tensor from = grad_heads.contiguous();
  const float* angles = table_of(table, shape);
  Tensor out = at::empty({shape.images, shape.positions, 3 * shape.heads * shape.channels}, grad_heads.options());
  with_type(grad_heads, [&](auto t) {
    using T = decltype(t);
    const T* source = from.const_data_ptr<T>();
    T* to = out.data_ptr<T>();
    for_each_head(shape, [&](int64_t part, int64_t image, int64_t head, int64_t position) {
      const T* row = source + shape.among_heads(part, image, head, position);
      T* target = to + in_projection(shape, part, image, head, position);
      if (part == 2) {
        std::copy(row, row + shape.channels, target);
        return;
      }
      float wide[kMostChannels], turned[kMostChannels];
      widen_row(row, shape.channels, wide);
      turn(wide, angles + position * shape.channels, shape.channels, part == 0 ? float(scale) : 1.0f, true, turned);
      narrow_row(turned, shape.channels, target);
    });
  });
  return out;
}

const float* scale_of(const Tensor& scale_H, const Shape& shape) {
  TORCH_CHECK(scale_H.scalar_type() == at::kFloat && scale_H.is_contiguous() && scale_H.numel() == shape.heads, "a scale of ",
              scale_H.sizes(), " does not fit ", shape.heads, " heads");
  return scale_H.const_data_ptr<float>();
}

// Heads of VAR: queries of length scale_H, keys of length 1; and the factors that made them so, [2, B, H, L] float32.
std::tuple<Tensor, Tensor> normalised_heads(const Tensor& projection, const Tensor& scale_H) {
  const Shape shape = shape_of_projection(projection, scale_H.numel());
  check_channels(shape);
  const Tensor from = projection.contiguous();
  const float* scale = scale_of(scale_H, shape);
  Tensor out = at::empty({3, shape.images, shape.heads, shape.positions, shape.channels}, projection.options());
  Tensor factors = at::empty({2, shape.images, shape.heads, shape.positions}, scale_H.options());
  float* factor_out = factors.data_ptr<float>();
  with_type(projection, [&](auto t) {
    using T = decltype(t);
    const T* source = from.const_data_ptr<T>();
    T* to = out.data_ptr<T>();
    for_each_head(shape, [&](int64_t part, int64_t image, int64_t head, int64_t position) {
      const T* row = source + in_projection(shape, part, image, head, position);
      T* target = to + shape.among_heads(part, image, head, position);
      if (part == 2) {
        std::copy(row, row + shape.channels, target);
        return;
      }
      float wide[kMostChannels];
      widen_row(row, shape.channels, wide);
      const float length = std::max(std::sqrt(dot(wide, wide, shape.channels)), kNormEps);
      const float factor = (part == 0 ? scale[head] : 1.0f) / length;
      for (int64_t i = 0; i < shape.channels; ++i) wide[i] *= factor;
      narrow_row(wide, shape.channels, target);
      factor_out[part * shape.images * shape.heads * shape.positions + shape.row(image, head, position)] = factor;
    });
  });
  return {out, factors};
}

// Through y = factor * x of length l: factor * (g - y (y . g) / l^2). Also y . g of the queries, [B, H, L], from which the
// gradient of the scale is made.
std::tuple<Tensor, Tensor> normalised_heads_backward(const Tensor& grad_heads, const Tensor& heads, const Tensor& factors,
                                                     const Tensor& scale_H) {
  const Shape shape = shape_of_heads(heads);
  check_channels(shape);
  TORCH_CHECK(grad_heads.sizes() == heads.sizes() && grad_heads.scalar_type() == heads.scalar_type(), "gradients ",
              grad_heads.sizes(), " do not fit heads ", heads.sizes());
  const Tensor grad_from = grad_heads.contiguous(), from = heads.contiguous();
  const float *scale = scale_of(scale_H, shape), *factor = factors.const_data_ptr<float>();
  Tensor out = at::empty({shape.images, shape.positions, 3 * shape.heads * shape.channels}, heads.options());
  Tensor along_q = at::empty({shape.images, shape.heads, shape.positions}, factors.options());
  float* along_out = along_q.data_ptr<float>();
  with_type(heads, [&](auto t) {
    using T = decltype(t);
    const T *grads = grad_from.const_data_ptr<T>(), *rows = from.const_data_ptr<T>();
    T* to = out.data_ptr<T>();
    for_each_head(shape, [&](int64_t part, int64_t image, int64_t head, int64_t position) {
      const int64_t offset = shape.among_heads(part, image, head, position), row = shape.row(image, head, position);
      T* target = to + in_projection(shape, part, image, head, position);
      if (part == 2) {
        std::copy(grads + offset, grads + offset + shape.channels, target);
        return;
      }
      float g[kMostChannels], y[kMostChannels];
      widen_row(grads + offset, shape.channels, g);
      widen_row(rows + offset, shape.channels, y);
      const float along = dot(y, g, shape.channels), length = part == 0 ? scale[head] : 1.0f;
      const float share = along / (length * length);
      const float own = factor[part * shape.images * shape.heads * shape.positions + row];
      for (int64_t i = 0; i < shape.channels; ++i) g[i] = own * (g[i] - y[i] * share);
      narrow_row(g, shape.channels, target);
      if (part == 0) along_out[row] = along;
    });
  });
  return {out, along_q};
}

// ---- attention -------------------------------------------------------------------------------------------------

constexpr int64_t kQueries = 64;  // of a block: its scores, and a head's keys and values, stay in the second-level cache

// What a thread works in, for one head after another.
struct Workspace {
  int64_t width;  // of a row of scores: the keys, rounded up
  std::vector<BFloat16> keys, values, powers;
  std::vector<float> scores, mixed;

  Workspace(int64_t positions, int64_t channels)
      : width((positions + 31) / 32 * 32), keys(channels * width), values(channels * width), powers(kQueries * width),
        scores(kQueries * width), mixed(kQueries * channels) {}
};

// values [L, C] as pairs of positions side by side, [L / 2, C, 2]; the partner of an odd last one is 0.
void pack_values(const BFloat16* from, int64_t positions, int64_t channels, BFloat16* to) {
  for (int64_t l = 0; l < positions; l += 2) {
    const BFloat16 *even = from + l * channels, *odd = even + channels;
    BFloat16* pair = to + l * channels;
    for (int64_t c = 0; c < channels; ++c) pair[2 * c] = even[c];
    if (l + 1 < positions) {
      for (int64_t c = 0; c < channels; ++c) pair[2 * c + 1] = odd[c];
    } else {
      for (int64_t c = 0; c < channels; ++c) pair[2 * c + 1] = BFloat16(0.0f);
    }
  }
}

// powers = exp(scores - maximum) of the first `visible` in bf16, and 0 for the others up to `end`. Scores have room for,
// and lose, what lies behind the visible ones up to a multiple of 32.
RowSum<float> row_powers(float* scores, int64_t visible, int64_t end, BFloat16* powers) {
  constexpr int64_t kStep = step_of<BFloat16>();
  const int64_t whole = (visible + kStep - 1) / kStep * kStep;
  std::fill(scores + visible, scores + whole, negative_infinity<float>());
  Vectorized<float> max_a(negative_infinity<float>()), max_b = max_a;
  for (int64_t i = 0; i < whole; i += kStep) {
    const Two<float> x = load_two(scores + i);
    max_a = at::vec::maximum(max_a, x.a);
    max_b = at::vec::maximum(max_b, x.b);
  }
  const float max = largest(at::vec::maximum(max_a, max_b));
  const Vectorized<float> shift(max);
  Vectorized<float> sum_a(0.0f), sum_b(0.0f);
  for (int64_t i = 0; i < whole; i += kStep) {
    const Two<float> x = load_two(scores + i), power{exp_of(x.a - shift), exp_of(x.b - shift)};
    sum_a = sum_a + power.a;
    sum_b = sum_b + power.b;
    store_two(powers + i, power);
  }
  if (whole < end) std::fill(powers + whole, powers + end, BFloat16(0.0f));
  return {max, total(sum_a + sum_b)};
}

// Softmax of q k^T over the first limits[l] keys of query l, times v: [B, L, H, C], and the log-sum-exps [B, H, L] float32.
std::tuple<Tensor, Tensor> prefix_attention(const Tensor& heads_3BHLC, const Tensor& limits_L) {
  const Shape shape = shape_of_heads(heads_3BHLC);
  check_channels(shape);
  TORCH_CHECK(has_wide_product() && heads_3BHLC.scalar_type() == at::kBFloat16, "prefix_attention takes bf16, on a processor ",
              "with its products");
  const Tensor heads = heads_3BHLC.contiguous(), limits_of = limits_L.contiguous();
  TORCH_CHECK(limits_of.scalar_type() == at::kLong && limits_of.numel() == shape.positions, "limits ", limits_L.sizes(),
              " do not fit ", shape.positions, " positions");
  const int64_t* limits = limits_of.const_data_ptr<int64_t>();
  for (int64_t l = 0; l < shape.positions; ++l) {
    TORCH_CHECK(limits[l] > 0 && limits[l] <= shape.positions && (l == 0 || limits[l] >= limits[l - 1]), "limit ", limits[l],
                " of query ", l, " must be from 1 to ", shape.positions, " and not below the one before");
  }
  const int64_t positions = shape.positions, channels = shape.channels;
  Tensor mixed_BLHC = at::empty({shape.images, positions, shape.heads, channels}, heads.options());
  Tensor lse_BHL = at::empty({shape.images, shape.heads, positions}, heads.options().dtype(at::kFloat));
  const BFloat16* all = heads.const_data_ptr<BFloat16>();
  BFloat16* out = mixed_BLHC.data_ptr<BFloat16>();
  float* lse = lse_BHL.data_ptr<float>();
  at::parallel_for(0, shape.images * shape.heads, 1, [&](int64_t first, int64_t last) {
    Workspace work(positions, channels);
    for (int64_t n = first; n < last; ++n) {
      const int64_t image = n / shape.heads, head = n % shape.heads;
      const auto part = [&](int64_t number) { return all + shape.among_heads(number, image, head, 0); };
      pack_transposed(part(1), channels / 2, work.keys.data(), work.width, positions);
      pack_values(part(2), positions, channels, work.values.data());
      for (int64_t begin = 0; begin < positions; begin += kQueries) {
        const int64_t rows = std::min(kQueries, positions - begin), keys = limits[begin + rows - 1];
        const int64_t even_keys = (keys + 1) / 2 * 2;
        wide_product(rows, keys, channels, part(0) + begin * channels, channels, work.keys.data(), work.width,
                     work.scores.data(), work.width);
        RowSum<float> sums[kQueries];
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t offset = r * work.width;
          sums[r] = row_powers(work.scores.data() + offset, limits[begin + r], even_keys, work.powers.data() + offset);
        }
        wide_product(rows, channels, even_keys, work.powers.data(), work.width, work.values.data(), channels,
                     work.mixed.data(), channels);
        for (int64_t r = 0; r < rows; ++r) {
          float* row = work.mixed.data() + r * channels;
          const float scale = 1.0f / sums[r].sum;
          for (int64_t c = 0; c < channels; ++c) row[c] *= scale;
          narrow_row(row, channels, out + ((image * positions + begin + r) * shape.heads + head) * channels);
          lse[shape.row(image, head, begin + r)] = sums[r].max + std::log(sums[r].sum);
        }
      }
    }
    wide_product_done();
  });
  return {mixed_BLHC, lse_BHL};
}

TORCH_LIBRARY_IMPL(cca_ds, CPU, m) {
  m.impl("turned_heads", turned_heads);
  m.impl("turned_heads_backward", turned_heads_backward);
  m.impl("normalised_heads", normalised_heads);
  m.impl("normalised_heads_backward", normalised_heads_backward);
  m.impl("prefix_attention", prefix_attention);
}

// Takes no tensor, so no device: there is one CPU.
TORCH_LIBRARY_IMPL(cca_ds, CompositeExplicitAutograd, m) {
  m.impl("has_prefix_attention", has_wide_product);
}

}  // namespace
}  // namespace cca_ds
