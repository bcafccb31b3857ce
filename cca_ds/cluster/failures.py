"""The one place where a command's errors end: one line with the rank, the cause and the remedy, and an exit code.

    if __name__ == "__main__":
        sys.exit(run_command("sample", lambda: sample(...)))

Exit codes: 0 done, 1 a failure of the machine or of the program (starting again may help), 2 bad input (it will not),
130 interrupted. The traceback goes to the rank's log, and to the console with CCA_DS_TRACEBACK=1.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import sys
import traceback
from collections.abc import Callable

from cca_ds.cluster.job_state import note_end
from cca_ds.files import FAILING, FULL

BAD_INPUT, FAILURE, INTERRUPTED = 2, 1, 130
_CPU_OUT_OF_MEMORY = re.compile(r"can't allocate memory|not enough memory|std::bad_alloc")
_LOST = re.compile(r"[Cc]onnection (closed|reset|refused)|Socket closed|Broken pipe|remote process exited|NCCL")
_WORKER_RAISED = re.compile(r"Caught \w+ in DataLoader worker process \d+")
_WORKER_DIED = re.compile(
    r"DataLoader worker \(pid\(?s?\)? ([\d, ]+)\)? (exited unexpectedly|is killed by signal: \w+)"
)


def run_command(name: str, work: Callable[[], int | None]) -> int:
    """Run a command's work; any exception becomes one line on stderr and an exit code.

    Args:
        name: of the command, which begins the line.
        work: returns the exit code, None for 0.

    Returns:
        The exit code.
    """
    try:
        if sys.stdout is None:
            sys.stdout = _ClosedOutput()
        code = work() or 0
        sys.stdout.flush()  # a disk that is full is an error of the command, not of the interpreter's end
        return code
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except SystemExit:
        raise  # argparse has printed its line
    except BaseException as error:
        report_error(name, error)
        _give_up_output()
        return exit_code(error)


def _give_up_output() -> None:
    """Drop what standard output does not take: some Pythons try again at their end, and print a second error."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _ClosedOutput(io.TextIOBase):
    """In place of a standard output that was closed (`>&-`), to which Python prints nothing and reports nothing."""

    def __init__(self) -> None:
        self._lost = 0

    def write(self, text: str) -> int:
        self._lost += len(text)
        return len(text)

    def flush(self) -> None:
        lost, self._lost = self._lost, 0
        if lost:
            raise OSError(f"standard output is closed, and {lost} characters for it are lost")


def report_error(name: str, error: BaseException) -> None:
    """Print the error's line, behind its traceback with CCA_DS_TRACEBACK=1."""
    if os.environ.get("CCA_DS_TRACEBACK"):
        traceback.print_exception(error)
    problems = getattr(error, "problems", None)  # of a ConfigError, which names itself
    message = str(error) if problems else f"{name}: {explain_error(error)}"
    note_end(exit_code(error), message)
    print(message, file=sys.stderr, flush=True)


def exit_code(error: BaseException) -> int:
    """2 for bad input (ValueError) and 1 for all else, unless the error has an `exit_code` of its own."""
    return getattr(error, "exit_code", BAD_INPUT if isinstance(error, ValueError) else FAILURE)


def explain_error(error: BaseException, micro_size: int | str | None = None) -> str:
    """An error in one line, with its remedy where there is one.

    Args:
        micro_size: the run's batch.micro_size, for advice when memory is short.
    """
    text = str(error)
    if _WORKER_RAISED.match(text):  # torch puts the worker's traceback before the message
        text = text.strip().splitlines()[-1].partition(": ")[2]
    text = " ".join(text.split()) or type(error).__name__
    if is_out_of_memory(error):
        return _out_of_memory(micro_size)
    if died := _WORKER_DIED.search(text):
        return (
            f"data-loader worker {died[1].strip()} {died[2]}; start again to continue from the last checkpoint, "
            "with a smaller data.workers or data.prefetch if memory was short"
        )
    if isinstance(error, OSError):
        return _explain_os_error(error, text)
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


def is_out_of_memory(error: BaseException) -> bool:
    """On a GPU, or of the host."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, without importing it
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:  # a file that is mapped, a worker that is forked
        return True
    return isinstance(error, RuntimeError) and bool(_CPU_OUT_OF_MEMORY.search(str(error)))


def lost_connection(error: BaseException) -> bool:
    """Whether a collective failed because another rank's process went away."""
    return isinstance(error, RuntimeError) and bool(_LOST.search(str(error)))


def _explain_os_error(error: OSError, text: str) -> str:
    name = error.filename or "a file of the run"
    if error.errno == errno.EROFS:
        return f"{name}: not writable ({error.strerror}); make it writable and start again to continue"
    if error.errno in FULL:
        return f"{name}: no space left ({error.strerror}); free some and start again to continue"
    if error.errno in FAILING:
        return f"{name}: {error.strerror}; start again to continue once its disk answers"
    return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else text


def _out_of_memory(micro_size: int | str | None) -> str:
    if micro_size is None:
        return "out of memory; use a smaller batch or model, or a machine with more"
    if isinstance(micro_size, str):
        return (
            f"out of memory with batch.micro_size={micro_size}; set it to a number below the one in the run's first "
            "lines (the trajectory stays the same), or model.activation_checkpointing=true"
        )
    if micro_size > 1:
        return (
            f"out of memory with batch.micro_size={micro_size}; batch.micro_size={micro_size // 2} needs about half "
            "the activations (the trajectory stays the same), as does model.activation_checkpointing=true"
        )
    return (
        "out of memory with batch.micro_size=1; set model.activation_checkpointing=true, use "
        "ds_configs/zero3_offload.json, reference.placement=cached, or more ranks"
    )
