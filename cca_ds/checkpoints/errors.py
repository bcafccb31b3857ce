"""One-line errors for checkpoints that a full disk or a read-only folder does not let be written."""

import contextlib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from cca_ds.files import FORBIDDEN, FULL

# torch.save reports a file it cannot open or write as a RuntimeError of its zip writer, without an errno
_TORCH_SAVE = ("PytorchStreamWriter", "inline_container", "unexpected pos")
_ERRNO_OF_SAFETENSORS = re.compile(r"os error (\d+)")


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, or must not be read; the message names the file and the remedy."""


class StorageError(CheckpointError):
    """The disk is full or not writable: a failure of the machine, not of the input."""

    exit_code = 1


@contextlib.contextmanager
def clear_errors(folder: Path) -> Iterator[None]:
    """Turn what a full disk or a read-only folder raises, also in torch.save and safetensors, into a `StorageError`."""
    try:
        yield
    except OSError as error:
        raise StorageError(_explain(error, folder)) from error
    except SafetensorError as error:
        found = _ERRNO_OF_SAFETENSORS.search(str(error))
        number = int(found[1]) if found else errno.EIO
        raise StorageError(_explain(OSError(number, os.strerror(number)), folder)) from error
    except RuntimeError as error:
        if not any(mark in str(error) for mark in _TORCH_SAVE):
            raise
        if number := _errno_of_torch_save(str(error), folder):
            raise StorageError(_explain(OSError(number, os.strerror(number)), folder)) from error
        free = shutil.disk_usage(folder.parent).free / 2**20
        raise StorageError(
            f"checkpoint {folder}: torch.save could not write ({free:.0f} MiB free); free some space or "
            "lower checkpoint.keep_last; older checkpoints are untouched"
        ) from error


def _errno_of_torch_save(text: str, path: Path) -> int | None:
    """The errno behind a torch.save failure, from its text or from a file that is written beside it; None if unknown.

    A disk that is read-only since an error is not marked so: it refuses what is written.
    """
    if found := next((number for number in (*FORBIDDEN, *FULL) if os.strerror(number) in text), None):
        return found
    try:
        with tempfile.TemporaryFile(dir=path.parent) as file:
            file.write(b"written")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno
    return None


def _explain(error: OSError, folder: Path) -> str:
    if error.errno in FULL:
        return (
            f"checkpoint {folder}: no space left on the disk; free some or lower checkpoint.keep_last; "
            "older checkpoints are untouched"
        )
    if error.errno in FORBIDDEN:
        return (
            f"checkpoint {folder}: not writable ({error.strerror}); make it writable and start again to continue "
            "from the last checkpoint, or choose another --output; older checkpoints are untouched"
        )
    named = f" ({error.filename})" if error.filename else ""
    return (
        f"checkpoint {folder}: {error.strerror or error}{named}; start again to continue from the last checkpoint once "
        "its disk answers; older checkpoints are untouched"
    )
