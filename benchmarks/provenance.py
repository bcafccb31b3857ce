"""Where a measured number comes from: command, date, commit and device. Every result file gets them from here."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import date
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results"
CODE = ("cca_ds", "csrc", "ds_configs", "benchmarks", ":!benchmarks/results")


def origin(command: str, device: str, day: str | None = None) -> dict[str, str]:
    """{"command", "date", "commit", "device"} of a result; `day` is today by default, YYYY-MM-DD."""
    return {"command": command, "date": day or today(), "commit": commit(), "device": device}


def today() -> str:
    """The date, YYYY-MM-DD."""
    return date.today().isoformat()


def commit(paths: tuple[str, ...] = CODE) -> str:
    """Short hash of the checked-out commit, with a star when tracked files under `paths` differ; "" without git."""
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", *paths)
    return _git("rev-parse", "--short", "HEAD") + ("*" if changed else "")


def processor() -> str:
    """The CPU's name."""
    information = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", information.read_text()) if information.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def cpu() -> str:
    """The CPU's name and its number of cores."""
    return f"{processor()}, {os.cpu_count()} cores"


def _git(*words: str) -> str:
    done = subprocess.run(["git", "-C", str(REPOSITORY), *words], capture_output=True, text=True)
    return done.stdout.strip()
