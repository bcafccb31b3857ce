"""Checkpoint folders that are either complete or absent, even if a writer is killed at any moment.

    runs/x/checkpoints/
      step_00000500/            complete: COMPLETE.json lists every file with its size and sha256
      step_00001000.partial/    being written, or what a killed run left; never read
      step_00000750.damaged/    set aside by a start that could not read it; never deleted
      latest                    name of the newest complete folder; DeepSpeed reads it

Writing, on W ranks that share a file system: `begin` makes the `.partial` folder; every rank writes its files into
it and calls `publish`, which syncs and hashes them and writes their list; the last rank to do so merges the lists
into COMPLETE.json, renames the folder and replaces `latest`. No rank waits for another in `publish`, so it may run
in a background thread. Readers look for complete folders and do not use `latest`, which is written last.

Every failure is a one-line `CheckpointError`; only `retain` changes an intact checkpoint.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cca_ds.checkpoints.errors import CheckpointError, StorageError, clear_errors
from cca_ds.config.schema import Checkpoint
from cca_ds.files import appears, describe_file, sync_folder, write_atomic
from cca_ds.untrusted import read_json

COMPLETE = "COMPLETE.json"
LATEST = "latest"
RANK_LIST = "files_of_rank_{:05d}.json"
CLAIMED_LIST = "claimed_files_of_rank_00000.json"
NAME = re.compile(r"step_(\d{8,})")
HASHERS = 8
LEFTOVERS = (".partial", ".deleting")


@dataclass(frozen=True)
class Manifest:
    """Content of COMPLETE.json: `files` maps a path inside the folder to its size in bytes and sha256."""

    step: int
    world_size: int
    files: dict[str, dict[str, Any]]
    metadata: dict[str, Any]


def folder_name(step: int) -> str:
    """`step_00000500`, so that names sort as steps do."""
    return f"step_{step:08d}"


def bytes_per_weight(stage: int, element_bytes: int, averaged: bool) -> int:
    """What a checkpoint holds of a weight: Adam's two moments and, in float32, the weight itself.

    Args:
        stage: of ZeRO; below 3 the weights as they compute are stored too, which in fp32 at stage 0 are the only ones.
        element_bytes: of a weight as it computes.
        averaged: a moving average is kept.
    """
    master = 0 if stage == 0 and element_bytes == 4 else 4
    return 8 + master + (element_bytes if stage < 3 else 0) + (4 if averaged else 0)


def require_room(root: Path, size: int, settings: Checkpoint, steps: int) -> None:
    """Raise StorageError unless the checkpoints that a run of so many steps keeps, and one more, still fit."""
    every = settings.every_steps
    saves = steps // every + (settings.final and steps % every > 0)
    kept = settings.keep_last + (steps // settings.keep_every if settings.keep_every else 0)
    require_space(root, size, max(min(kept, saves) + 1 - len(complete_checkpoints(root)), 0))


def require_space(root: Path, size: int, count: int = 1) -> None:
    """Raise StorageError unless `count` checkpoints of `size` bytes fit on the file system of `root`."""
    place = Path(root)
    while not place.exists():
        place = place.parent
    free, needed = shutil.disk_usage(place).free, size * count
    if free < needed:
        raise StorageError(
            f"{root}: {count} checkpoint(s) of about {size / 1e9:.3g} GB take {needed / 1e9:.3g} GB, and only "
            f"{free / 1e9:.3g} GB are free: free some, lower checkpoint.keep_last, or put --output on another disk"
        )


def begin(
    root: Path, step: int, rank: int = 0, barrier: Callable[[], object] = lambda: None, needed_bytes: int = 0
) -> Path:
    """Make the empty folder for the checkpoint of `step`. Every rank calls it; returns `root`/step_NNNNNNNN.partial.

    Rank 0 deletes what an interrupted attempt left, and renames a damaged checkpoint of the same step to `.damaged`.
    `barrier` is called by all ranks after that, so that none writes earlier; with one rank it is not needed.
    `needed_bytes` must be free, so that a full disk is noticed before hours of writing.

    Raises:
        CheckpointError: an intact checkpoint of `step` exists, or the folder cannot be made.
    """
    root = Path(root)
    partial = root / f"{folder_name(step)}.partial"
    try:
        if rank == 0:
            with clear_errors(partial):
                root.mkdir(parents=True, exist_ok=True)
                _delete(partial)
                _set_aside_damaged(root / folder_name(step))
                require_space(root, needed_bytes)
                partial.mkdir()
                sync_folder(root)
    finally:
        barrier()  # also on the way to an error: the other ranks are waiting
    if not appears(partial):
        raise CheckpointError(f"checkpoint {partial}: rank 0 could not make the folder; see its message")
    return partial


def publish(
    partial: Path, files: Iterable[Path], rank: int = 0, world_size: int = 1, metadata: dict[str, Any] | None = None
) -> Path | None:
    """Sync, hash and list this rank's files; the last rank to do so makes the checkpoint visible.

    Args:
        partial: what `begin` returned.
        files: the files below `partial` that this rank wrote.
        metadata: values that JSON can hold; the publishing rank's is kept, so pass the same on every rank.

    Returns:
        The complete folder on the rank that published it, None on the others, for which the checkpoint exists
        only after a barrier.

    Raises:
        CheckpointError: full disk, read-only folder, a listed file that is missing or changed. The partial
            folder is then deleted to free its space.
    """
    partial = Path(partial)
    try:
        with clear_errors(partial):
            listed = {_relative(path, partial): describe_file(path, sync=True) for path in sorted(files)}
            write_atomic(partial / RANK_LIST.format(rank), json.dumps({"files": listed}))
            if not _is_last(partial, world_size):
                return None
            return _complete(partial, world_size, metadata or {})
    except CheckpointError:
        with contextlib.suppress(OSError):
            _delete(partial)
        raise


def complete_checkpoints(root: Path) -> list[Path]:
    """Published folders, newest step first; `verify` checks that their files are intact."""
    return [path for path in published(root) if (path / COMPLETE).is_file()]


def published(root: Path) -> list[Path]:
    """Folders that bear a checkpoint's name, newest step first, damaged ones among them."""
    found = [path for path in Path(root).glob("step_*") if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=_step, reverse=True)


def verify(folder: Path) -> Manifest:
    """Hash every listed file of a complete checkpoint and return its manifest.

    Files that the manifest does not list, such as a file manager's .DS_Store, are ignored: nothing reads them.

    Raises:
        CheckpointError: names the first missing or changed file. StorageError: a file that the disk does not let be
            read, which may be intact.
    """
    folder = Path(folder)
    try:
        manifest = read_manifest(folder)
        for name in sorted(manifest.files):
            if not (folder / name).is_file():
                raise CheckpointError(f"checkpoint {folder}: {name} is missing; use an older checkpoint")
        with ThreadPoolExecutor(HASHERS) as pool:  # hashing leaves Python's lock
            found = pool.map(lambda name: describe_file(folder / name, sync=False), manifest.files)
            for (name, expected), described in zip(manifest.files.items(), found, strict=True):
                if described != expected:
                    raise CheckpointError(f"checkpoint {folder}: {name} is corrupt; use an older checkpoint")
    except OSError as error:
        raise StorageError(
            f"checkpoint {folder}: cannot be read ({error.strerror}: {error.filename}); make it readable, or move it "
            "away to continue from an older one"
        ) from error
    return manifest


def newest_verified(root: Path, report: Callable[[str], object] = print) -> tuple[Path, Manifest] | None:
    """The newest checkpoint that `verify` accepts; `report` gets a line for each damaged one it passes over.

    Returns:
        The folder and its manifest; None where there is no checkpoint at all.

    Raises:
        CheckpointError: there are checkpoints and all are damaged. StorageError: one cannot be read; it may be
            intact, so that no older one is taken in its place.
    """
    damaged = []
    for folder in published(root):
        try:
            return folder, verify(folder)
        except StorageError:
            raise
        except CheckpointError as error:
            damaged.append(str(error).removesuffix("; use an older checkpoint"))
            report(f"passed over: {damaged[-1]}")
    aside = sorted(path.name for path in Path(root).glob("step_*.damaged*"))
    if damaged or aside:
        raise CheckpointError(
            f"{root}: no checkpoint is intact ({'; '.join(damaged or aside)}); copy one back, or begin again with "
            "another --output; nothing was changed"
        )
    return None


def set_aside_damaged(root: Path, newer_than: Path) -> None:
    """Rename the damaged checkpoints that a start passed over, so that nothing deletes or replaces them later."""
    for folder in published(root):
        if _step(folder) > _step(newer_than):
            _set_aside(folder)


@contextlib.contextmanager
def listed_files(folder: Path) -> Iterator[Path]:
    """A folder with links to the files that a checkpoint's manifest lists, and to nothing that was put beside them."""
    with tempfile.TemporaryDirectory(prefix="cca_ds_") as view:
        for name in read_manifest(folder).files:
            link = Path(view, name)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to((folder / name).resolve())
        yield Path(view)


def retain(root: Path, keep_last: int, keep_every: int | None = None) -> list[Path]:
    """Delete complete checkpoints and return their folders.

    Kept are the newest `keep_last` and those at multiples of `keep_every` steps. A folder is renamed before its files
    are deleted, so that a name never holds an incomplete checkpoint.
    """
    if keep_last < 1:
        raise CheckpointError(f"checkpoint.keep_last={keep_last}: the newest is always kept; give 1 or more")
    deleted = []
    for folder in complete_checkpoints(root)[keep_last:]:
        if keep_every and _step(folder) % keep_every == 0:
            continue
        with clear_errors(folder):
            _delete(folder)
        deleted.append(folder)
    return deleted


def clean_partials(root: Path) -> list[Path]:
    """Delete the folders that interrupted writers and deletions left, and return them.

    Call it only while no run writes into `root`.
    """
    named = re.compile(rf"{NAME.pattern}(\.universal)?({'|'.join(map(re.escape, LEFTOVERS))})")
    deleted = sorted(path for path in Path(root).glob("step_*") if named.fullmatch(path.name) and path.is_dir())
    for path in deleted:
        with clear_errors(path):
            shutil.rmtree(path)
    return deleted


def _complete(partial: Path, world_size: int, metadata: dict[str, Any]) -> Path:
    """Merge the ranks' lists into COMPLETE.json, then rename the folder, which creates the checkpoint atomically."""
    files: dict[str, dict[str, Any]] = {}
    lists = [partial / CLAIMED_LIST, *(partial / RANK_LIST.format(rank) for rank in range(1, world_size))]
    for path in lists:
        files |= json.loads(path.read_text())["files"]
    for name, expected in files.items():
        if not (partial / name).is_file() or (partial / name).stat().st_size != expected["size"]:
            raise CheckpointError(f"checkpoint {partial}: {name} changed after its rank had finished it")
    for path in lists:
        path.unlink()
    step = int(NAME.match(partial.name)[1])
    body = {"step": step, "world_size": world_size, "files": files, "metadata": metadata}
    body = json.loads(json.dumps(body))  # as a reader gets it, e.g. with strings as keys: the digest covers that
    write_atomic(partial / COMPLETE, json.dumps(body | {"digest": _digest(body)}, indent=1) + "\n")
    for folder in [*(path for path in partial.rglob("*") if path.is_dir()), partial]:
        sync_folder(folder)
    final = partial.with_name(folder_name(step))
    os.rename(partial, final)
    sync_folder(final.parent)
    write_atomic(final.parent / LATEST, final.name + "\n")
    return final


def _is_last(partial: Path, world_size: int) -> bool:
    """Whether every rank's list exists and this caller publishes.

    Ranks that finish together may all see the full set: the one that succeeds in renaming rank 0's list publishes.
    """
    try:
        if not {RANK_LIST.format(rank) for rank in range(world_size)} <= set(os.listdir(partial)):
            return False
        os.rename(partial / RANK_LIST.format(0), partial / CLAIMED_LIST)
    except FileNotFoundError:  # another rank is publishing, or has published
        return False
    return True


def read_manifest(folder: Path) -> Manifest:
    """COMPLETE.json, checked against its own digest but not against the files. Raises CheckpointError."""
    path = folder / COMPLETE
    if not path.exists():
        raise CheckpointError(f"checkpoint {folder}: {COMPLETE} is missing, it was never finished")
    try:
        body = read_json(path)
        digest = body.pop("digest")
        manifest = Manifest(**body)
        _check_types(manifest)
    except (ValueError, TypeError, KeyError, AttributeError):
        raise CheckpointError(f"checkpoint {folder}: {COMPLETE} is corrupt; use an older checkpoint") from None
    if digest != _digest(body) or manifest.step != _step(folder):
        raise CheckpointError(f"checkpoint {folder}: {COMPLETE} is corrupt; use an older checkpoint")
    return manifest


def _check_types(manifest: Manifest) -> None:
    """Raise TypeError for values that no run writes: a digest shows damage, not who computed it."""
    numbers, files = (manifest.step, manifest.world_size), manifest.files
    if not all(type(number) is int and number >= 0 for number in numbers) or not isinstance(manifest.metadata, dict):
        raise TypeError("not a manifest")
    if not isinstance(files, dict) or any(Path(name).is_absolute() or ".." in Path(name).parts for name in files):
        raise TypeError("not a manifest")


def _set_aside_damaged(folder: Path) -> None:
    """Rename a damaged checkpoint: a run that resumed from an older one reaches this step again and must save it."""
    if not folder.exists():
        return
    try:
        verify(folder)
    except StorageError:
        raise
    except CheckpointError:
        return _set_aside(folder)
    raise CheckpointError(f"checkpoint {folder}: this step is already saved and intact; resume from it")


def _set_aside(folder: Path) -> None:
    names = (f"{folder.name}.damaged{number}" for number in ("", *range(2, 1000)))
    os.rename(folder, next(folder.with_name(name) for name in names if not folder.with_name(name).exists()))


def _delete(folder: Path) -> None:
    """Rename, then delete, so that an interrupted deletion leaves nothing that looks like a checkpoint."""
    doomed = folder.with_name(folder.name.removesuffix(".partial") + ".deleting")
    shutil.rmtree(doomed, ignore_errors=True)
    if folder.exists():
        os.rename(folder, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _relative(path: Path, folder: Path) -> str:
    return Path(path).relative_to(folder).as_posix()


def _step(folder: Path) -> int:
    match = NAME.fullmatch(folder.name)
    return int(match[1]) if match else -1
