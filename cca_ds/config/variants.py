"""Variants by name: each is one frozen record, registered next to its code and asked instead of compared by name.

LOSSES = Registry[LossSpec]("loss.name")        # in alignment/losses.py
LOSSES.register(LossSpec("cca", ...))
LOSSES[run.loss.name].needs_reference           # anywhere above
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator, Mapping
from typing import Protocol, TypeVar


class Named(Protocol):
    """A record of a registry."""

    @property
    def name(self) -> str:
        """What recipes call it."""
        ...


Record = TypeVar("Record", bound=Named)


class UnknownVariant(ValueError, KeyError):
    """A name that no variant bears; the message has the key, the name and the nearest known one."""

    __str__ = ValueError.__str__  # KeyError shows its message in quotes


class Registry(Mapping[str, Record]):
    """Records by name, in the order of their registration.

    Args:
        key: the recipe's key that holds such a name, for messages.
    """

    def __init__(self, key: str):
        self.key = key
        self._records: dict[str, Record] = {}

    def register(self, record: Record) -> Record:
        """Add a record; its name must be new."""
        assert record.name not in self._records, f"{self.key}={record.name} is registered twice"
        self._records[record.name] = record
        return record

    @contextlib.contextmanager
    def temporarily(self, record: Record) -> Iterator[Record]:
        """Register a record until the end of the block, as tests do."""
        self.register(record)
        try:
            yield record
        finally:
            del self._records[record.name]

    def problem(self, name: str) -> str | None:
        """What is wrong with a name, in one line with the nearest known one; None for a known name."""
        if name in self._records:
            return None
        near = difflib.get_close_matches(str(name).lower(), self._records, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(self._records)}"
        return f"{self.key}={name}: no such name; {hint}"

    def __getitem__(self, name: str) -> Record:
        if problem := self.problem(name):
            raise UnknownVariant(problem)
        return self._records[name]

    def __contains__(self, name: object) -> bool:
        return name in self._records

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)
