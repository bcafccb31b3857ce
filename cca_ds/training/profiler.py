"""What a run is looked into by: a trace of some steps, the history of a GPU's memory, and reproducible arithmetic.

profile/rank_NNNNN.json           torch.profiler's trace, for chrome://tracing or ui.perfetto.dev
profile/memory_rank_NNNNN.pickle  the allocator's snapshot, for pytorch.org/memory_viz
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch

from cca_ds.cluster.failures import is_out_of_memory

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else its library prints every start and stop

Batches = TypeVar("Batches")

_MOST_EVENTS = 100_000  # allocations that a snapshot looks back on


def profiled(
    steps: Iterable[tuple[int, Batches]], traced: tuple[int, int], folder: Path, rank: int, memory: bool = False
) -> Iterator[tuple[int, Batches]]:
    """Pass steps through and trace those from `traced[0]` to `traced[1]`, counted from 1.

    Args:
        steps: (index from 0, batches); what is done between two of them is a step.
        folder: of the run; the trace is there once its last step is over. A run that ends before, or is continued
            behind the first, leaves none.
        memory: write a snapshot of the GPU's memory beside it, see `memory_history`.
    """
    profiler: torch.profiler.profile | None = None
    for step, batches in steps:
        if step + 1 == traced[0]:
            profiler = torch.profiler.profile(record_shapes=True, with_stack=False)
            profiler.start()
        yield step, batches
        if profiler is not None and step + 1 == traced[1]:
            profiler.stop()
            (folder / "profile").mkdir(exist_ok=True)
            profiler.export_chrome_trace(str(folder / "profile" / f"rank_{rank:05d}.json"))
            if memory:
                _write_snapshot(folder, rank)


@contextmanager
def memory_history(recorded: bool, folder: Path, rank: int) -> Iterator[None]:
    """Record the allocations of this rank's GPU within the block, with their stacks, where `recorded`.

    A snapshot is written when memory runs out, and by `profiled`. It costs a few microseconds an allocation. Nothing
    happens without a GPU.
    """
    if not (recorded and torch.cuda.is_available()):
        yield
        return
    torch.cuda.memory._record_memory_history(max_entries=_MOST_EVENTS)
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            _write_snapshot(folder, rank)
        raise
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


def _write_snapshot(folder: Path, rank: int) -> None:
    if torch.cuda.is_available():
        (folder / "profile").mkdir(exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(folder / "profile" / f"memory_rank_{rank:05d}.pickle"))


def compute_deterministically() -> None:
    """The same bits from the same inputs on the same machine, at the cost of speed; an op that cannot is an error.

    cuBLAS also needs CUBLAS_WORKSPACE_CONFIG, set before a GPU is first used (`cca_ds/train.py`).
    """
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = False
