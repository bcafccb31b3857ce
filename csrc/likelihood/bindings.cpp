// The one schema of the extension. What runs on a device is registered by the CPU libraries and by bindings_cuda.cpp.
//
// Letters: B sequences or images, L tokens or positions, N = B * L rows, V vocabulary, D width, H heads, C channels.
#include <torch/library.h>

TORCH_LIBRARY(cca_ds, m) {
  // The two entry points, differentiable in Python (likelihood/sequence_logp.py). `residual` is onehot - softmax [N, V],
  // empty unless kept. With `other` and `share` the logits are share * head(hidden) + (1 - share) * head(other), the latter
  // without gradient.
  m.def("sequence_logp(Tensor logits, Tensor targets) -> (Tensor logp, Tensor stats)");
  m.def("sequence_logp_backward(Tensor grad, Tensor logits, Tensor targets, Tensor stats) -> Tensor");
  m.def(
      "linear_sequence_logp(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, bool fp32, int chunk_rows, "
      "bool keep, Tensor? other=None, Tensor? share=None) -> (Tensor logp, Tensor residual)");
  m.def(
      "linear_sequence_logp_backward(Tensor grad, Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, "
      "Tensor residual, bool fp32, int chunk_rows, bool[3] needed, Tensor? other=None, Tensor? share=None) -> (Tensor, "
      "Tensor, Tensor)");
  // The row kernels. stats [N, 2]: a row's maximum, and the log of its sum of exp(x - maximum).
  m.def("row_stats(Tensor logits, Tensor? bias, Tensor targets) -> (Tensor logp, Tensor stats)");
  m.def("row_gradient(Tensor grad, Tensor logits, Tensor targets, Tensor stats) -> Tensor");
  m.def("row_residual(Tensor logits, Tensor? bias, Tensor targets, Tensor(a!) residual) -> Tensor logp");
  // Matmuls around them.
  m.def("pack_weight(Tensor weight) -> Tensor");
  m.def("fp32_logits(Tensor hidden, Tensor packed, Tensor(a!) out) -> ()");
  m.def("weight_gradient(Tensor residual, Tensor hidden) -> Tensor");
  m.def("block_linear(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) out) -> ()");
  m.def("has_block_linear(bool in_bf16) -> bool");
  // The passes of a training step on a CPU. `projection` is [B, L, 3 H C], `heads` [3, B, H, L, C].
  m.def("gelu(Tensor x, Tensor(a!) out) -> ()");
  m.def("gelu_backward(Tensor(a!) grad, Tensor x) -> ()");
  m.def("swiglu(Tensor gate, Tensor value, Tensor(a!) out) -> ()");
  m.def("swiglu_backward(Tensor grad, Tensor gate, Tensor value) -> (Tensor grad_gate, Tensor grad_value)");
  m.def("rms_norm(Tensor x, Tensor weight, float eps, Tensor(a!) out) -> Tensor factors");
  m.def(
      "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor factors) -> (Tensor grad_x, Tensor grad_weight)");
  m.def("rope_heads(Tensor projection, Tensor table, int heads, float scale) -> Tensor");
  m.def("rope_heads_backward(Tensor grad_heads, Tensor table, float scale, Tensor(a!) out) -> ()");
  m.def("qk_norm_heads(Tensor projection, Tensor scale) -> (Tensor heads, Tensor factors)");
  m.def(
      "qk_norm_heads_backward(Tensor grad_heads, Tensor heads, Tensor factors, Tensor scale, Tensor(a!) out) -> "
      "Tensor dot_yg");
  m.def("prefix_attention(Tensor heads, Tensor limits) -> (Tensor mixed, Tensor lse)");
  m.def(
      "prefix_attention_backward(Tensor grad, Tensor heads, Tensor mixed, Tensor lse, Tensor limits, Tensor(a!) out) -> ()");
  m.def("has_prefix_attention(bool in_bf16) -> bool");
  // How many tensors share the memory of x, x included.
  m.def("owners(Tensor x) -> int", [](const at::Tensor& x) { return static_cast<int64_t>(x.storage().use_count()); });
  // A decoding step, without gradients: a linear layer of few rows, and attention of one query to a head's live slots.
  m.def("few_rows_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def("one_query_attention(Tensor query, Tensor keys, Tensor values, float scale) -> Tensor");
}
