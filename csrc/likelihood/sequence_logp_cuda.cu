// CUDA kernels of the sequence log-likelihood: one block a row, 16-byte loads, float32 sums in a fixed order.
// No torch header: `nvcc -c sequence_logp_cuda.cu` is all it takes.
#include "likelihood/sequence_logp_cuda.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "likelihood/sequence_logp.h"

namespace cca_ds {

template <>
struct Convert<__nv_bfloat16> {
  static CCA_DS_HD float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
  static CCA_DS_HD __nv_bfloat16 narrow(float x) { return __float2bfloat16(x); }
  static CCA_DS_HD uint32_t bits(__nv_bfloat16 x) { return __bfloat16_as_ushort(x); }
};

template <>
struct Convert<__half> {
  static CCA_DS_HD float widen(__half x) { return __half2float(x); }
  static CCA_DS_HD __half narrow(float x) { return __float2half(x); }
  static CCA_DS_HD uint32_t bits(__half x) { return __half_as_ushort(x); }
};

namespace {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 512;

// Partial sums to one, the same for every thread: halving inside each warp, then over the warps' sums in warp 0.
__device__ RowSum<float> reduce_block(RowSum<float> sum) {
  __shared__ RowSum<float> of_warp[kMaxThreads / kWarp];
  __shared__ RowSum<float> of_block;
  const auto partner = [](RowSum<float> mine, int distance) {
    return RowSum<float>{__shfl_down_sync(0xffffffffu, mine.max, distance),
                         __shfl_down_sync(0xffffffffu, mine.sum, distance)};
  };
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  sum = reduce_lanes(sum, kWarp, partner);
  if (lane == 0) of_warp[warp] = sum;
  __syncthreads();
  if (warp == 0) {
    sum = reduce_lanes(lane < warps ? of_warp[lane] : empty_row<float>(), kWarp, partner);
    if (lane == 0) of_block = sum;
  }
  __syncthreads();
  return of_block;
}

template <class T, class B>
__device__ float logp_of_target(const T* row, const B* bias, int64_t target, int64_t vocabulary, RowStats<float> stats) {
  return in_vocabulary(target, vocabulary) ? token_logp(logit_at(row, bias, target), stats) : not_a_number<float>();
}

template <class T, class B>
__global__ void __launch_bounds__(kMaxThreads, 2)
    row_stats_kernel(const T* logits, const B* bias, const int64_t* targets, int64_t rows, int vocabulary,
                     float* logp, float* stats_out) {
  for (int64_t n = blockIdx.x; n < rows; n += gridDim.x) {
    const T* row = logits + row_offset(n, vocabulary);
    const RowStats<float> stats = finish(reduce_block(thread_row_sum(row, bias, vocabulary, threadIdx.x, blockDim.x)));
    if (threadIdx.x != 0) continue;
    logp[n] = logp_of_target(row, bias, targets[n], vocabulary, stats);
    stats_out[2 * n] = stats.max;
    stats_out[2 * n + 1] = stats.log_sum;
  }
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads, 2)
    row_gradient_kernel(const T* logits, const int64_t* targets, int64_t rows, int vocabulary, const float* stats,
                        const float* grad, int64_t rows_per_sequence, T* out) {
  for (int64_t n = blockIdx.x; n < rows; n += gridDim.x) {
    const int64_t offset = row_offset(n, vocabulary);
    thread_row_gradient(logits + offset, static_cast<const T*>(nullptr), out + offset, vocabulary, targets[n],
                        RowStats<float>{stats[2 * n], stats[2 * n + 1]}, grad[n / rows_per_sequence], threadIdx.x,
                        blockDim.x);
  }
}

// `residual` may be `logits`, so neither pointer is __restrict__. The second reading of the row comes from the cache.
template <class T, class O>
__global__ void __launch_bounds__(kMaxThreads, 2)
    row_residual_kernel(const T* logits, const O* bias, const int64_t* targets, int64_t rows, int vocabulary,
                        float* logp, O* residual) {
  for (int64_t n = blockIdx.x; n < rows; n += gridDim.x) {
    const int64_t offset = row_offset(n, vocabulary);
    const T* row = logits + offset;
    const RowStats<float> stats = finish(reduce_block(thread_row_sum(row, bias, vocabulary, threadIdx.x, blockDim.x)));
    if (threadIdx.x == 0) logp[n] = logp_of_target(row, bias, targets[n], vocabulary, stats);
    __syncthreads();  // the target's logit is read before it is overwritten
    thread_row_gradient(row, bias, residual + offset, vocabulary, targets[n], stats, 1.0f, threadIdx.x, blockDim.x);
  }
}

// Four packs a thread: enough loads in flight to fill the memory pipe, without idle threads on short vocabularies.
int threads_for(int vocabulary, int width) {
  const int needed = (vocabulary + 4 * width - 1) / (4 * width);
  int threads = 2 * kWarp;
  while (threads < needed && threads < kMaxThreads) threads *= 2;
  return threads;
}

unsigned blocks_for(int64_t rows) {
  constexpr int64_t kMaxBlocks = 0x7fffffff;
  return static_cast<unsigned>(rows < kMaxBlocks ? rows : kMaxBlocks);
}

template <class T>
struct Is {
  using type = T;
};

template <class F>
cudaError_t with_type(Element element, F run) {
  switch (element) {
    case Element::kFloat32:
      return run(Is<float>());
    case Element::kBFloat16:
      return run(Is<__nv_bfloat16>());
    case Element::kFloat16:
      return run(Is<__half>());
  }
  return cudaErrorInvalidValue;
}

// The two types are the same, or the logits are the float32 of a GEMM over the other.
template <class F>
cudaError_t with_types(const Rows& rows, F run) {
  return with_type(rows.other, [&](auto other) {
    using O = typename decltype(other)::type;
    if (rows.element == rows.other) return run(Is<O>(), other);
    return rows.element == Element::kFloat32 ? run(Is<float>(), other) : cudaErrorInvalidValue;
  });
}

}  // namespace

cudaError_t launch_row_stats(const Rows& rows, float* token_logp, float* stats, cudaStream_t stream) {
  if (rows.rows == 0) return cudaSuccess;
  return with_types(rows, [&](auto logits, auto other) {
    using T = typename decltype(logits)::type;
    using B = typename decltype(other)::type;
    row_stats_kernel<T, B><<<blocks_for(rows.rows), threads_for(rows.vocabulary, pack_width<T, T>()), 0, stream>>>(
        static_cast<const T*>(rows.logits), static_cast<const B*>(rows.bias), rows.targets, rows.rows, rows.vocabulary,
        token_logp, stats);
    return cudaGetLastError();
  });
}

cudaError_t launch_row_gradient(const Rows& rows, const float* stats, const float* grad, int64_t rows_per_sequence,
                                void* out, cudaStream_t stream) {
  if (rows.rows == 0) return cudaSuccess;
  return with_type(rows.element, [&](auto logits) {
    using T = typename decltype(logits)::type;
    row_gradient_kernel<T><<<blocks_for(rows.rows), threads_for(rows.vocabulary, pack_width<T, T>()), 0, stream>>>(
        static_cast<const T*>(rows.logits), rows.targets, rows.rows, rows.vocabulary, stats, grad, rows_per_sequence,
        static_cast<T*>(out));
    return cudaGetLastError();
  });
}

cudaError_t launch_row_residual(const Rows& rows, float* token_logp, void* residual, cudaStream_t stream) {
  if (rows.rows == 0) return cudaSuccess;
  return with_types(rows, [&](auto logits, auto other) {
    using T = typename decltype(logits)::type;
    using O = typename decltype(other)::type;
    row_residual_kernel<T, O><<<blocks_for(rows.rows), threads_for(rows.vocabulary, pack_width<T, O>()), 0, stream>>>(
        static_cast<const T*>(rows.logits), static_cast<const O*>(rows.bias), rows.targets, rows.rows, rows.vocabulary,
        token_logp, static_cast<O*>(residual));
    return cudaGetLastError();
  });
}

}  // namespace cca_ds
