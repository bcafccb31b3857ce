"""One line for what ended a rank: who, what, and what to do."""

import errno

import pytest
import torch

from cca_ds.cluster.failures import exit_code, explain_error, is_out_of_memory, run_command


def line_of(error, micro_size=None):
    line = explain_error(error, micro_size)
    assert "\n" not in line
    return line


def really_out_of_memory():
    try:
        torch.empty(1 << 50)
    except RuntimeError as error:
        return error


def test_out_of_memory_names_the_micro_batch_that_would_fit():
    no_fork = OSError(errno.ENOMEM, "Cannot allocate memory")
    for error in (really_out_of_memory(), MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), no_fork):
        assert is_out_of_memory(error)
        line = line_of(error, 32)
        assert "batch.micro_size=32; batch.micro_size=16 needs about half" in line
    assert "zero3_offload" in line_of(MemoryError(), 1)


@pytest.mark.parametrize(
    ("text", "worker"),
    [
        ("DataLoader worker (pid 123) is killed by signal: Killed. ", "worker 123 is killed by signal: Killed"),
        ("DataLoader worker (pid(s) 12, 13) exited unexpectedly", "worker 12, 13 exited unexpectedly"),
    ],
)
def test_a_dead_worker_is_told_apart(text, worker):
    line = line_of(RuntimeError(text))
    assert f"data-loader {worker}; start again" in line and not is_out_of_memory(RuntimeError(text))


def test_users_errors_stand_alone_and_others_with_their_kind():
    assert line_of(ValueError("lower it")) == "lower it"
    assert line_of(RuntimeError("two\nlines")) == "RuntimeError: two lines"
    assert line_of(KeyError()) == "KeyError: KeyError"


def test_a_disk_that_cannot_be_written_names_the_file_and_the_remedy():
    line = line_of(OSError(errno.EROFS, "Read-only file system", "/runs/a/metrics.jsonl"))
    assert (line == "/runs/a/metrics.jsonl: not writable (Read-only file system); make it writable and "
                    "start again to continue")  # fmt: skip
    assert "no space left (No space left on device); free some" in line_of(
        OSError(errno.ENOSPC, "No space left on device")
    )
    assert (
        line_of(OSError(errno.EIO, "Input/output error", "/runs/a/metrics.jsonl"))
        == "/runs/a/metrics.jsonl: Input/output error; start again to continue once its disk answers"
    )
    assert line_of(OSError(errno.EACCES, "Permission denied")).endswith("[Errno 13] Permission denied")


def test_the_exit_code_tells_bad_input_from_failures():
    assert exit_code(ValueError()) == 2 and exit_code(OSError()) == exit_code(RuntimeError()) == 1

    class Transient(ValueError):
        exit_code = 1

    assert exit_code(Transient()) == 1


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("lower it"), 2, "sample: lower it\n"),
        (KeyError("x"), 1, "sample: KeyError: 'x'\n"),
        (RecursionError("too deep"), 1, "sample: RecursionError: too deep\n"),
        (KeyboardInterrupt(), 130, "sample: interrupted\n"),
    ],
)
def test_a_command_ends_every_error_in_one_line(capsys, monkeypatch, error, code, line):
    monkeypatch.delenv("CCA_DS_TRACEBACK", raising=False)

    def work():
        raise error

    assert run_command("sample", work) == code
    assert capsys.readouterr().err == line


def test_a_command_returns_its_own_code_and_shows_a_traceback_when_asked(capsys, monkeypatch):
    assert run_command("plan", lambda: None) == 0 and run_command("plan", lambda: 3) == 3
    monkeypatch.setenv("CCA_DS_TRACEBACK", "1")
    assert run_command("plan", lambda: 1 // 0) == 1
    assert "Traceback" in capsys.readouterr().err
