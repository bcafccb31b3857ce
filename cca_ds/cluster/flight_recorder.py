"""NCCL's flight recorder: the last collectives of every rank, for the question which one was late.

PyTorch dumps it itself when a collective times out, which is twice the watchdog's limit: too late for a run that the
watchdog ends. What is written can be read with `torchfrtrace`, PyTorch's own analyser, which takes pickles, and by eye.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import torch

from cca_ds.cluster.launch import Ranks
from cca_ds.cluster.rank_logs import log_folder

_LIMIT_SECONDS = 5.0  # NCCL may hold the recorder's lock for ever


def dump_nccl_trace(ranks: Ranks, record: Callable[[], bytes] | None = None) -> Path | None:
    """Write this rank's recorded collectives as logs/nccl_trace_rank_N; None where there are none.

    Args:
        record: gives the pickled trace; None for PyTorch's own, which CUDA builds have.
    """
    own = getattr(torch._C._distributed_c10d, "_dump_nccl_trace", None) if ranks.device.startswith("cuda") else None
    record, folder = record or own, log_folder()
    if record is None or folder is None:
        return None
    path, written = folder / f"nccl_trace_rank_{ranks.rank}", threading.Event()

    def write() -> None:
        path.write_bytes(record())
        written.set()

    threading.Thread(target=write, daemon=True, name="nccl trace").start()
    return path if written.wait(_LIMIT_SECONDS) else None
