"""Files and folders that are whole or absent, on the disk when a call returns; and their hashes.

Everything that must survive a kill is written through this file.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FAILING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT)  # disks and file servers, not files
FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EACCES)  # of file systems without them


def expand(path: str | Path) -> Path:
    """The path with a leading ~ or ~user replaced. Raises ValueError where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(f"{path}: there is no such user") from None


def partial_name(path: Path) -> Path:
    """A hidden sibling to write a file or folder under before it gets its name; no two writers share it."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Give errors of open files, which name none, the path that the block writes."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` at the end of the block: fsynced, then renamed over it.

    When the block raises, `path` is as before and the partial file is gone. For writers that want a path; see
    `write_streamed` for those that want an open file.
    """
    path = Path(path)
    partial = partial_name(path)
    try:
        with naming(path):
            yield partial
            with open(partial, "rb+") as file:
                os.fsync(file.fileno())
            _rename_durably(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_streamed(path: str | Path, write: Callable[[BinaryIO], Any]) -> Path:
    """Write a file whole or not at all; `write` gets it open, so the content need not fit into memory.

    Returns:
        `path`. Raises OSError and leaves `path` as it was.
    """
    path = Path(path)
    with atomic_path(path) as partial, open(partial, "xb") as file:
        write(file)
    return path


def write_atomic(path: str | Path, content: str | bytes) -> None:
    """Write a file whole or not at all. Raises OSError and leaves `path` as it was."""
    data = content.encode() if isinstance(content, str) else content
    write_streamed(path, lambda file: file.write(data))


def write_new(path: str | Path, content: str) -> bool:
    """Write a file whole, unless there is one: of several writers, on network file systems too, one succeeds.

    Returns:
        Whether this call made the file. Raises OSError.
    """
    path = Path(path)
    partial = partial_name(path)
    try:
        with open(partial, "x") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(partial, path)
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            with open(path, "x") as file:
                file.write(content)
        sync_folder(path.parent)
    except FileExistsError:
        return False
    finally:
        partial.unlink(missing_ok=True)
    return True


def save_safetensors(tensors: Mapping[str, Any], path: str | Path, metadata: dict[str, str] | None = None) -> None:
    """`safetensors.torch.save_file` with the permissions of any new file: its own lets nobody but the owner read."""
    from safetensors.torch import save_file  # imports torch

    save_file(dict(tensors), path, metadata)
    with open(partial_name(Path(path)), "xb") as plain:
        os.chmod(path, os.fstat(plain.fileno()).st_mode & 0o777)
    os.unlink(plain.name)


def _rename_durably(partial: Path, path: Path) -> None:
    """Rename a file and sync its folder, which is opened first: another rank may rename the folder at once."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.replace(partial, path)
        os.fsync(folder)
    finally:
        os.close(folder)


def sync_folder(folder: str | Path) -> None:
    """Force a folder's names to the disk: fsync of a file does not cover its name. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with naming(folder):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def describe_file(path: Path, *, sync: bool) -> dict[str, Any]:
    """{"size": bytes, "sha256": hexadecimal} of a file; `sync` first forces its bytes to the disk."""
    with naming(path), open(path, "rb") as file:
        if sync:
            os.fsync(file.fileno())
        size = os.fstat(file.fileno()).st_size
        return {"size": size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def file_hash(path: str | Path) -> str:
    """sha256 of a file, in hexadecimal."""
    return describe_file(Path(path), sync=False)["sha256"]


def appears(folder: Path, seconds: float = 10.0) -> bool:
    """Whether `folder` is there within so many seconds; network file systems show new folders late."""
    end = time.monotonic() + seconds
    while not folder.is_dir():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True
