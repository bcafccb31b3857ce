"""What ended a rank, in one line that says who, what and what to do."""

from __future__ import annotations

import errno
import re

import torch

from cca_ds.cluster.launchers import Ranks
from cca_ds.config.schema import RunConfig
from cca_ds.files import FULL

_CPU_OUT_OF_MEMORY = re.compile(r"can't allocate memory|not enough memory|std::bad_alloc")
_LOST = re.compile(
    r"[Cc]onnection (closed|reset|refused)|Socket closed|Broken pipe|remote process exited|NCCL"
)
_WORKER_DIED = re.compile(
    r"DataLoader worker \(pid\(?s?\)? ([\d, ]+)\)? (exited unexpectedly|is killed by signal: \w+)"
)


def explain(error: BaseException, run: RunConfig, ranks: Ranks) -> str:
    """One line: rank and host, then the error with its remedy where it has one."""
    text = " ".join(str(error).split()) or type(error).__name__
    if is_out_of_memory(error):
        text = _out_of_memory(error, run)
    elif died := _WORKER_DIED.search(text):
        text = (
            f"data-loader worker {died[1].strip()} {died[2]}; start again to continue from the last checkpoint, "
            "with a smaller data.workers or data.prefetch if memory was short"
        )
    elif isinstance(error, OSError) and error.errno in (errno.EROFS, *FULL):
        text = _unwritable(error)
    elif not isinstance(error, ValueError):
        text = f"{type(error).__name__}: {text}"
    return f"rank {ranks.rank} on {ranks.host}: {text}"


def is_out_of_memory(error: BaseException) -> bool:
    """On a GPU, or of the host."""
    by_type = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return by_type or (isinstance(error, RuntimeError) and bool(_CPU_OUT_OF_MEMORY.search(str(error))))


def lost_connection(error: BaseException) -> bool:
    """Whether a collective failed because another rank's process went away."""
    return isinstance(error, RuntimeError) and bool(_LOST.search(str(error)))


def _unwritable(error: OSError) -> str:
    name = error.filename or "a file of the run"
    fault = "not writable" if error.errno == errno.EROFS else "no space left"
    mend = "make it writable" if error.errno == errno.EROFS else "free some"
    return f"{name}: {fault} ({error.strerror}); {mend} and start again to continue from the last checkpoint"


def _out_of_memory(error: BaseException, run: RunConfig) -> str:
    micro = run.batch.micro_size
    if micro > 1:
        return (
            f"out of memory with batch.micro_size={micro}; batch.micro_size={micro // 2} needs about half the "
            "activations (the trajectory stays the same), as does model.activation_checkpointing=true"
        )
    return (
        "out of memory with batch.micro_size=1; set model.activation_checkpointing=true, use "
        "ds_configs/zero3_offload.json, reference.placement=cached, or more ranks"
    )
