"""Building a table of codes shard by shard, on several ranks, resumable after a kill at any moment.

Until the table is finished its files are in `<table>.partial`:

    plan.json             what is encoded and how; a later start with another plan is refused
    data-*.arrow          finished shards
    records/00003.json    written after shard 3: a shard is finished when its record exists
    rank0.lock            names the process that works as rank 0

Rank r of W makes the shards r, r + W, ... that have no record, so the number of ranks may change between starts. The
rank that finds all records writes the manifest and renames the folder, so the table appears whole.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from cca_ds.console import say
from cca_ds.data.manifest import SKIPPED_NAME, CodesError, Manifest, Shard, histogram, read_manifest
from cca_ds.data.table_files import check_rows, one_line_errors, publish_folder, write_descriptions, write_shard
from cca_ds.files import write_atomic, write_new
from cca_ds.folder_lock import FolderLock, FolderTaken
from cca_ds.untrusted import decoding, read_json


class RankTaken(CodesError):
    """Another process works as this rank, and what is in the folder is its."""


@dataclass(frozen=True)
class ShardContent:
    """Codes and labels of the n usable images of a shard, and a list of the others.

    Attributes:
        codes_NCL: [n, C, L] integers. labels_N: [n] integers.
        skipped: {"index", "name", "reason"} of each image that cannot be used.
        converted: number of images by the mode they were converted from.
    """

    codes_NCL: np.ndarray
    labels_N: np.ndarray
    skipped: list[dict]
    converted: dict[str, int] = field(default_factory=dict)


# (indices of a shard's images, a function to call after each image) -> content; equal ranges give equal contents
Producer = Callable[[range, Callable[[], object]], ShardContent]


@dataclass(frozen=True)
class TablePlan:
    """What is encoded and how; equal plans give equal tables.

    Attributes:
        table: the manifest without the counts and shards, which are filled in at the end.
        images: of the source, usable or not.
        settings: of the encoding that the manifest does not record, e.g. {"precision": "tf32"}.
    """

    table: Manifest
    images: int
    images_per_shard: int
    settings: dict

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.images // self.images_per_shard)

    def rows(self, shard: int) -> range:
        """Indices of a shard's images."""
        start = shard * self.images_per_shard
        return range(start, min(start + self.images_per_shard, self.images))

    def to_json(self) -> str:
        """The text of `plan.json`."""
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"


class TableBuilder:
    """The files of one table while it is built. Every rank creates one with the same folder and plan."""

    def __init__(self, folder: str | Path, plan: TablePlan) -> None:
        self.folder = Path(folder)
        self.plan = plan
        self.work = self.folder.with_name(f"{self.folder.name}.partial")

    def begin(self) -> Manifest | None:
        """Create the partial folder, or check that an existing one has the same plan.

        Returns:
            The manifest, if the table is finished already; else None.

        Raises:
            CodesError: the folder holds something else, or the partial folder was begun with another plan.
        """
        if self.folder.exists():
            return self._finished()
        (self.work / "records").mkdir(parents=True, exist_ok=True)
        path = self.work / "plan.json"
        write_new(path, self.plan.to_json())  # by the first of several ranks, or of two commands
        begun = read_json(path, CodesError, f"remove {self.work}")
        with decoding(path, CodesError, f"remove {self.work}"):
            ours, theirs = _flat(json.loads(self.plan.to_json())), _flat(begun)
        different = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
        if different:
            raise CodesError(
                f"{self.work} was begun with another {', '.join(different)}: "
                "repeat those settings to continue, or remove the folder to start again"
            )
        return None

    def _finished(self) -> Manifest:
        try:
            manifest = read_manifest(self.folder)
        except CodesError:
            manifest = None
        counts = {"images": 0, "label_histogram": (), "shards": (), "skipped_images": 0, "converted": {}}
        if manifest is None or replace(manifest, **counts) != replace(self.plan.table, **counts):
            raise CodesError(f"{self.folder} exists already, with other contents: choose another --output")
        self._clean()  # the process that published it may have been killed before this
        return manifest

    @contextmanager
    def as_rank(self, rank: int) -> Iterator[None]:
        """Be the only process that works as this rank.

        Raises:
            RankTaken: another process does.
        """
        try:
            lock = FolderLock(self.work, f"{self.folder} as rank {rank}", say=say, name=f"rank{rank}.lock")
        except FolderTaken as error:
            raise RankTaken(str(error)) from None
        try:
            yield
        finally:
            lock.release()

    def pending(self, rank: int, world_size: int) -> list[int]:
        """Numbers of this rank's unfinished shards."""
        return [number for number in range(rank, self.plan.shards, world_size) if not self._record(number).exists()]

    def work_of(self, rank: int, world_size: int) -> tuple[int, int]:
        """Number of images in this rank's shards, and in those of them that are unfinished."""
        mine = range(rank, self.plan.shards, world_size)
        share, todo = (sum(len(self.plan.rows(n)) for n in part) for part in (mine, self.pending(rank, world_size)))
        return share, todo

    def add(self, number: int, content: ShardContent) -> None:
        """Write one shard, then its record.

        Raises:
            CodesError: a code or label out of range. OSError: e.g. a full disk; no partial file is left.
        """
        assert len(content.labels_N) + len(content.skipped) == len(self.plan.rows(number))
        record: dict = {"skipped": content.skipped, "converted": content.converted, "shard": None}
        if len(content.labels_N):
            table = self.plan.table
            check_rows(content.codes_NCL, content.labels_N, table.vocab_size, table.classes, f"shard {number}")
            name = f"data-{number:05d}-of-{self.plan.shards:05d}.arrow"
            record["shard"] = asdict(write_shard(self.work / name, content.codes_NCL, content.labels_N))
            record["label_histogram"] = histogram(content.labels_N, table.classes)
        write_atomic(self._record(number), json.dumps(record))

    def check_skipped(self, allowed_share: float) -> list[dict]:
        """All images skipped so far, by any rank. Raises CodesError for more than `allowed_share` of all images."""
        skipped = [entry for record in self._records() for entry in record["skipped"]]
        if len(skipped) > allowed_share * self.plan.images:
            first = "; ".join(f"{entry['name']}: {entry['reason']}" for entry in skipped[:3])
            raise CodesError(
                f"{len(skipped)} of {self.plan.images} images cannot be used, more than --max_unreadable "
                f"{allowed_share:g} allows ({first}): replace these files and start again, or raise --max_unreadable; "
                f"after deleting files, delete {self.work} too"
            )
        return skipped

    def reopen_skipped(self, allowed_share: float, rank: int, world_size: int) -> None:
        """Make this rank's shards with skipped images again where an earlier start skipped too many: the files may have
        been replaced since.
        """
        found = {number: self._skipped(number) for number in range(self.plan.shards)}
        if sum(found.values()) > allowed_share * self.plan.images:
            for number in range(rank, self.plan.shards, world_size):
                if found[number]:
                    self._record(number).unlink()

    def _skipped(self, number: int) -> int:
        """Images that a finished shard left out; 0 for an unfinished one."""
        path = self._record(number)
        with decoding(path, CodesError, f"remove {self.work}"):
            return len(read_json(path)["skipped"]) if path.exists() else 0

    def discard_if_empty(self) -> None:
        """Remove the partial folder unless it holds a finished shard."""
        if not any((self.work / "records").glob("*.json")):
            shutil.rmtree(self.work, ignore_errors=True)

    def finish(self, allowed_share: float) -> Manifest | None:
        """Publish the table if all shards are finished.

        Returns:
            The manifest; None if other ranks are still working, or another rank has published the table.

        Raises:
            CodesError: too many images were skipped, or all.
        """
        try:
            if any(not self._record(number).exists() for number in range(self.plan.shards)):
                return None
            with decoding(self.work / "records", CodesError, f"remove {self.work}"):
                skipped = self.check_skipped(allowed_share)
                manifest = self._manifest(len(skipped))
            lines = "".join(json.dumps(entry) + "\n" for entry in skipped)
            write_atomic(self.work / SKIPPED_NAME, lines)
            write_descriptions(self.work, manifest)
            publish_folder(self.work, self.folder)
        except FileNotFoundError:
            if not self.folder.exists():
                raise
            return None  # another rank has published it
        self._clean()
        return manifest

    def _clean(self) -> None:
        """Remove the files that were needed only to build the table."""
        leftovers = (
            *self.folder.glob("rank*.lock"), *self.folder.glob(".rank*.lock.*"), *self.folder.glob(".*.partial"),
            self.folder / "plan.json",
        )  # fmt: skip
        for leftover in leftovers:
            leftover.unlink(missing_ok=True)
        shutil.rmtree(self.folder / "records", ignore_errors=True)

    def _manifest(self, skipped: int) -> Manifest:
        records = [record for record in self._records() if record["shard"]]
        if not records:
            raise CodesError(f"{self.folder}: none of the images can be used, the data set is empty")
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
        return [read_json(self._record(number), CodesError, f"remove {self.work}") for number in numbers]


def build_table(
    folder: Path, plan: TablePlan, produce: Producer, allowed_share: float, rank: int, world_size: int
) -> Manifest | None:
    """Build the table `folder`, or continue it, with a progress bar on rank 0 and a summary on the console.

    Args:
        produce: makes the codes of a range of images.
        allowed_share: of all images that may be skipped.

    Returns:
        The manifest of the finished table; None if other ranks are still working.

    Raises:
        CodesError: see `TableBuilder.begin` and `build_shards`; a full disk or an unwritable folder.
    """
    from tqdm import tqdm

    builder = TableBuilder(folder, plan)
    with one_line_errors(folder):
        try:
            manifest = builder.begin()
            if manifest is not None:
                say(f"{folder} is finished already: {manifest.images} images")
                return manifest
            share, unfinished = builder.work_of(rank, world_size)
            with tqdm(total=share, initial=share - unfinished, desc="images", unit="image",
                      disable=rank != 0, dynamic_ncols=True) as bar:  # fmt: skip
                manifest = build_shards(builder, produce, rank, world_size, allowed_share, bar.update)
        except RankTaken:
            raise
        except BaseException as error:
            if world_size == 1:
                builder.discard_if_empty()
            if isinstance(error, KeyboardInterrupt):
                say("finished shards are kept; the same command continues")
            raise
    if manifest is None:
        say(f"rank {rank} has finished its shards; other ranks are still working")
    else:
        for line in manifest.summary():
            say(f"{folder}: {line}")
    return manifest


def build_shards(
    builder: TableBuilder,
    produce: Producer,
    rank: int,
    world_size: int,
    allowed_share: float,
    advance: Callable[[], object] = lambda: None,
) -> Manifest | None:
    """Make this rank's unfinished shards one by one, then publish the table if no shard is missing.

    Args:
        allowed_share: of all images that may be skipped.
        advance: called after each image.

    Returns:
        The manifest; None if other ranks are still working.

    Raises:
        CodesError: too many skipped images, codes out of range, another process with this rank.
    """
    skipped = 0
    with builder.as_rank(rank):
        builder.reopen_skipped(allowed_share, rank, world_size)
        for number in builder.pending(rank, world_size):
            content = produce(builder.plan.rows(number), advance)
            builder.add(number, content)
            skipped += len(content.skipped)
            if skipped > allowed_share * builder.plan.images:  # this rank's; all ranks' are counted at the end
                builder.check_skipped(allowed_share)
        return builder.finish(allowed_share)


def _flat(tree: dict, prefix: str = "") -> dict:
    """The values of a nested dict by their keys joined with dots, e.g. "table.source_hash"."""
    flat: dict = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
