"""Files that are on the disk when the call returns, and clear errors when they cannot be."""

import contextlib
import errno
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)
# torch.save reports a file it cannot open or write as a RuntimeError of its zip writer, without an errno
_TORCH_SAVE = ("PytorchStreamWriter", "inline_container", "unexpected pos")


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, or must not be read; the message names the file and the remedy."""


@contextlib.contextmanager
def clear_errors(folder: Path) -> Iterator[None]:
    """Turn what a full disk or a read-only folder raises, in torch.save too, into one `CheckpointError`."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(_explain(error, folder)) from error
    except RuntimeError as error:
        if not any(mark in str(error) for mark in _TORCH_SAVE):
            raise
        if number := _errno_of_torch_save(str(error), folder):
            raise CheckpointError(_explain(OSError(number, os.strerror(number)), folder)) from error
        free = shutil.disk_usage(folder.parent).free / 2**20
        raise CheckpointError(
            f"checkpoint {folder}: torch.save could not write ({free:.0f} MiB free); free some space or "
            "lower checkpoint.keep_last; older checkpoints are untouched"
        ) from error


def describe_file(path: Path, *, sync: bool) -> dict[str, Any]:
    """Size in bytes and sha256; `sync` first forces the bytes to the disk."""
    with open(path, "rb") as file:
        if sync:
            os.fsync(file.fileno())
        size = os.fstat(file.fileno()).st_size
        return {"size": size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def write_text(path: Path, text: str) -> None:
    """Whole or not at all, and on the disk when it returns, even if the folder is renamed meanwhile."""
    beside = path.with_name(path.name + ".tmp")
    with open(beside, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    handle = os.open(path.parent, os.O_RDONLY)  # before the name appears: another rank may act on it at once
    try:
        os.replace(beside, path)
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """Force a folder's entries to the disk: fsync of a file does not cover its name."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def appears(folder: Path, seconds: float = 10.0) -> bool:
    """Whether `folder` is there; a network file system may show another node's new folder late."""
    end = time.monotonic() + seconds
    while not folder.is_dir():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def _errno_of_torch_save(text: str, path: Path) -> int | None:
    """What kept torch.save from writing, where it says so or the file system shows it."""
    if os.statvfs(path.parent).f_flag & os.ST_RDONLY:
        return errno.EROFS
    return next((number for number in (*FORBIDDEN, *FULL) if os.strerror(number) in text), None)


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
    return f"checkpoint {folder}: {error.strerror or error} ({error.filename})"
