"""SwiGLU (arXiv 2002.05202) with the linear layer that follows it. Legend: R rows, F hidden width, D output width."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cca_ds.ops.library import has_kernel, register
from cca_ds.ops.linear import input_gradient, linear, matmul, weight_gradient
from cca_ds.ops.scratch import scratch


def swiglu_linear_eager(gate: Tensor, value: Tensor, weight_DF: Tensor) -> Tensor:
    """Plain version of `swiglu_linear`."""
    return F.linear(F.silu(gate) * value, weight_DF)


def swiglu_linear(gate: Tensor, value: Tensor, weight_DF: Tensor) -> Tensor:
    """(silu(gate) * value) W^T: two of [..., F] -> [..., D].

    On a CPU the backward keeps gate and value only and computes silu(gate) * value again.
    """
    if not has_kernel(gate) or gate.dtype != weight_DF.dtype:  # the latter: autocast
        return linear(F.silu(gate) * value, weight_DF)
    if not torch.is_grad_enabled():
        return linear(_swiglu(gate, value, torch.empty_like(gate, memory_format=torch.contiguous_format)), weight_DF)
    out_RD = _SwiGLULinear.apply(gate.flatten(0, -2), value.flatten(0, -2), weight_DF)
    return out_RD.unflatten(0, gate.shape[:-1])


def _swiglu(gate: Tensor, value: Tensor, out: Tensor) -> Tensor:
    """silu(gate) * value, written into `out`."""
    torch.ops.cca_ds.swiglu(gate, value, out)
    return out


class _SwiGLULinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_RF: Tensor, value_RF: Tensor, weight_DF: Tensor) -> Tensor:
        ctx.save_for_backward(gate_RF, value_RF, weight_DF)
        return matmul(_swiglu(gate_RF, value_RF, scratch.take("wide", gate_RF.shape, gate_RF)), weight_DF)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_RD: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        gate_RF, value_RF, weight_DF = ctx.saved_tensors
        grad_weight_DF = None
        if ctx.needs_input_grad[2]:
            product_RF = _swiglu(gate_RF, value_RF, scratch.take("wide", gate_RF.shape, gate_RF))
            grad_weight_DF = weight_gradient(grad_RD, product_RF)
        grad_product_RF = input_gradient(grad_RD, weight_DF)
        return *torch.ops.cca_ds.swiglu_backward(grad_product_RF, gate_RF, value_RF), grad_weight_DF


register("swiglu", lambda gate, value, out: None)
register("swiglu_backward", lambda grad, gate, value: (torch.empty_like(gate), torch.empty_like(gate)))
