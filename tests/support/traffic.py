"""Bytes that a function's operations read and write, by kind: of eager PyTorch, and as torch.compile fuses them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor
from torch._inductor import metrics
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MATMULS = ("mm", "addmm", "bmm", "baddbmm")


def tensor_bytes(tree: object) -> int:
    """Of the elements of all tensors of a tree, an expanded dimension counted once."""
    total = 0
    for part in tree_leaves(tree):
        if isinstance(part, Tensor):
            sizes = [n for n, step in zip(part.shape, part.stride(), strict=True) if step or n == 1]
            total += math.prod(sizes) * part.element_size()
    return total


class EagerTraffic(TorchDispatchMode):
    """Counts `bytes["matmuls" | "attention" | "element-wise"]` of what runs within it, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.by_op: Counter[str] = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        name = op._schema.name.removeprefix("aten::")
        if op.is_view or name in ("detach", "empty", "empty_like", "new_empty", "empty_strided", "_unsafe_view"):
            return result
        kind = "matmuls" if name in MATMULS else "attention" if "attention" in name else "element-wise"
        if op._schema.is_mutable:  # the result is an argument
            moved = tensor_bytes((args, kwargs)) + tensor_bytes(result if "copy_" not in name else ())
            moved -= tensor_bytes(args[0]) if name in ("copy_", "fill_", "zero_", "bernoulli_") else 0
            moved += tensor_bytes(args[0]) if name == "copy_" else 0
        else:
            moved = tensor_bytes((args, kwargs)) + tensor_bytes(result)
        self.bytes[kind] += moved
        self.by_op[name] += moved
        return result


def compiled_traffic(function: Callable[..., Tensor], *inputs: Tensor) -> Counter[str]:
    """Inductor's own count of a compiled function's bytes, forward and backward together, by the same kinds."""
    torch._dynamo.reset()
    metrics.reset()

    def inner(graph, *rest, **more):
        compile_fx_inner(graph, *rest, **more)
        return graph

    compiled = torch.compile(function, fullgraph=True, backend=lambda g, x: compile_fx(g, x, inner_compile=inner))
    compiled(*inputs).sum().backward()
    found: Counter[str] = Counter()
    for node, count in metrics.nodes_num_elem:
        name = type(node).__name__
        found[name] += count
    found["total"] = metrics.num_bytes_accessed
    return found
