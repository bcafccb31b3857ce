"""log p(x|c) of a sequence of codes, from logits or straight from the output head.

Letters: B sequences, L codes a sequence, V vocabulary, D width, N = B * L rows.

    log p[b] = sum_n log softmax(logits[b, n])[targets[b, n]]
    d log p[b] / d logits[b, n] = onehot(targets[b, n]) - softmax(logits[b, n])

A mixed log-likelihood takes t * head(hidden) + (1 - t) * head(other) for its logits, `other` and the head on it being
constants (GFT, arXiv 2501.15420). The head is linear, so these are the head of mixed hidden states: one matmul. With
G = onehot - softmax of the mixed logits, its gradients are those of an unmixed one of `hidden`, times t:
t (G W) by hidden, G^T (t * hidden) by the weight, G^T t by the bias.

The kernels are in csrc/likelihood/. Each has a plain version, `*_eager`, which also runs where no library was built,
and on devices and dtypes that the libraries do not take.
"""

import os

import torch
from torch import Tensor

from cca_ds.ops.library import backend

ACCUMULATE = ("fp32", "native")
_KERNEL_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}


# ---- plain versions ------------------------------------------------------------------------------------------------


def _fp32(tensor: Tensor) -> Tensor:
    """float32; float64 stays."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def sequence_logp_eager(logits_BLV: Tensor, targets_BL: Tensor) -> Tensor:
    """Plain version of `sequence_logp`: the same numbers, through a float32 copy of the logits."""
    logits_BLV = _fp32(logits_BLV)
    logp_BL = logits_BLV.log_softmax(-1).gather(-1, targets_BL.long().unsqueeze(-1)).squeeze(-1)
    return logp_BL.sum(-1, dtype=torch.float64).to(logits_BLV.dtype)


def linear_sequence_logp_eager(
    hidden_BLD: Tensor,
    weight_VD: Tensor,
    targets_BL: Tensor,
    bias: Tensor | None = None,
    mixed: tuple[Tensor, Tensor] | None = None,
    *,
    accumulate: str = "fp32",
) -> Tensor:
    """Plain version of `linear_sequence_logp`: builds all of the logits [B, L, V], of both operands where there are
    two.
    """
    if accumulate == "fp32":
        hidden_BLD, weight_VD = _fp32(hidden_BLD), _fp32(weight_VD)
        bias = None if bias is None else _fp32(bias)
    logits_BLV = torch.nn.functional.linear(hidden_BLD, weight_VD, bias)
    if mixed is not None:
        other_BLD, share_B = mixed
        with torch.no_grad():
            other_BLV = _fp32(torch.nn.functional.linear(other_BLD.to(hidden_BLD.dtype), weight_VD, bias))
        share_B11 = share_B.to(other_BLV.dtype).view(-1, 1, 1)
        logits_BLV = share_B11 * logits_BLV + (1 - share_B11) * other_BLV
    return sequence_logp_eager(logits_BLV, targets_BL)


# ---- fake results and gradients of the kernels, for torch ----------------------------------------------------------


def _fake_sequence_logp(logits, targets):
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    rows = targets.numel()
    return logits.new_empty(targets.shape[:-1], dtype=dtype), logits.new_empty((rows, 2), dtype=dtype)


def _fake_linear_sequence_logp(hidden, weight, targets, bias, fp32, chunk_rows, keep, other=None, share=None):
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    residual = weight.new_empty((targets.numel(), weight.shape[0]) if keep else (0, 0))
    return hidden.new_empty(targets.shape[:-1], dtype=dtype), residual


def _fake_linear_backward(
    grad, hidden, weight, targets, bias, residual, fp32, chunk_rows, needed, other=None, share=None
):
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    return tuple(weight.new_empty(s if n else (0,)) for s, n in zip(shapes, needed, strict=True))


def _save_for_sequence(ctx, inputs, output):
    logits, targets = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits, targets, output[1])


def _sequence_gradient(ctx, grad, _stats):
    if grad is None:
        return None, None
    return torch.ops.cca_ds.sequence_logp_backward(grad, *ctx.saved_tensors), None


def _save_for_linear(ctx, inputs, output):
    hidden, weight, targets, bias, ctx.fp32, ctx.chunk_rows, keep, other, share = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    # the mixed logits are not computed again where their residual is kept, so `other` is not needed any more
    ctx.save_for_backward(
        hidden, weight, targets, bias, output[1], hidden if other is not None and keep else other, share
    )


def _linear_gradient(ctx, grad, _residual):
    if grad is None:
        return (None,) * 9
    needed = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    *saved, other, share = ctx.saved_tensors
    gradients = torch.ops.cca_ds.linear_sequence_logp_backward(
        grad, *saved, ctx.fp32, ctx.chunk_rows, needed, other, share
    )
    hidden, weight, bias = (g if n else None for g, n in zip(gradients, needed, strict=True))
    return hidden, weight, None, bias, *(None,) * 5


def _register() -> None:
    fake, differentiate = torch.library.register_fake, torch.library.register_autograd
    fake("cca_ds::sequence_logp", _fake_sequence_logp)
    fake("cca_ds::sequence_logp_backward", lambda grad, logits, targets, stats: logits.new_empty(logits.shape))
    fake("cca_ds::linear_sequence_logp", _fake_linear_sequence_logp)
    fake("cca_ds::linear_sequence_logp_backward", _fake_linear_backward)
    differentiate("cca_ds::sequence_logp", _sequence_gradient, setup_context=_save_for_sequence)
    differentiate("cca_ds::linear_sequence_logp", _linear_gradient, setup_context=_save_for_linear)


if backend() != "torch":
    _register()


# ---- the two entry points ------------------------------------------------------------------------------------------


def _has_kernel(tensor: Tensor) -> bool:
    device = tensor.device.type
    return backend(device) != "torch" and tensor.dtype in _KERNEL_DTYPES.get(device, ())


def _check(rows_of: Tensor, targets_BL: Tensor, vocabulary: int) -> None:
    if targets_BL.is_floating_point() or targets_BL.dtype == torch.bool:
        raise ValueError(f"targets are {targets_BL.dtype}; give integers from 0 to {vocabulary - 1}")
    if rows_of.shape[:-1] != targets_BL.shape or targets_BL.dim() == 0:
        raise ValueError(
            f"targets of shape {list(targets_BL.shape)} do not match {list(rows_of.shape)}; "
            f"give [..., L] with [..., L, {rows_of.shape[-1]}]"
        )
    if targets_BL.device != rows_of.device:
        raise ValueError(f"targets are on {targets_BL.device}, the others on {rows_of.device}; move them there")
    if os.environ.get("CCA_DS_DEBUG") and targets_BL.is_cuda and targets_BL.numel():  # waits for the GPU
        low, high = targets_BL.min().item(), targets_BL.max().item()
        if low < 0 or high >= vocabulary:
            raise ValueError(f"targets from {low} to {high} lie outside the vocabulary of {vocabulary}")


def _checked_mix(
    hidden_BLD: Tensor, targets_BL: Tensor, mixed: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """`mixed` without gradients, `other` in the dtype of hidden. Raises ValueError for shapes that do not match."""
    if mixed is None:
        return None, None
    other_BLD, share_B = mixed
    if other_BLD.shape != hidden_BLD.shape or share_B.shape != targets_BL.shape[:-1]:
        raise ValueError(
            f"mixed hidden states of shape {list(other_BLD.shape)} with shares {list(share_B.shape)} do not match "
            f"{list(hidden_BLD.shape)}; give the same shape, and one share a sequence"
        )
    return other_BLD.detach().to(hidden_BLD.dtype), share_B.detach()


def sequence_logp(logits_BLV: Tensor, targets_BL: Tensor) -> Tensor:
    """log p of each sequence from its logits.

    logits [B, L, V] bf16, fp16, fp32 or fp64; targets [B, L] integers in [0, V). Returns [B], nats, float32
    (float64 from float64), differentiable in the logits. A target outside the vocabulary is a ValueError on a CPU;
    on a GPU it gives NaN, and a ValueError with CCA_DS_DEBUG=1. A row with NaN or +inf makes its sequence NaN.
    """
    _check(logits_BLV, targets_BL, logits_BLV.shape[-1])
    if not _has_kernel(logits_BLV):
        return sequence_logp_eager(logits_BLV, targets_BL)
    return torch.ops.cca_ds.sequence_logp(logits_BLV, targets_BL)[0]


def linear_sequence_logp(
    hidden_BLD: Tensor,
    weight_VD: Tensor,
    targets_BL: Tensor,
    bias: Tensor | None = None,
    mixed: tuple[Tensor, Tensor] | None = None,
    *,
    accumulate: str = "fp32",
    chunk_rows: int | None = None,
) -> Tensor:
    """log p of each sequence from the last hidden states and the output head's weight (and bias).

    hidden [B, L, D], weight [V, D], bias [V], of one dtype (under autocast, its dtype); targets [B, L] integers in
    [0, V). Returns [B], nats, float32 (float64 from float64), differentiable in hidden, weight and bias.

    `mixed`: (other [B, L, D], share t [B]): the logits are t head(hidden) + (1 - t) head(other), and the second term is
    a constant: nothing is differentiated through `other`, and weight and bias get gradients through `hidden` alone.
    `accumulate`: "fp32" keeps the logits in float32 up to the softmax; "native" rounds them to the inputs' dtype.
    `chunk_rows`: saves memory: at most so many rows of logits at once, computed again in the backward. By default the
    forward keeps onehot - softmax [N, V] in the inputs' dtype for the backward, which then costs two matmuls; without
    gradients nothing is kept. Errors are those of `sequence_logp`.
    """
    _check(hidden_BLD, targets_BL, weight_VD.shape[0])
    if accumulate not in ACCUMULATE:
        raise ValueError(f"accumulate={accumulate!r} is not known; choose one of {', '.join(ACCUMULATE)}")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows={chunk_rows} is too few; give 1 or more, or None")
    device = hidden_BLD.device.type
    if torch.is_autocast_enabled(device) and hidden_BLD.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        hidden_BLD, weight_VD = hidden_BLD.to(dtype), weight_VD.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    other_BLD, share_B = _checked_mix(hidden_BLD, targets_BL, mixed)
    if {t.dtype for t in (weight_VD, bias) if t is not None} != {hidden_BLD.dtype}:
        dtypes = ", ".join(str(t.dtype) for t in (hidden_BLD, weight_VD, bias) if t is not None)
        raise ValueError(f"hidden, weight and bias are {dtypes}; cast them to one dtype, or use autocast")
    with torch.autocast(device, enabled=False):
        if not _has_kernel(hidden_BLD):
            return linear_sequence_logp_eager(hidden_BLD, weight_VD, targets_BL, bias, mixed, accumulate=accumulate)
        inputs = (hidden_BLD, weight_VD, bias)
        keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
        return torch.ops.cca_ds.linear_sequence_logp(
            hidden_BLD, weight_VD, targets_BL, bias, accumulate == "fp32", chunk_rows or 0, keep and chunk_rows is None,
            other_BLD, share_B,
        )[0]  # fmt: skip
