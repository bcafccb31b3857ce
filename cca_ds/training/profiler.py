"""A trace of some steps by torch.profiler, for chrome://tracing or ui.perfetto.dev: profile/rank_NNNNN.json."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import torch

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else its library prints every start and stop

Batches = TypeVar("Batches")


def profiled(
    steps: Iterable[tuple[int, Batches]], traced: tuple[int, int], folder: Path, rank: int
) -> Iterator[tuple[int, Batches]]:
    """Pass steps through and trace those from `traced[0]` to `traced[1]`, counted from 1.

    Args:
        steps: (index from 0, batches); what is done between two of them is a step.
        folder: of the run; the trace is there once its last step is over. A run that ends before, or is continued
            behind the first, leaves none.
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
