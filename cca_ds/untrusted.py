"""Files from outside, before a decoder sees them and while it does: regular, of a bounded size, errors in one line.

Decoders (of images, archives, JSON, Arrow) raise whatever they happen to trip over; within `decoding` that is the
file's fault and becomes the reader's own error, with the path.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from cca_ds.files import FAILING, FORBIDDEN, FULL

LARGEST_JSON = 64 * 2**20  # bytes; a manifest of 10,000 shards is 3 MB
_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device",
          stat.S_IFBLK: "a device"}  # fmt: skip


def not_a_file(path: Path) -> str | None:
    """Why a path is no regular file: it is not there, a folder, a pipe, a device, a link to nothing; None where it is.

    Opening a pipe waits for its writer, and reading a device may never end.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "a link to nothing" if path.is_symlink() else "no such file"
    except OSError as error:  # a loop of links, a name that is too long, no permission
        return error.strerror or str(error)
    except ValueError as error:  # a zero byte in the name
        return str(error)
    return None if stat.S_ISREG(mode) else f"{_KINDS.get(stat.S_IFMT(mode), 'something else')}, not a file"


def regular_file(path: str | Path, error: type[ValueError] = ValueError, largest: int | None = None) -> Path:
    """The path, once it is known to be a regular file of at most `largest` bytes; raises `error` otherwise."""
    path = Path(path)
    if reason := not_a_file(path):
        raise error(f"{path}: {reason}")
    if largest is not None and (size := path.stat().st_size) > largest:
        raise error(f"{path}: {size:,} bytes, more than the {largest:,} that such a file may have")
    return path


@contextlib.contextmanager
def decoding(where: str | Path, error: type[ValueError] = ValueError, remedy: str = "") -> Iterator[None]:
    """Make what a decoder raises for a damaged or hostile file an `error`: one line with `where` and the remedy.

    The disk's own failures (full, not permitted, I/O) pass as they are, and so does `error` itself.
    """
    try:
        yield
    except error:
        raise
    except Exception as raised:
        if isinstance(raised, OSError) and raised.errno in (*FAILING, *FORBIDDEN, *FULL):
            raise
        raise error(f"{where}: {reason_of(raised)}{remedy and f'; {remedy}'}") from raised


def reason_of(raised: BaseException) -> str:
    """A decoder's message in one line of at most 200 characters; the kind of the error where it says nothing."""
    if isinstance(raised, RecursionError):
        return "nested too deeply"
    if isinstance(raised, MemoryError):
        return "it claims to hold more than fits into memory"
    if isinstance(raised, AttributeError | TypeError | IndexError):  # of code that took what is not there for granted
        return "not laid out as it should be"
    text = " ".join("".join(c if c.isprintable() else " " for c in str(raised)).split())
    if isinstance(raised, KeyError):
        text = f"{text} is missing"
    return text[:200] or f"damaged ({type(raised).__name__})"


def parse_json(text: str | bytes, odd_numbers: bool = False) -> Any:
    """JSON as its standard has it: no NaN, no key twice, no number too large for a float. Raises ValueError.

    Args:
        odd_numbers: take NaN, and whole numbers of 16 digits and more as floats, as logs of a run may have them.
    """
    try:
        if odd_numbers:
            return json.loads(text, parse_int=lambda digits: int(digits) if len(digits) < 16 else float(digits))
        return json.loads(text, object_pairs_hook=_once, parse_constant=_no_number, parse_int=_whole, parse_float=_real)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(
    path: str | Path, error: type[ValueError] = ValueError, remedy: str = "", odd_numbers: bool = False
) -> Any:
    """The content of a JSON file. Raises `error` with the path for anything but JSON; OSError where the disk fails."""
    path = regular_file(path, error, LARGEST_JSON)
    with decoding(f"{path}: not JSON", error, remedy):
        return parse_json(path.read_bytes(), odd_numbers)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise ValueError(f"{twice[:80]!r} is given twice")
    return found


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is no number")


def _whole(digits: str) -> int:
    if len(digits) > 300:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _real(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{text[:80]} is too large")
    return value


class PlainYaml(yaml.SafeLoader):
    """Refuses what settings have no use for: keys given twice, and aliases, which can multiply a file's size."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"alias *{self.peek_event().anchor}: write the value again")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in {str(key) for key in keys if keys.count(key) > 1}:
            raise yaml.YAMLError(f"{key} is given twice, in line {node.start_mark.line + 1} and below")
        return super().construct_mapping(node, deep)
