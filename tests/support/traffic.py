"""Bytes that one block's element-wise operations read and write: of eager PyTorch, and as torch.compile fuses them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor import compile_fx, metrics
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_MATMULS = ("mm", "addmm", "bmm", "cca_ds_traffic::attention", "cca_ds_traffic::attention_backward")
_FREE = ("detach", "empty", "empty_like", "new_empty", "empty_strided", "_unsafe_view")


def tensor_bytes(tree: object) -> int:
    """Of the elements of all tensors of a tree, an expanded dimension counted once."""
    total = 0
    for part in tree_leaves(tree):
        if isinstance(part, Tensor):
            sizes = [n for n, step in zip(part.shape, part.stride(), strict=True) if step or n == 1]
            total += math.prod(sizes) * part.element_size()
    return total


class ElementWise(TorchDispatchMode):
    """Adds up the bytes of all that runs within it but matmuls, attention and views."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        name = op._schema.name.removeprefix("aten::")
        if not op.is_view and name not in (*_MATMULS, *_FREE):
            self.bytes += tensor_bytes((args, kwargs)) + tensor_bytes(result)
        return result


# A GPU has one kernel each for attention and RMSNorm, which PyTorch takes apart on the meta device.
@torch.library.custom_op("cca_ds_traffic::attention", mutates_args=())
def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Shapes of an attention."""
    return torch.empty_like(query)


@torch.library.custom_op("cca_ds_traffic::attention_backward", mutates_args=())
def attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes of its gradients."""
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


@torch.library.custom_op("cca_ds_traffic::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Shapes of a norm."""
    return torch.empty_like(x)


@torch.library.custom_op("cca_ds_traffic::rms_norm_backward", mutates_args=())
def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Shapes of its gradients."""
    return torch.empty_like(x), torch.empty_like(weight)


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


for op in (attention, attention_backward, rms_norm, rms_norm_backward):
    op.register_fake(op._init_fn)
attention.register_autograd(lambda ctx, grad: attention_backward(grad, *ctx.saved_tensors), setup_context=_keep)
rms_norm.register_autograd(lambda ctx, grad: rms_norm_backward(grad, *ctx.saved_tensors), setup_context=_keep)


@contextmanager
def kernels_of_a_gpu() -> Iterator[None]:
    """Attention and RMSNorm as one operation each."""
    with (
        mock.patch.object(F, "scaled_dot_product_attention", lambda q, k, v, *rest, **more: attention(q, k, v)),
        mock.patch.object(F, "rms_norm", lambda x, shape, weight, eps: rms_norm(x, weight)),
    ):
        yield


def eager_bytes(block: Callable[..., Tensor], x: Tensor, shared: Tensor) -> tuple[int, int]:
    """(forward, backward) of a block on the meta device, where every op runs its plain version."""
    with kernels_of_a_gpu():
        with ElementWise() as forward:
            out = block(x, shared)
        with ElementWise() as backward:
            out.backward(torch.empty_like(out))
    return forward.bytes, backward.bytes


def compiled_bytes(block: Callable[..., Tensor], x: Tensor, shared: Tensor) -> tuple[int, int]:
    """(forward, backward) by Inductor's own account of the kernels that it generates, matmuls and attention apart."""
    found = []

    def account(graph, *rest, **more):
        metrics.reset()
        compile_fx.compile_fx_inner(graph, *rest, **more)
        own = [words for node, words in metrics.nodes_num_elem if not any(n.is_extern() for n in node.get_nodes())]
        found.append(4 * sum(own))
        return graph  # which then runs eagerly

    def backend(graph, inputs):
        return compile_fx.compile_fx(graph, inputs, inner_compile=account)

    log = compile_fx.inductor_metrics_log  # Inductor counts when this log is on
    level = log.level
    torch._dynamo.reset()
    try:
        log.setLevel(logging.INFO)
        log.propagate, before = False, log.propagate
        with torch._inductor.config.patch(force_disable_caches=True), kernels_of_a_gpu():
            torch.compile(block, fullgraph=True, backend=backend)(x, shared).sum().backward()
    finally:
        log.setLevel(level)
        log.propagate = before
    forward, backward = found
    return forward, backward
