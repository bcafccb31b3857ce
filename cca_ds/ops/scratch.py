"""Reused memory for the temporary results of a training step on a CPU."""

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from cca_ds.ops.library import has_kernel


class Scratch(threading.local):
    """Buffers by use and dtype, one set per thread.

    A temporary buffer that is freed between tensors that stay leaves a hole that fragments the heap; one that is kept
    for the next call does not.
    """

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, use: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """An uninitialised tensor of `shape` with the dtype and device of `like`.

        It reuses the memory of the last call with the same `use` and dtype, unless a tensor still refers to that.
        """
        if not has_kernel(like):
            return like.new_empty(shape)
        size, key = math.prod(shape), (use, like.dtype)
        buffer = self.buffers.get(key)
        if buffer is None or len(buffer) < size or torch.ops.cca_ds.owners(buffer) > 1:
            with torch.inference_mode(False):  # a buffer made while sampling is used in training too
                buffer = self.buffers[key] = torch.empty(size, dtype=like.dtype)
        return buffer[:size].view(shape)


scratch = Scratch()
