// How the heads of an attention lie in memory: projections are [B, L, 3, H, C], heads [3, B, H, L, C].
//
// Letters: B images, L positions, H heads, C channels of a head.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>

#include "cpu/vector_math.h"

namespace cca_ds {

using at::Tensor;

struct Place {
  int64_t part, image, head, position;  // part: queries, keys, values
};

struct Shape {
  int64_t images, positions, heads, channels;

  // Where a head's row of a position begins in the projection, among the heads, and its place in [B, H, L].
  int64_t in_projection(const Place& at) const {
    return (((at.image * positions + at.position) * 3 + at.part) * heads + at.head) * channels;
  }
  int64_t among_heads(const Place& at) const { return (at.part * rows() + row(at)) * channels; }
  int64_t row(const Place& at) const { return (at.image * heads + at.head) * positions + at.position; }
  int64_t rows() const { return images * heads * positions; }
};

inline Shape shape_of_heads(const Tensor& heads) {
  TORCH_CHECK(heads.dim() == 5 && heads.size(0) == 3, "heads must be [3, B, H, L, C], not ", heads.sizes());
  return {heads.size(1), heads.size(3), heads.size(2), heads.size(4)};
}

inline Shape shape_of_projection(const Tensor& projection, int64_t heads) {
  TORCH_CHECK(projection.dim() == 3 && heads > 0 && projection.size(2) % (3 * heads) == 0, "a projection must be [B, L, 3 * ",
              heads, " * C], not ", projection.sizes());
  return {projection.size(0), projection.size(1), heads, projection.size(2) / (3 * heads)};
}

template <class T>
inline void row_to_fp32(const T* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + step_of<T>() <= count; i += step_of<T>()) store_two<float>(to + i, load_two(from + i));
  for (; i < count; ++i) to[i] = static_cast<float>(from[i]);
}

template <class T>
inline void row_from_fp32(const float* from, int64_t count, T* to) {
  int64_t i = 0;
  for (; i + step_of<T>() <= count; i += step_of<T>()) store_two<T>(to + i, load_two<float>(from + i));
  for (; i < count; ++i) to[i] = static_cast<T>(from[i]);
}

inline float dot(const float* a, const float* b, int64_t count) {
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

constexpr int64_t kMostChannels = 512;

inline void check_channels(const Shape& shape) {
  TORCH_CHECK(shape.channels % 2 == 0 && shape.channels <= kMostChannels, "a head has ", shape.channels,
              " channels; give an even number up to ", kMostChannels);
}

}  // namespace cca_ds
