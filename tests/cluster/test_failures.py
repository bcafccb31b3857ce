"""One line for what ended a rank: who, what, and what to do."""

import errno

import pytest
import torch

from cca_ds.cluster.failures import explain, is_out_of_memory
from cca_ds.cluster.launchers import Ranks
from cca_ds.config.recipes import load_recipe

RANKS = Ranks(3, 1, 4, 2, 1, "node7", "cpu", "torchrun")


def told(error, *overrides):
    line = explain(error, load_recipe("digits", list(overrides)), RANKS)
    assert "\n" not in line and line.startswith("rank 3 on node7: ")
    return line


def really_out_of_memory():
    try:
        torch.empty(1 << 50)
    except RuntimeError as error:
        return error


def test_out_of_memory_names_the_micro_batch_that_would_fit():
    for error in (really_out_of_memory(), MemoryError(), torch.OutOfMemoryError("CUDA out of memory")):
        assert is_out_of_memory(error)
        line = told(error, "batch.micro_size=32")
        assert "batch.micro_size=32; batch.micro_size=16 needs about half" in line
    assert "zero3_offload" in told(MemoryError(), "batch.micro_size=1")


@pytest.mark.parametrize(
    ("text", "worker"),
    [
        (
            "DataLoader worker (pid 123) is killed by signal: Killed. ",
            "worker 123 is killed by signal: Killed",
        ),
        ("DataLoader worker (pid(s) 12, 13) exited unexpectedly", "worker 12, 13 exited unexpectedly"),
    ],
)
def test_a_dead_worker_is_told_apart(text, worker):
    line = told(RuntimeError(text))
    assert f"data-loader {worker}; start again" in line and not is_out_of_memory(RuntimeError(text))


def test_users_errors_stand_alone_and_others_with_their_kind():
    assert told(ValueError("lower it")) == "rank 3 on node7: lower it"
    assert told(RuntimeError("two\nlines")) == "rank 3 on node7: RuntimeError: two lines"
    assert told(KeyError()) == "rank 3 on node7: KeyError: KeyError"


def test_a_disk_that_cannot_be_written_names_the_file_and_the_remedy():
    line = told(OSError(errno.EROFS, "Read-only file system", "/runs/a/metrics.jsonl"))
    assert line.endswith("node7: /runs/a/metrics.jsonl: not writable (Read-only file system); make it writable and "
                         "start again to continue from the last checkpoint")  # fmt: skip
    assert "no space left (No space left on device); free some" in told(
        OSError(errno.ENOSPC, "No space left on device")
    )
    assert told(OSError(errno.EACCES, "Permission denied")).endswith("[Errno 13] Permission denied")
