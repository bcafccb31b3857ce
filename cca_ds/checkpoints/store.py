"""Folders of checkpoints that are complete or absent, whatever kills the writers.

    runs/x/checkpoints/
      step_00000500/            complete: COMPLETE.json lists every file with its size and sha256
      step_00001000.partial/    being written, or what a killed run left; never read
      latest                    name of the newest complete folder, for people and for DeepSpeed

One checkpoint, on W ranks that see one file system: `begin` makes the `.partial` folder; every rank writes
its files into it and calls `publish`, which syncs and hashes them and leaves the list behind; the last rank
to do so merges the lists into COMPLETE.json, renames the folder and replaces `latest`. No rank waits for
another in `publish`, so it may run in a background thread. Reading looks at the folders alone, as `latest` is
written after them.

Every failure is one `CheckpointError` line; no function but `retain` touches an intact checkpoint.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cca_ds.checkpoints.errors import CheckpointError, clear_errors
from cca_ds.files import appears, describe_file, sync_folder, write_atomic

COMPLETE = "COMPLETE.json"
LATEST = "latest"
RANK_LIST = "files_of_rank_{:05d}.json"
CLAIMED_LIST = "claimed_files_of_rank_00000.json"
NAME = re.compile(r"step_(\d{8,})")
# `zero_pp_rank_3_mp_rank_00_model_states.pt` is rank 3's, `mp_rank_00_model_states.pt` names no rank.
OWNER = re.compile(r"(?<!mp_)rank_(\d+)")
HASHERS = 8
LEFTOVERS = (".partial", ".deleting", ".damaged")


@dataclass(frozen=True)
class Manifest:
    """What COMPLETE.json says: `files` maps a path inside the folder to its size in bytes and sha256."""

    step: int
    world_size: int
    files: dict[str, dict[str, Any]]
    metadata: dict[str, Any]


def folder_name(step: int) -> str:
    """`step_00000500`, so that names sort as steps do."""
    return f"step_{step:08d}"


def begin(root: Path, step: int, rank: int = 0, barrier: Callable[[], object] = lambda: None) -> Path:
    """Make the empty folder that all ranks write the checkpoint of `step` into; every rank calls it.

    Rank 0 clears what an interrupted attempt left, and moves a damaged checkpoint of the same step aside.
    `barrier` keeps the other ranks from writing before that is done; with one rank it is not needed.

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
                partial.mkdir()
                sync_folder(root)
    finally:
        barrier()  # also on the way to an error: the other ranks are waiting
    if not appears(partial):
        raise CheckpointError(f"checkpoint {partial}: rank 0 could not make the folder; see its message")
    return partial


def publish(
    partial: Path,
    rank: int = 0,
    world_size: int = 1,
    files: Iterable[Path] | None = None,
    metadata: dict[str, Any] | None = None,
) -> Path | None:
    """Seal this rank's files; the last rank to come makes the checkpoint visible.

    Args:
        partial: what `begin` returned.
        files: those this rank wrote, below `partial`; by default the ones whose name bears this rank's
            number, and on rank 0 the ones that bear none.
        metadata: anything JSON holds; the publishing rank's is kept, so give the same on every rank.

    Returns:
        The complete folder on the rank that published it, None on the others: they may go on at once, but
        must not count on the checkpoint before a barrier.

    Raises:
        CheckpointError: full disk, read-only folder, a listed file that is gone or changed. The partial
            folder is then removed, to give back its space.
    """
    partial = Path(partial)
    try:
        with clear_errors(partial):
            own = sorted(files) if files is not None else _files_of(partial, rank)
            listed = {_relative(path, partial): describe_file(path, sync=True) for path in own}
            write_atomic(partial / RANK_LIST.format(rank), json.dumps({"files": listed}))
            if not _is_last(partial, world_size):
                return None
            return _complete(partial, world_size, metadata or {})
    except CheckpointError:
        with contextlib.suppress(OSError):
            _delete(partial)
        raise


def complete_checkpoints(root: Path) -> list[Path]:
    """Folders that were published, newest step first; `verify` tells whether their bytes are intact."""
    found = [path for path in Path(root).glob("step_*") if NAME.fullmatch(path.name)]
    return sorted((path for path in found if (path / COMPLETE).is_file()), key=_step, reverse=True)


def verify(folder: Path) -> Manifest:
    """Hash every file of a complete checkpoint and return its manifest.

    Raises:
        CheckpointError: names the first missing, unlisted or changed file.
    """
    folder = Path(folder)
    with clear_errors(folder):
        manifest = read_manifest(folder)
        present = {_relative(path, folder) for path in folder.rglob("*") if path.is_file()} - {COMPLETE}
        for name in sorted(manifest.files.keys() - present):
            raise CheckpointError(f"checkpoint {folder}: {name} is missing; use an older checkpoint")
        for name in sorted(present - manifest.files.keys()):
            raise CheckpointError(f"checkpoint {folder}: {name} is not one of its files; remove it")
        with ThreadPoolExecutor(HASHERS) as pool:  # hashing leaves Python's lock
            found = pool.map(lambda name: describe_file(folder / name, sync=False), manifest.files)
            for (name, expected), described in zip(manifest.files.items(), found, strict=True):
                if described != expected:
                    raise CheckpointError(f"checkpoint {folder}: {name} is corrupt; use an older checkpoint")
    return manifest


def newest_verified(root: Path, report: Callable[[str], object] = print) -> tuple[Path, Manifest] | None:
    """The newest checkpoint whose every byte is as written; `report` is told of damaged ones passed over."""
    for folder in complete_checkpoints(root):
        try:
            return folder, verify(folder)
        except CheckpointError as error:
            report(f"passed over: {error}")
    return None


def retain(
    root: Path, keep_last: int, keep_every: int | None = None, in_use: Collection[Path] = ()
) -> list[Path]:
    """Delete complete checkpoints and return them.

    Kept are the newest `keep_last`, those at multiples of `keep_every` steps, and `in_use`. A folder is
    renamed before its files go, so that none is ever half there under its name.
    """
    if keep_last < 1:
        raise CheckpointError(f"checkpoint.keep_last={keep_last}: the newest is always kept; give 1 or more")
    used = {Path(path).resolve() for path in in_use}
    deleted = []
    for folder in complete_checkpoints(root)[keep_last:]:
        if (keep_every and _step(folder) % keep_every == 0) or folder.resolve() in used:
            continue
        with clear_errors(folder):
            _delete(folder)
        deleted.append(folder)
    return deleted


def clean_partials(root: Path, keep: Collection[Path] = ()) -> list[Path]:
    """Delete what interrupted writers and deletions left, but `keep`; only while no run writes into
    `root`."""
    kept = {Path(path).resolve() for path in keep}
    found = [path for path in Path(root).glob("step_*") if path.name.endswith(LEFTOVERS)]
    deleted = [path for path in sorted(found) if path.resolve() not in kept]
    for path in deleted:
        with clear_errors(path):
            shutil.rmtree(path)
    return deleted


def _complete(partial: Path, world_size: int, metadata: dict[str, Any]) -> Path:
    """Merge the ranks' lists, then rename: the one moment at which the checkpoint comes to be."""
    files: dict[str, dict[str, Any]] = {}
    lists = [partial / CLAIMED_LIST, *(partial / RANK_LIST.format(rank) for rank in range(1, world_size))]
    for path in lists:
        files |= json.loads(path.read_text())["files"]
    for name, expected in files.items():
        if not (partial / name).is_file() or (partial / name).stat().st_size != expected["size"]:
            raise CheckpointError(f"checkpoint {partial}: {name} changed after its rank had finished it")
    for path in sorted(partial.rglob("*")):
        if path.is_file() and path not in lists and _relative(path, partial) not in files:
            files[_relative(path, partial)] = describe_file(path, sync=True)
    for path in lists:
        path.unlink()
    step = int(NAME.match(partial.name)[1])
    body = {"step": step, "world_size": world_size, "files": files, "metadata": metadata}
    body = json.loads(json.dumps(body))  # as it will be read: the digest is of that
    write_atomic(partial / COMPLETE, json.dumps(body | {"digest": _digest(body)}, indent=1) + "\n")
    for folder in [*(path for path in partial.rglob("*") if path.is_dir()), partial]:
        sync_folder(folder)
    final = partial.with_name(folder_name(step))
    os.rename(partial, final)
    sync_folder(final.parent)
    write_atomic(final.parent / LATEST, final.name + "\n")
    return final


def _is_last(partial: Path, world_size: int) -> bool:
    """Whether every rank's list is there and this caller is the first to see it so.

    Ranks that finish together may all see the full set; rank 0's list, which only one can rename, settles it.
    """
    try:
        if not {RANK_LIST.format(rank) for rank in range(world_size)} <= set(os.listdir(partial)):
            return False
        os.rename(partial / RANK_LIST.format(0), partial / CLAIMED_LIST)
    except FileNotFoundError:  # another rank is publishing, or has published
        return False
    return True


def _files_of(partial: Path, rank: int) -> list[Path]:
    owned = []
    for path in sorted(partial.rglob("*")):
        owner = OWNER.search(path.name)
        if path.is_file() and (int(owner[1]) if owner else 0) == rank:
            owned.append(path)
    return owned


def read_manifest(folder: Path) -> Manifest:
    """COMPLETE.json, checked against its own digest but not against the files. Raises CheckpointError."""
    path = folder / COMPLETE
    try:
        body = json.loads(path.read_bytes())
        digest = body.pop("digest")
        manifest = Manifest(**body)
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {folder}: {COMPLETE} is missing, it was never finished") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise CheckpointError(
            f"checkpoint {folder}: {COMPLETE} is corrupt; use an older checkpoint"
        ) from None
    if digest != _digest(body) or manifest.step != _step(folder):
        raise CheckpointError(f"checkpoint {folder}: {COMPLETE} is corrupt; use an older checkpoint")
    return manifest


def _set_aside_damaged(folder: Path) -> None:
    """A run that passed over a damaged checkpoint comes to its step again and must be able to write it."""
    if not folder.exists():
        return
    try:
        verify(folder)
    except CheckpointError:
        damaged = folder.with_name(folder.name + ".damaged")
        shutil.rmtree(damaged, ignore_errors=True)
        os.rename(folder, damaged)
        return
    raise CheckpointError(f"checkpoint {folder}: this step is already saved and intact; resume from it")


def _delete(folder: Path) -> None:
    """Rename, then remove: a killed deletion leaves nothing that looks like a checkpoint."""
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
