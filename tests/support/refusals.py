"""What every refusal has in common: one line, exit code 2 (or 1), no program's own error names, nothing written."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

OWN_ERRORS = re.compile(
    r"\b(Type|Attribute|Key|Index|Lookup|Overflow|Recursion|ZeroDivision|Assertion|Runtime|NotImplemented|Unpickling|"
    r"Struct|Value|Memory|UnicodeDecode|Eof|EOF|OS|JSONDecode)Error\b|\bTraceback\b"
)
PATIENCE_SECONDS = 60  # of one case in the same process; a hang would stop the whole suite


def tree(folder: Path) -> dict[str, int]:
    """Relative path -> size of everything below a folder."""
    found = {}
    for at, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(at, name)
            found[path.relative_to(folder).as_posix()] = path.lstat().st_size if name in files else -1
    return found


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after so many seconds."""

    def late(*_):
        raise TimeoutError(f"not over after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def called(main: Callable[[list[str]], int], arguments: list[object]) -> tuple[int, str, str]:
    """A command in this process: exit code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), time_limit(PATIENCE_SECONDS):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as error:  # argparse's
            code = error.code
    return code, out.getvalue(), err.getvalue()


def refusal(
    main: Callable[[list[str]], int], arguments: list[object], folder: Path, codes: tuple[int, ...] = (2,)
) -> str:
    """The line with which a command refuses its input.

    Args:
        folder: holds all that the command may read or write; must be as it was.
        codes: of which one is the exit code.
    """
    before = tree(folder)
    code, _, err = called(main, arguments)
    said = f"{shlex.join(map(str, arguments))}\nexit code {code}\n{err}"
    lines = [line for line in err.splitlines() if line.strip() and not re.search(r"it/s\]$|\?it/s\]", line)]  # no bars
    if lines and lines[0].startswith("usage: "):  # argparse: its usage, then the line
        lines = lines[-1:]
    assert code in codes and len(lines) == 1, said
    assert not OWN_ERRORS.search(lines[0]), said
    assert tree(folder) == before, f"{said}\nleft behind: {sorted(set(tree(folder)) - set(before))}"
    return lines[0]
