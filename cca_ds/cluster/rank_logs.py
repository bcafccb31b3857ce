"""Each rank's stdout and stderr go to logs/rank_NNNNN.log in the run's folder; rank 0 also prints to the console."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from pathlib import Path
from typing import IO, TextIO

from cca_ds.cluster.launch import Ranks

_console: TextIO | None = None  # the original stderr of a rank above 0, whose stderr is now its log
_log: TextIO | None = None  # this rank's log


def report_end(line: str) -> None:
    """Print the line that explains why this rank ended, on the console and in the rank's log."""
    on_console(line)
    with contextlib.suppress(OSError):  # the log may be on the disk that failed
        print(line, file=sys.stderr, flush=True)


def on_console(line: str) -> None:
    """Print a line on the console of a rank above 0, whose own stderr is its log; elsewhere do nothing."""
    if _console is not None:
        _console.write(f"{line}\n")


def log_folder() -> Path | None:
    """The folder of this rank's log; None before there is one."""
    return Path(_log.name).parent if _log is not None else None


def log_only(text: str) -> None:
    """Append text to this rank's log and to no console; without a log, do nothing."""
    if _log is not None:
        with contextlib.suppress(OSError):  # the disk may be full
            _log.write(text)


def keep_rank_log(folder: Path, ranks: Ranks) -> Path:
    """Append this rank's stdout and stderr to its log from now on; rank 0 prints to its console as well.

    The other ranks print to the console only an uncaught exception, as one line.

    Args:
        folder: of the run; the log is folder/logs/rank_NNNNN.log.

    Returns:
        The log's path.
    """
    path = Path(folder) / "logs" / f"rank_{ranks.rank:05d}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a", buffering=1, errors="replace")  # noqa: SIM115 - lives as long as the process
    global _console, _log
    _log = file
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    file.write(f"=== {started} rank {ranks.rank} of {ranks.world_size} on {ranks.host}, pid {os.getpid()} ===\n")
    if ranks.rank == 0:
        _replace_streams(_Tee(sys.stdout, file), _Tee(sys.stderr, file))
        return path
    _console = console = os.fdopen(os.dup(2), "w", buffering=1, errors="replace")
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(file.fileno(), 1)  # file descriptors: output of C++ libraries is included
    os.dup2(file.fileno(), 2)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)
    _report_exceptions_on(console, ranks, path)
    return path


def _report_exceptions_on(console: TextIO, ranks: Ranks, path: Path) -> None:
    """Print an uncaught exception's first line to the console; the traceback goes to the log at `path`."""
    previous = sys.excepthook

    def hook(kind, error, traceback) -> None:
        previous(kind, error, traceback)
        first_line = (str(error).splitlines() or [""])[0]
        console.write(f"rank {ranks.rank} on {ranks.host}: {kind.__name__}: {first_line} (see {path})\n")

    sys.excepthook = hook


def _replace_streams(out: _Tee, error: _Tee) -> None:
    """Replace sys.stdout and sys.stderr, also in logging handlers that hold the old streams."""
    replaced = {id(sys.stdout): out, id(sys.stderr): error}
    loggers = [logging.getLogger(), *logging.root.manager.loggerDict.values()]
    for logger in loggers:
        for handler in getattr(logger, "handlers", []):
            if isinstance(getattr(type(handler), "stream", None), property):
                continue  # logging's handler of last resort reads sys.stderr at every record
            held = vars(handler).get("stream")  # a handler that reads sys.stderr at every record has none
            if id(held) in replaced:
                handler.setStream(replaced[id(held)])
    sys.stdout, sys.stderr = out, error


class _Tee:
    """A console stream that also writes every finished line to a file; errors of the file are ignored.

    Of a progress bar, which redraws its line after a carriage return, the file gets the last state only.
    """

    def __init__(self, console: TextIO, file: IO[str]):
        self._console, self._file, self._line = console, file, ""

    def write(self, text: str) -> int:
        written = self._console.write(text)
        *lines, self._line = (self._line + text).split("\n")
        with contextlib.suppress(OSError):  # disk full: the console has the line
            for line in lines:
                self._file.write(_last_state(line) + "\n")
        self._line = _last_state(self._line) if "\r" in self._line else self._line
        return written

    def __getattr__(self, name: str):
        return getattr(self._console, name)


def _last_state(line: str) -> str:
    states = [state for state in line.split("\r") if state]
    return states[-1] if states else ""
