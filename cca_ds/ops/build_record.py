"""What setup.py built, as it wrote it into build.json beside the libraries. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path

FOLDER = Path(__file__).parent
UNKNOWN = {"kernels": "unknown", "torch": None, "summary": "no record of built kernels (cca_ds is not installed)"}


def read_record(folder: Path = FOLDER) -> dict[str, str | None]:
    """`kernels` (cuda, cpu, none), the version of `torch` that they are for, and a line `summary` with the reason."""
    try:
        return UNKNOWN | json.loads((folder / "build.json").read_text())
    except (OSError, ValueError, TypeError):
        return UNKNOWN


def kernels_built(folder: Path = FOLDER) -> str:
    """One line: which kernels were built and why no more."""
    return str(read_record(folder)["summary"])
