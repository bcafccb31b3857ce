// The two entry points, for any device: from logits, and from the output head. The latter makes the logits a chunk of rows
// at a time with a matmul and turns them into onehot - softmax with the row kernels of the former.
//
// Letters: B sequences, L tokens a sequence, N = B * L rows, V vocabulary, D width, C rows of a chunk.
//
// With G = onehot - softmax [N, V] and g the gradient of the loss by log p, one scalar a sequence:
//     d hidden = g * (G W)        d weight = G^T (g * hidden)        d bias = G^T g
//
// Given `other` [N, D] and `share`, one t a sequence, the logits are t * head(hidden) + (1 - t) * head(other), the second
// term being a constant. The head is linear: these are its logits of t * hidden + (1 - t) * other, so that one matmul
// makes them, and the gradients are the three above with g * t for g.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <tuple>

#include "likelihood/huge_pages.h"

namespace cca_ds {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// ---- the row kernels and matmuls, through the dispatcher ---------------------------------------------------------

template <class Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

std::tuple<Tensor, Tensor> row_stats(const Tensor& logits_NV, const OptionalTensor& bias_V, const Tensor& targets_N) {
  static const auto op =
      find<std::tuple<Tensor, Tensor>(const Tensor&, const OptionalTensor&, const Tensor&)>("cca_ds::row_stats");
  return op.call(logits_NV, bias_V, targets_N);
}

Tensor row_gradient(const Tensor& grad_B, const Tensor& logits_NV, const Tensor& targets_N, const Tensor& stats_N2) {
  static const auto op =
      find<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&)>("cca_ds::row_gradient");
  return op.call(grad_B, logits_NV, targets_N, stats_N2);
}

Tensor row_residual(const Tensor& logits_NV, const OptionalTensor& bias_V, const Tensor& targets_N, Tensor residual_NV) {
  static const auto op =
      find<Tensor(const Tensor&, const OptionalTensor&, const Tensor&, Tensor)>("cca_ds::row_residual");
  return op.call(logits_NV, bias_V, targets_N, residual_NV);
}

Tensor pack_weight(const Tensor& weight_VD) {
  static const auto op = find<Tensor(const Tensor&)>("cca_ds::pack_weight");
  return op.call(weight_VD);
}

void fp32_logits(const Tensor& hidden_CD, const Tensor& packed, Tensor out_CV) {
  static const auto op = find<void(const Tensor&, const Tensor&, Tensor)>("cca_ds::fp32_logits");
  op.call(hidden_CD, packed, out_CV);
}

void block_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, Tensor out) {
  static const auto op =
      find<void(const Tensor&, const Tensor&, const OptionalTensor&, Tensor)>("cca_ds::block_linear");
  op.call(x, weight, bias, out);
}

bool has_block_linear() {
  static const auto op = find<bool(bool)>("cca_ds::has_block_linear");
  return op.call(/*in_bf16=*/false);
}

Tensor weight_gradient(const Tensor& residual_NV, const Tensor& hidden_ND) {
  static const auto op = find<Tensor(const Tensor&, const Tensor&)>("cca_ds::weight_gradient");
  return op.call(residual_NV, hidden_ND);
}

// ---- from logits -------------------------------------------------------------------------------------------------

at::ScalarType accumulate_type(const Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

Tensor flat_targets(const Tensor& targets_BL) {
  return targets_BL.reshape({-1}).to(at::kLong).contiguous();
}

// Summed in float64: a float32 sum of 576 terms of 10 nats would be off by more than all of the kernels.
Tensor sum_tokens(const Tensor& logp_N, const Tensor& targets_BL) {
  return logp_N.view(targets_BL.sizes()).sum({-1}, false, at::kDouble).to(logp_N.scalar_type());
}

std::tuple<Tensor, Tensor> sequence_logp(const Tensor& logits_BLV, const Tensor& targets_BL) {
  const Tensor logits_NV = logits_BLV.reshape({targets_BL.numel(), logits_BLV.size(-1)}).contiguous();
  const auto [logp_N, stats_N2] = row_stats(logits_NV, std::nullopt, flat_targets(targets_BL));
  return {sum_tokens(logp_N, targets_BL), stats_N2};
}

Tensor sequence_logp_backward(const Tensor& grad_B, const Tensor& logits_BLV, const Tensor& targets_BL,
                              const Tensor& stats_N2) {
  const Tensor logits_NV = logits_BLV.reshape({targets_BL.numel(), logits_BLV.size(-1)}).contiguous();
  const Tensor grad = grad_B.to(accumulate_type(logits_BLV)).contiguous();
  return row_gradient(grad, logits_NV, flat_targets(targets_BL), stats_N2).view(logits_BLV.sizes());
}

// ---- from the output head ----------------------------------------------------------------------------------------

// Makes a chunk's logits: in float32 (`fp32`), the bias being left to the row kernels, which add it in float32 too; or
// in the inputs' dtype with the bias added by the product, as nn.Linear does.
struct Head {
  Tensor weight_VD;
  OptionalTensor bias_V;
  bool fp32, by_blocks;
  Tensor packed{};

  // `chunked`: many matmuls share the weight, so that packing it, at the cost of its memory, pays in float32 too.
  Head(const Tensor& weight, const OptionalTensor& bias, bool in_fp32, bool chunked)
      : weight_VD(weight.contiguous()), bias_V(bias), fp32(in_fp32 && accumulate_type(weight) != weight.scalar_type()) {
    if (bias_V) bias_V = bias_V->contiguous();
    by_blocks = weight_VD.is_cpu() && weight_VD.scalar_type() == at::kFloat && has_block_linear();
    if (fp32) packed = weight_VD.is_cuda() ? weight_VD : pack_weight(weight_VD);
    if (by_blocks && chunked) packed = pack_weight(weight_VD);
  }

  at::TensorOptions logits_options() const {
    return fp32 ? weight_VD.options().dtype(at::kFloat) : weight_VD.options();
  }

  OptionalTensor late_bias() const { return packed.defined() ? bias_V : std::nullopt; }

  void logits(const Tensor& hidden_CD, Tensor out_CV) const {
    if (packed.defined()) {
      fp32_logits(hidden_CD, packed, out_CV);
    } else if (by_blocks) {
      block_linear(hidden_CD, weight_VD, bias_V, out_CV);
    } else if (bias_V) {
      at::addmm_out(out_CV, *bias_V, hidden_CD, weight_VD.t());
    } else {
      at::mm_out(out_CV, hidden_CD, weight_VD.t());
    }
  }
};

// Rows of a chunk: as asked, or so many that the chunk is 2^24 logits on a GPU (1024 rows of 16384) and at most 10 * 2^20
// on a CPU, in chunks of even size. Logits that are made in the buffer they stay in need no chunk on a CPU, where one
// large product is the fastest.
int64_t rows_of_chunk(int64_t asked, const Head& head, int64_t rows, bool in_place) {
  const bool cuda = head.weight_VD.is_cuda();
  if (asked > 0) return asked;
  if (in_place && !cuda) return std::max<int64_t>(rows, 1);
  const int64_t logits = cuda ? int64_t(1) << 24 : int64_t(10) << 20;
  const int64_t most = std::max<int64_t>(64, logits / std::max<int64_t>(1, head.weight_VD.size(0)));
  if (cuda || rows <= most) return most;
  const int64_t chunks = (rows + most - 1) / most;
  return (rows + chunks - 1) / chunks;
}

// A buffer for a chunk's logits. Float32 rows that a CPU makes tile by tile lie two cache lines further apart than V.
Tensor chunk_buffer(const Head& head, int64_t rows) {
  const int64_t vocabulary = head.weight_VD.size(0), apart = head.fp32 && head.weight_VD.is_cpu() ? 32 : 0;
  return on_huge_pages(at::empty({rows, vocabulary + apart}, head.logits_options())).narrow(1, 0, vocabulary);
}

// A scalar of each sequence repeated for its rows, [N, 1] in the accumulation dtype.
Tensor of_rows(const Tensor& scalar_B, const Tensor& targets_BL, at::ScalarType type) {
  return scalar_B.to(type).unsqueeze(-1).expand(targets_BL.sizes()).reshape({-1, 1});
}

// What the head is applied to: hidden, or hidden mixed with `other`, a chunk of rows at a time. The mix is made in the
// accumulation dtype and rounded once.
struct Operand {
  Tensor hidden_ND, other_ND{}, share_N1{};

  Operand(const Tensor& hidden_BLD, const Tensor& targets_BL, const OptionalTensor& other_BLD, const OptionalTensor& share_B)
      : hidden_ND(flat(hidden_BLD, targets_BL)) {
    if (!other_BLD) return;
    TORCH_CHECK(share_B.has_value(), "other is given without the share of hidden in the mix");
    other_ND = flat(*other_BLD, targets_BL);
    share_N1 = of_rows(*share_B, targets_BL, accumulate_type(hidden_ND));
  }

  static Tensor flat(const Tensor& x_BLD, const Tensor& targets_BL) {
    return x_BLD.reshape({targets_BL.numel(), x_BLD.size(-1)}).contiguous();
  }

  Tensor rows(int64_t first, int64_t count) const {
    const Tensor hidden = hidden_ND.narrow(0, first, count);
    if (!other_ND.defined()) return hidden;
    const auto type = share_N1.scalar_type();
    const Tensor other = other_ND.narrow(0, first, count).to(type);
    return at::lerp(other, hidden.to(type), share_N1.narrow(0, first, count)).to(hidden.scalar_type());
  }
};

std::tuple<Tensor, Tensor> linear_sequence_logp(const Tensor& hidden_BLD, const Tensor& weight, const Tensor& targets_BL,
                                                const OptionalTensor& bias, bool fp32, int64_t chunk_rows, bool keep,
                                                const OptionalTensor& other, const OptionalTensor& share) {
  const Operand operand(hidden_BLD, targets_BL, other, share);
  const Tensor targets_N = flat_targets(targets_BL);
  const int64_t rows = operand.hidden_ND.size(0), vocabulary = weight.size(0);
  // What stays is asked for before what goes (the packed weight): the other way round would leave a hole in the heap.
  Tensor residual_NV = on_huge_pages(at::empty({keep ? rows : 0, keep ? vocabulary : 0}, weight.options()));
  const Head head(weight, bias, fp32, !keep && chunk_rows == 0);
  const bool in_place = keep && !head.fp32;
  const int64_t chunk = rows_of_chunk(chunk_rows, head, rows, in_place);
  Tensor buffer_CV = chunk_buffer(head, in_place ? 0 : std::min(chunk, rows));
  Tensor logp_N = at::empty({rows}, weight.options().dtype(accumulate_type(weight)));
  for (int64_t first = 0; first < rows; first += chunk) {
    const int64_t count = std::min(chunk, rows - first);
    const Tensor targets = targets_N.narrow(0, first, count);
    Tensor residual = keep ? residual_NV.narrow(0, first, count) : Tensor();
    Tensor logits = in_place ? residual : buffer_CV.narrow(0, 0, count);
    head.logits(operand.rows(first, count), logits);
    logp_N.narrow(0, first, count)
        .copy_(keep ? row_residual(logits, head.late_bias(), targets, residual)
                    : std::get<0>(row_stats(logits, head.late_bias(), targets)));
  }
  return {sum_tokens(logp_N, targets_BL), residual_NV};
}

// sum over rows of g * G. In 16 bits g is split in a high and a low half, so that the product loses none of it.
Tensor bias_gradient(const Tensor& residual_NV, const Tensor& grad_N1) {
  const auto type = residual_NV.scalar_type();
  const Tensor high_N1 = grad_N1.to(type);
  if (type == grad_N1.scalar_type()) return at::mm(high_N1.t(), residual_NV).squeeze(0);
  const Tensor halves_N2 = at::cat({high_N1, (grad_N1 - high_N1).to(type)}, 1);
  if (residual_NV.is_cuda()) return at::mm(halves_N2.t(), residual_NV, at::kFloat).sum(0);
  Tensor sum_V = at::zeros({residual_NV.size(1)}, residual_NV.options().dtype(at::kFloat));
  for (int64_t n = 0; n < residual_NV.size(0); n += 64) {
    const int64_t count = std::min<int64_t>(64, residual_NV.size(0) - n);
    sum_V += at::mv(residual_NV.narrow(0, n, count).to(at::kFloat).t(), grad_N1.narrow(0, n, count).squeeze(1));
  }
  return sum_V;
}

// total [V, D] float32 (float64) += G^T h for a chunk
void add_weight_gradient(Tensor& total_VD, const Tensor& residual_CV, const Tensor& hidden_CD) {
  if (residual_CV.scalar_type() == total_VD.scalar_type()) {
    total_VD.addmm_(residual_CV.t(), hidden_CD);
  } else if (residual_CV.is_cuda()) {
    at::addmm_outf(total_VD, residual_CV.t(), hidden_CD, at::kFloat, 1, 1, total_VD);
  } else {
    total_VD.addmm_(residual_CV.to(at::kFloat).t(), hidden_CD.to(at::kFloat));
  }
}

// g * hidden in the dtype of hidden, multiplied in that of g; a GPU makes no copy in the latter.
Tensor scaled_rows(const Tensor& hidden_ND, const Tensor& grad_N1) {
  Tensor scaled_ND = at::empty_like(hidden_ND);
  return at::mul_out(scaled_ND, hidden_ND, grad_N1);
}

struct Gradients {
  Tensor hidden_ND, weight_VD, bias_V;
};

Gradients from_kept(const Tensor& hidden_ND, const Tensor& weight_VD, const Tensor& residual_NV, const Tensor& grad_N1,
                    std::array<bool, 3> needed) {
  Gradients gradients;
  if (needed[0]) gradients.hidden_ND = at::mm(residual_NV, weight_VD).mul_(grad_N1);
  if (needed[1]) gradients.weight_VD = weight_gradient(residual_NV, scaled_rows(hidden_ND, grad_N1));
  if (needed[2]) gradients.bias_V = bias_gradient(residual_NV, grad_N1);
  return gradients;
}

// Lean: the logits are made again, a chunk at a time; d weight and d bias gather in float32.
Gradients from_recomputed(const Operand& operand, const Head& head, const Tensor& targets_N, const Tensor& grad_N1,
                          int64_t chunk, std::array<bool, 3> needed) {
  const Tensor& hidden_ND = operand.hidden_ND;
  const int64_t rows = hidden_ND.size(0), vocabulary = head.weight_VD.size(0);
  const auto sums = head.weight_VD.options().dtype(grad_N1.scalar_type());
  Tensor logits_CV = chunk_buffer(head, std::min(chunk, rows));
  Tensor residual_CV = head.fp32 ? at::empty(logits_CV.sizes(), head.weight_VD.options()) : logits_CV;
  Gradients gradients{at::empty_like(hidden_ND), {}, {}};
  if (needed[1]) gradients.weight_VD = at::zeros(head.weight_VD.sizes(), sums);
  if (needed[2]) gradients.bias_V = at::zeros({vocabulary}, sums);
  for (int64_t first = 0; first < rows; first += chunk) {
    const int64_t count = std::min(chunk, rows - first);
    const Tensor hidden = hidden_ND.narrow(0, first, count), grad = grad_N1.narrow(0, first, count);
    Tensor logits = logits_CV.narrow(0, 0, count), residual = residual_CV.narrow(0, 0, count);
    head.logits(operand.rows(first, count), logits);
    row_residual(logits, head.late_bias(), targets_N.narrow(0, first, count), residual);
    if (needed[0]) {
      Tensor out = gradients.hidden_ND.narrow(0, first, count);
      at::mm_out(out, residual, head.weight_VD).mul_(grad);
    }
    if (needed[1]) add_weight_gradient(gradients.weight_VD, residual, scaled_rows(hidden, grad));
    if (needed[2]) gradients.bias_V += bias_gradient(residual, grad);
  }
  return gradients;
}

std::tuple<Tensor, Tensor, Tensor> linear_sequence_logp_backward(
    const Tensor& grad_B, const Tensor& hidden_BLD, const Tensor& weight, const Tensor& targets_BL,
    const OptionalTensor& bias, const Tensor& residual, bool fp32, int64_t chunk_rows, std::array<bool, 3> needed,
    const OptionalTensor& other, const OptionalTensor& share) {
  const Operand operand(hidden_BLD, targets_BL, other, share);
  const Tensor& hidden_ND = operand.hidden_ND;
  Tensor grad_N1 = of_rows(grad_B, targets_BL, accumulate_type(weight));
  if (operand.share_N1.defined()) grad_N1 = grad_N1 * operand.share_N1;
  const bool kept = residual.size(1) == weight.size(0) && residual.size(0) == hidden_ND.size(0);
  Gradients gradients;
  if (kept) {
    gradients = from_kept(hidden_ND, weight.contiguous(), residual, grad_N1, needed);
  } else {
    const Head head(weight, bias, fp32, /*chunked=*/false);
    const int64_t chunk = rows_of_chunk(chunk_rows, head, hidden_ND.size(0), false);
    gradients = from_recomputed(operand, head, flat_targets(targets_BL), grad_N1, chunk, needed);
  }
  const auto given = [&](const Tensor& gradient, bool is_needed) {
    return is_needed ? gradient.to(weight.scalar_type()) : at::empty({0}, weight.options());
  };
  return {needed[0] ? gradients.hidden_ND.view(hidden_BLD.sizes()) : at::empty({0}, weight.options()),
          given(gradients.weight_VD, needed[1]), given(gradients.bias_V, needed[2])};
}

template <class Library>
void register_ops(Library& m) {
  m.impl("sequence_logp", sequence_logp);
  m.impl("sequence_logp_backward", sequence_logp_backward);
  m.impl("linear_sequence_logp", linear_sequence_logp);
  m.impl("linear_sequence_logp_backward", linear_sequence_logp_backward);
}

TORCH_LIBRARY_IMPL(cca_ds, CPU, m) {
  register_ops(m);
}

TORCH_LIBRARY_IMPL(cca_ds, CUDA, m) {
  register_ops(m);
}

}  // namespace
}  // namespace cca_ds
