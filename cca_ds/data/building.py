"""A table of codes built shard by shard, by several ranks, through any number of kills.

Beside the table to come stands `<table>.partial`. It holds the plan (what is encoded, and how), a finished
Arrow file per shard and, written after it, that shard's record: a shard is finished when its record is there.
Shards are dealt out by number; finished ones are skipped, whoever made them, so the number of ranks may change.
The rank that finds all records writes the manifest and renames the folder: the table appears whole.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from cca_ds.data.manifest import CodesError, Manifest, Shard, histogram, read_manifest
from cca_ds.data.writing import check_rows, publish_folder, write_descriptions, write_shard
from cca_ds.files import write_atomic


@dataclass(frozen=True)
class ShardContent:
    """What one shard yields: codes [n, C, L], labels [n], and the images that could not be used."""

    codes_NCL: np.ndarray
    labels_N: np.ndarray
    skipped: list[dict]  # {"index", "name", "reason"}
    converted: dict[str, int] = field(default_factory=dict)  # images by the mode they were converted from


# (images of a shard, called once per image for a progress bar) -> content; equal ranges give equal contents
Producer = Callable[[range, Callable[[], object]], ShardContent]


@dataclass(frozen=True)
class Plan:
    """What is encoded: equal plans give equal tables. `table` has everything but counts and shards."""

    table: Manifest
    images: int
    images_per_shard: int
    settings: dict  # of the encoding, e.g. its precision

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.images // self.images_per_shard)

    def rows(self, shard: int) -> range:
        """The images of a shard."""
        start = shard * self.images_per_shard
        return range(start, min(start + self.images_per_shard, self.images))

    def to_json(self) -> str:
        """For `plan.json`."""
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"


class TableBuilder:
    """Builds one table. Every rank makes one of these with the same plan."""

    def __init__(self, folder: str | Path, plan: Plan) -> None:
        self.folder = Path(folder)
        self.plan = plan
        self.work = self.folder.with_name(f"{self.folder.name}.partial")

    def begin(self) -> Manifest | None:
        """Make the working folder, or join the one that is there; returns the table if it is finished already.

        Raises:
            CodesError: something else is in the table's place, or the working folder was begun with another plan.
        """
        if self.folder.exists():
            return self._finished()
        (self.work / "records").mkdir(parents=True, exist_ok=True)
        path = self.work / "plan.json"
        if not path.exists():
            write_atomic(path, self.plan.to_json())  # ranks that meet here write the same text
        try:
            begun = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise CodesError(f"{path} cannot be read ({error}): remove {self.work}") from error
        ours, theirs = _flat(json.loads(self.plan.to_json())), _flat(begun)
        different = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
        if different:
            raise CodesError(
                f"{self.work} was begun with another {', '.join(different)}: "
                "give the same settings to go on, or remove it to begin anew"
            )
        return None

    def _finished(self) -> Manifest:
        try:
            manifest = read_manifest(self.folder)
        except CodesError:
            manifest = None
        counts = {"images": 0, "label_histogram": (), "shards": (), "skipped_images": 0, "converted": {}}
        if manifest is None or replace(manifest, **counts) != replace(self.plan.table, **counts):
            raise CodesError(f"{self.folder} is there already, with other contents: choose another --output")
        self._clean()  # a kill may have come between its publication and this
        return manifest

    @contextmanager
    def as_rank(self, rank: int) -> Iterator[None]:
        """Hold this rank's place: a second process in it is refused; a killed one leaves it free."""
        with open(self.work / f"rank{rank}.lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise CodesError(
                    f"another process is encoding {self.folder} as rank {rank}: wait for it"
                ) from error
            except OSError:
                pass  # a file system without locks
            yield

    def pending(self, rank: int, world_size: int) -> list[int]:
        """This rank's unfinished shards."""
        return [
            number
            for number in range(rank, self.plan.shards, world_size)
            if not self._record(number).exists()
        ]

    def work_of(self, rank: int, world_size: int) -> tuple[int, int]:
        """How many images are this rank's, and how many of them are still to do."""
        mine = range(rank, self.plan.shards, world_size)
        share, todo = (
            sum(len(self.plan.rows(n)) for n in part) for part in (mine, self.pending(rank, world_size))
        )
        return share, todo

    def add(self, number: int, content: ShardContent) -> None:
        """Write one shard and then its record. Raises OSError, e.g. on a full disk, with nothing half-written."""
        assert len(content.labels_N) + len(content.skipped) == len(self.plan.rows(number))
        record: dict = {"skipped": content.skipped, "converted": content.converted, "shard": None}
        if len(content.labels_N):
            table = self.plan.table
            check_rows(
                content.codes_NCL, content.labels_N, table.vocab_size, table.classes, f"shard {number}"
            )
            name = f"data-{number:05d}-of-{self.plan.shards:05d}.arrow"
            record["shard"] = asdict(write_shard(self.work / name, content.codes_NCL, content.labels_N))
            record["label_histogram"] = histogram(content.labels_N, table.classes)
        write_atomic(self._record(number), json.dumps(record))

    def check_skipped(self, allowed_share: float) -> list[dict]:
        """All images skipped so far. Raises CodesError when they are more than a share of all images."""
        skipped = [entry for record in self._records() for entry in record["skipped"]]
        if len(skipped) > allowed_share * self.plan.images:
            first = "; ".join(f"{entry['name']}: {entry['reason']}" for entry in skipped[:3])
            raise CodesError(
                f"{len(skipped)} of {self.plan.images} images cannot be used, more than --max_unreadable "
                f"{allowed_share:g} allows ({first}): mend them, or allow more to go on"
            )
        return skipped

    def discard_if_empty(self) -> None:
        """Remove the working folder unless a shard is finished in it."""
        if not any((self.work / "records").glob("*.json")):
            shutil.rmtree(self.work, ignore_errors=True)

    def finish(self, allowed_share: float) -> Manifest | None:
        """Publish the table when all shards are there; None while other ranks are still at work.

        Raises:
            CodesError: too many images were skipped, or none is left.
        """
        try:
            if any(not self._record(number).exists() for number in range(self.plan.shards)):
                return None
            skipped = self.check_skipped(allowed_share)
            manifest = self._manifest(len(skipped))
            lines = "".join(json.dumps(entry) + "\n" for entry in skipped)
            write_atomic(self.work / "skipped.jsonl", lines)
            write_descriptions(self.work, manifest)
            publish_folder(self.work, self.folder)
        except FileNotFoundError:
            if not self.folder.exists():
                raise
            return None  # another rank published it meanwhile
        self._clean()
        return manifest

    def _clean(self) -> None:
        """Remove from the finished table what was of use while it was built."""
        leftovers = (
            *self.folder.glob("rank*.lock"),
            *self.folder.glob(".*.partial"),
            self.folder / "plan.json",
        )
        for leftover in leftovers:
            leftover.unlink(missing_ok=True)
        shutil.rmtree(self.folder / "records", ignore_errors=True)

    def _manifest(self, skipped: int) -> Manifest:
        records = [record for record in self._records() if record["shard"]]
        if not records:
            raise CodesError(f"{self.folder}: no image could be used, the data set is empty")
        shards = tuple(Shard(**record["shard"]) for record in records)
        converted: dict[str, int] = {}
        for record in records:
            for mode, count in record["converted"].items():
                converted[mode] = converted.get(mode, 0) + count
        counts = np.sum([record["label_histogram"] for record in records], axis=0)
        return replace(
            self.plan.table,
            images=sum(shard.images for shard in shards),
            label_histogram=tuple(int(count) for count in counts),
            skipped_images=skipped,
            converted=converted,
            shards=shards,
        )

    def _record(self, number: int) -> Path:
        return self.work / "records" / f"{number:05d}.json"

    def _records(self) -> list[dict]:
        numbers = (number for number in range(self.plan.shards) if self._record(number).exists())
        return [json.loads(self._record(number).read_text()) for number in numbers]


def build(
    builder: TableBuilder,
    produce: Producer,
    rank: int,
    world_size: int,
    allowed_share: float,
    advance: Callable[[], object] = lambda: None,
) -> Manifest | None:
    """Make all of this rank's unfinished shards, then publish the table if they were the last."""
    skipped = 0
    with builder.as_rank(rank):
        for number in builder.pending(rank, world_size):
            content = produce(builder.plan.rows(number), advance)
            builder.add(number, content)
            skipped += len(content.skipped)
            if skipped > allowed_share * builder.plan.images:  # the others' count at the end only
                builder.check_skipped(allowed_share)
        return builder.finish(allowed_share)


def _flat(tree: dict, prefix: str = "") -> dict:
    """Nested keys joined by dots, for naming what differs."""
    flat: dict = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
