// What the CUDA file offers to the bindings: raw pointers and a stream, no torch type on either side.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace cca_ds {

enum class Element { kFloat32, kBFloat16, kFloat16 };

// N rows of V logits; `bias` [V] (null: none) is of type `other`. token_logp [N] and stats [N, 2] (maximum, log of the
// sum of exp(x - maximum)) are float32. A target outside [0, V) reads nothing and gives NaN.
struct Rows {
  Element element;
  Element other;
  const void* logits;
  const void* bias;
  const int64_t* targets;
  int64_t rows;
  int vocabulary;
};

cudaError_t launch_row_stats(const Rows& rows, float* token_logp, float* stats, cudaStream_t stream);

// out [N, V] of type `rows.element` = grad[row / rows_per_sequence] * (onehot - softmax)
cudaError_t launch_row_gradient(const Rows& rows, const float* stats, const float* grad, int64_t rows_per_sequence,
                                void* out, cudaStream_t stream);

// residual [N, V] of type `rows.other` = onehot - softmax; it may be `logits` itself where the types are the same.
cudaError_t launch_row_residual(const Rows& rows, float* token_logp, void* residual, cudaStream_t stream);

}  // namespace cca_ds
