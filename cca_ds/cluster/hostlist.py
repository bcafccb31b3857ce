"""Slurm's compact lists: node names `gpu[01-03,7],login` and task counts `2(x3),1`."""

from __future__ import annotations

import re

_RANGE = re.compile(r"(\d+)(?:-(\d+))?$")
_COUNT = re.compile(r"(\d+)(?:\(x(\d+)\))?$")


def expand_hosts(compact: str) -> list[str]:
    """Names in the list's own order, e.g. `r[1-2]n[08-09]` -> r1n08 r1n09 r2n08 r2n09.

    Raises:
        ValueError: the text is no node list.
    """
    return [host for part in _split_outside_brackets(compact) for host in _expand_part(part, compact)]


def _split_outside_brackets(compact: str) -> list[str]:
    parts, depth, current = [], 0, ""
    for character in compact:
        depth += {"[": 1, "]": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append(current)
            current = ""
        else:
            current += character
    parts.append(current)
    if depth != 0 or any(not part for part in parts):
        raise ValueError(f"{compact!r} is not a Slurm node list")
    return parts


def _expand_part(part: str, compact: str) -> list[str]:
    head, bracket, rest = part.partition("[")
    if not bracket:
        return [part]
    inside, _, tail = rest.partition("]")
    numbers = [number for item in inside.split(",") for number in _expand_range(item, compact)]
    tails = _expand_part(tail, compact) if tail else [""]
    return [head + number + end for number in numbers for end in tails]


def _expand_range(item: str, compact: str) -> list[str]:
    match = _RANGE.match(item)
    if match is None:
        raise ValueError(f"{compact!r} is not a Slurm node list")
    first, last = match.group(1), match.group(2) or match.group(1)
    width = len(first)  # zeros in front are part of the name
    return [str(number).zfill(width) for number in range(int(first), int(last) + 1)]


def expand_counts(compact: str) -> list[int]:
    """Tasks of each node, in order: `2(x3),1` -> 2 2 2 1.

    Raises:
        ValueError: the text is no list of counts.
    """
    counts = []
    for item in compact.split(","):
        match = _COUNT.match(item)
        if match is None:
            raise ValueError(f"{compact!r} is not a Slurm list of task counts")
        counts += [int(match.group(1))] * int(match.group(2) or 1)
    return counts
