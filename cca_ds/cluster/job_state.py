"""What one attempt of a job leaves for the next: files in the folder that slurm/common.sh names in CCA_JOB_STATE.

    ended      exit status and message of the rank that failed first
    exclude    nodes to leave out from the next attempt on, one a line

Without that variable nothing is written.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from cca_ds.files import write_atomic, write_new

VARIABLE = "CCA_JOB_STATE"


def note_end(status: int, message: str) -> None:
    """Write down why this process ends; of several ranks the first one's word counts."""
    if folder := os.environ.get(VARIABLE):
        with contextlib.suppress(OSError):  # what made the run fail is worth more than this
            write_new(Path(folder, "ended"), f"{status} {' '.join(message.split())}\n")


def note_faulty(hosts: Iterable[str]) -> None:
    """Add nodes that failed, or lag far behind, to those that the next attempt leaves out."""
    if folder := os.environ.get(VARIABLE):
        path = Path(folder, "exclude")
        with contextlib.suppress(OSError):
            before = path.read_text().split() if path.is_file() else []
            write_atomic(path, "".join(f"{host}\n" for host in sorted({*before, *hosts})))
