"""A file system of a few MiB, to fill."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def mounted_disk(folder: Path, mib: int) -> Iterator[Path]:
    """`folder`/disk, a tmpfs of `mib` MiB; skips where this process may not mount one."""
    disk, mount = folder / "disk", shutil.which("mount")
    disk.mkdir()
    if os.geteuid() != 0 or not mount:
        pytest.skip("mounting a small disk needs root")
    if subprocess.run([mount, "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("this machine does not allow mounting")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
