"""CUDA graphs: a function of fixed shapes, recorded once on a GPU and replayed with a single launch."""

from collections.abc import Callable, Hashable

import torch
from torch import Tensor


def has_graphs(x: Tensor) -> bool:
    """Whether the device of `x` can replay graphs."""
    return x.is_cuda


class GraphCache:
    """One CUDA graph per key. On devices without graphs every call runs the function."""

    def __init__(self) -> None:
        self.graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def run(self, key: Hashable, function: Callable[[], Tensor], device: torch.device) -> Tensor:
        """The result of `function`, which must read and write the same tensors at every call with this key.

        On a GPU the first call records the graph and the later ones replay it: the result is then the same tensor,
        overwritten, each time.
        """
        if device.type != "cuda":
            return function()
        if key not in self.graphs:
            self.graphs[key] = _record(function)
        graph, result = self.graphs[key]
        graph.replay()
        return result


def _record(function: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # initialisations at the first calls must not be recorded
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # other threads, NCCL's watchdog among them, may query their events meanwhile
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = function()
    return graph, result
