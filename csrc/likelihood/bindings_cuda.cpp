// The CUDA kernels behind the schema: checks, allocation, the current stream. Compiled only with a CUDA PyTorch.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "likelihood/sequence_logp.h"
#include "likelihood/sequence_logp_cuda.h"

namespace cca_ds {
namespace {

using at::Tensor;

Element element_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return Element::kFloat32;
    case at::kBFloat16:
      return Element::kBFloat16;
    case at::kHalf:
      return Element::kFloat16;
    default:
      TORCH_CHECK(false, "no CUDA kernel for ", type);
  }
}

Rows rows_of(const Tensor& logits_NV, at::ScalarType other, const void* bias, const Tensor& targets_N) {
  TORCH_CHECK(logits_NV.is_contiguous() && targets_N.is_contiguous(), "the row kernels take contiguous tensors");
  TORCH_CHECK(logits_NV.size(1) <= kMostColumns, "a vocabulary of ", logits_NV.size(1), " is larger than ", kMostColumns);
  TORCH_CHECK(targets_N.device() == logits_NV.device(), "targets are on ", targets_N.device(), ", their logits on ",
              logits_NV.device(), ": move them there");
  return {element_of(logits_NV.scalar_type()), element_of(other),
          logits_NV.const_data_ptr(),          bias,
          targets_N.const_data_ptr<int64_t>(), logits_NV.size(0),
          static_cast<int>(logits_NV.size(1))};
}

const void* data_of(const std::optional<Tensor>& bias_V) {
  return bias_V ? bias_V->const_data_ptr() : nullptr;
}

std::tuple<Tensor, Tensor> row_stats_cuda(const Tensor& logits_NV, const std::optional<Tensor>& bias_V,
                                          const Tensor& targets_N) {
  const c10::cuda::CUDAGuard guard(logits_NV.device());
  const auto options = logits_NV.options().dtype(at::kFloat);
  Tensor logp_N = at::empty({logits_NV.size(0)}, options), stats_N2 = at::empty({logits_NV.size(0), 2}, options);
  const auto other = bias_V ? bias_V->scalar_type() : logits_NV.scalar_type();
  C10_CUDA_CHECK(launch_row_stats(rows_of(logits_NV, other, data_of(bias_V), targets_N), logp_N.data_ptr<float>(),
                                  stats_N2.data_ptr<float>(), c10::cuda::getCurrentCUDAStream()));
  return {logp_N, stats_N2};
}

Tensor row_gradient_cuda(const Tensor& grad_B, const Tensor& logits_NV, const Tensor& targets_N, const Tensor& stats_N2) {
  const c10::cuda::CUDAGuard guard(logits_NV.device());
  const int64_t rows_per_sequence = std::max<int64_t>(1, logits_NV.size(0) / std::max<int64_t>(1, grad_B.numel()));
  Tensor out_NV = at::empty_like(logits_NV);
  C10_CUDA_CHECK(launch_row_gradient(rows_of(logits_NV, logits_NV.scalar_type(), nullptr, targets_N),
                                     stats_N2.const_data_ptr<float>(), grad_B.const_data_ptr<float>(), rows_per_sequence,
                                     out_NV.data_ptr(), c10::cuda::getCurrentCUDAStream()));
  return out_NV;
}

Tensor row_residual_cuda(const Tensor& logits_NV, const std::optional<Tensor>& bias_V, const Tensor& targets_N,
                         Tensor residual_NV) {
  const c10::cuda::CUDAGuard guard(logits_NV.device());
  Tensor logp_N = at::empty({logits_NV.size(0)}, logits_NV.options().dtype(at::kFloat));
  C10_CUDA_CHECK(launch_row_residual(rows_of(logits_NV, residual_NV.scalar_type(), data_of(bias_V), targets_N),
                                     logp_N.data_ptr<float>(), residual_NV.data_ptr(),
                                     c10::cuda::getCurrentCUDAStream()));
  return logp_N;
}

// The tensor cores add up in float32 whatever they are given; here they also write it.
void fp32_logits_cuda(const Tensor& hidden_ND, const Tensor& weight_VD, Tensor out_NV) {
  at::mm_outf(hidden_ND, weight_VD.t(), at::kFloat, out_NV);
}

Tensor weight_gradient_cuda(const Tensor& residual_NV, const Tensor& hidden_ND) {
  return at::mm(residual_NV.t(), hidden_ND);
}

TORCH_LIBRARY_IMPL(cca_ds, CUDA, m) {
  m.impl("row_stats", row_stats_cuda);
  m.impl("row_gradient", row_gradient_cuda);
  m.impl("row_residual", row_residual_cuda);
  m.impl("fp32_logits", fp32_logits_cuda);
  m.impl("weight_gradient", weight_gradient_cuda);
}

}  // namespace
}  // namespace cca_ds
