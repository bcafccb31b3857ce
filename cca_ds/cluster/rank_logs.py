"""Every rank's output in the run's folder, logs/rank_00000.log and on; rank 0's on the console as well."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from pathlib import Path
from typing import IO, TextIO

from cca_ds.cluster.launch import Ranks

_console: TextIO | None = None  # of a rank whose stderr is its log


def tell(line: str) -> None:
    """Say on stderr, and on the console too where stderr is a rank's log, what ended this rank."""
    if _console is not None:
        _console.write(f"{line}\n")
    with contextlib.suppress(OSError):  # the log may be on the disk that ended it
        print(line, file=sys.stderr, flush=True)


def keep_rank_log(folder: Path, ranks: Ranks) -> Path:
    """From here on this rank's stdout and stderr go to its file, appended; rank 0 keeps its console too.

    Other ranks still say on the console, in one line, what ended them.

    Returns:
        The log's path.
    """
    path = Path(folder) / "logs" / f"rank_{ranks.rank:05d}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a", buffering=1, errors="replace")  # noqa: SIM115 - lives as long as the process
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    file.write(
        f"=== {started} rank {ranks.rank} of {ranks.world_size} on {ranks.host}, pid {os.getpid()} ===\n"
    )
    if ranks.rank == 0:
        _replace_streams(_Tee(sys.stdout, file), _Tee(sys.stderr, file))
        return path
    global _console
    _console = console = os.fdopen(os.dup(2), "w", buffering=1, errors="replace")
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(file.fileno(), 1)  # what C++ libraries print comes along
    os.dup2(file.fileno(), 2)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)
    _say_the_end_on(console, ranks, path)
    return path


def _say_the_end_on(console: TextIO, ranks: Ranks, path: Path) -> None:
    previous = sys.excepthook

    def hook(kind, error, traceback) -> None:
        previous(kind, error, traceback)
        first_line = (str(error).splitlines() or [""])[0]
        console.write(f"rank {ranks.rank} on {ranks.host}: {kind.__name__}: {first_line} (see {path})\n")

    sys.excepthook = hook


def _replace_streams(out: _Tee, error: _Tee) -> None:
    """Python's streams, and the logging handlers that already hold the old ones."""
    replaced = {id(sys.stdout): out, id(sys.stderr): error}
    loggers = [logging.getLogger(), *logging.root.manager.loggerDict.values()]
    for logger in loggers:
        for handler in getattr(logger, "handlers", []):
            if isinstance(getattr(type(handler), "stream", None), property):
                continue  # logging's handler of last resort looks sys.stderr up by itself
            held = vars(handler).get("stream")  # a handler that looks sys.stderr up by itself holds none
            if id(held) in replaced:
                handler.setStream(replaced[id(held)])
    sys.stdout, sys.stderr = out, error


class _Tee:
    """A console stream whose finished lines are kept in a file too, as long as that can be written.

    A progress bar redraws its line after a carriage return: only its last state is kept.
    """

    def __init__(self, console: TextIO, file: IO[str]):
        self._console, self._file, self._line = console, file, ""

    def write(self, text: str) -> int:
        written = self._console.write(text)
        *lines, self._line = (self._line + text).split("\n")
        with contextlib.suppress(OSError):  # what the disk does not take is still on the console
            for line in lines:
                self._file.write(_last_state(line) + "\n")
        self._line = _last_state(self._line) if "\r" in self._line else self._line
        return written

    def __getattr__(self, name: str):
        return getattr(self._console, name)


def _last_state(line: str) -> str:
    states = [state for state in line.split("\r") if state]
    return states[-1] if states else ""
