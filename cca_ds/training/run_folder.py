"""A run's folder: which run it belongs to, and whether it is finished."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cca_ds.checkpoints import store
from cca_ds.checkpoints.errors import CheckpointError
from cca_ds.config.recipes import (
    ConfigError,
    changed_settings,
    dump_recipe,
    load_recipe,
    resolve_path,
    trajectory_settings,
)
from cca_ds.config.schema import RunConfig
from cca_ds.console import say
from cca_ds.data.manifest import MANIFEST_NAME, read_manifest
from cca_ds.files import expand, write_atomic
from cca_ds.folder_lock import NAME as LOCK
from cca_ds.folder_lock import FolderLock
from cca_ds.untrusted import not_a_file
from cca_ds.vq import TOKENIZERS

COMPLETED = "COMPLETED"


def check_output(folder: Path, run: RunConfig, resume: str) -> None:
    """Refuse a folder that cannot be written or holds another run, before anything is started.

    Args:
        resume: "auto" continues a run of the same configuration, "never" requires a fresh folder, a path names the
            checkpoint to start from.

    Raises:
        ConfigError: one line with the folder and the remedy.
    """
    nearest = folder
    while not nearest.exists():
        nearest = nearest.parent
    for place in (nearest, folder / "checkpoints"):  # which may be a file system of its own
        if place.exists():
            _check_writable(place, folder)
    if resume not in ("auto", "never"):
        _check_resume(expand(resume), folder, run)
    if not (folder / "config.yaml").exists():
        if folder.is_dir() and any((folder / name).exists() for name in ("checkpoints", "metrics.jsonl", COMPLETED)):
            raise ConfigError([f"--output {folder}: holds a run without its config.yaml; choose another folder"])
        return
    try:
        existing = trajectory_settings(load_recipe(str(folder / "config.yaml")))
    except (ConfigError, yaml.YAMLError) as error:
        raise ConfigError([f"--output {folder}: holds a run whose config.yaml is unreadable ({error})"]) from None
    if changed := changed_settings(existing, run):
        raise ConfigError(
            [f"--output {folder}: already holds another run ({'; '.join(changed)}); choose another folder"]
        )
    if resume == "never":
        raise ConfigError([f"--output {folder}: already holds this run; use --resume auto or another folder"])


def check_data(folder: Path, run: RunConfig) -> None:
    """Refuse other data than those of the folder's newest checkpoint, of a finished run too. Raises ConfigError.

    Built-in data, which have no folder yet, are compared where they are opened.
    """
    newest = next(iter(store.complete_checkpoints(folder / "checkpoints")), None)
    table = resolve_path(run.data.codes)
    if newest is None or run.data.codes in TOKENIZERS or not (table / MANIFEST_NAME).is_file():
        return
    with contextlib.suppress(CheckpointError):  # a damaged one is dealt with by the start
        written, now = store.read_manifest(newest).metadata.get("data"), read_manifest(table).content_hash()
        # what follows the + is of data.generated, and compared where that is opened
        if written is not None and str(written).partition("+")[0] != now:
            raise ConfigError(
                [
                    f"--output {folder}: its run was trained on other data than data.codes={run.data.codes} "
                    f"({written}, now {now}); name that table, or choose another folder"
                ]
            )


def _check_writable(place: Path, folder: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=place):  # os.access would report a read-only file system as writable to root
            pass
    except OSError as error:
        raise ConfigError(
            [f"--output {folder}: {place} cannot be written ({error.strerror}); choose another folder"]
        ) from None


def _check_resume(checkpoint: Path, folder: Path, run: RunConfig) -> None:
    if not checkpoint.is_dir():
        what = not_a_file(checkpoint) or "a file"
        raise ConfigError(
            [f"--resume {checkpoint}: {what}; give auto, never or a checkpoint's folder (RUN/checkpoints/step_...)"]
        )
    try:
        manifest = store.read_manifest(checkpoint)
    except (CheckpointError, OSError) as error:
        raise ConfigError([f"--resume {error}"]) from None
    step, written = manifest.step, _settings_of(checkpoint, manifest)
    if changed := changed_settings(written, run):
        raise ConfigError(
            [
                f"--resume {checkpoint}: was written by another run ({'; '.join(changed)}); give the same settings, or "
                "start a new run from its weights (export, then model.weights=FILE)"
            ]
        )
    newest = next(iter(store.complete_checkpoints(folder / "checkpoints")), None)
    if newest and store.read_manifest(newest).step > step:
        raise ConfigError(
            [f"--resume {checkpoint}: {newest.name} is newer in --output {folder}; give another --output"]
        )


def _settings_of(checkpoint: Path, manifest: store.Manifest) -> dict[str, Any]:
    """What a checkpoint was written with; of an older version, what the folder says that it is in; else nothing."""
    written = manifest.metadata.get("recipe")
    if isinstance(written, dict):
        return written
    try:
        return trajectory_settings(load_recipe(str(checkpoint.resolve().parents[1] / "config.yaml")))
    except (ConfigError, yaml.YAMLError, OSError, IndexError):
        return {}


def is_completed(folder: Path) -> bool:
    """Whether the run in `folder` has left its mark of completion."""
    return (folder / COMPLETED).is_file()


@dataclass(frozen=True)
class OwnedFolder:
    """A run's folder while this process writes to it.

    Args:
        fresh: whether there was nothing in it before.
    """

    lock: FolderLock
    fresh: bool


def own(folder: Path, run: RunConfig) -> OwnedFolder:
    """Make the folder, become its only writer, and write the resolved recipe into it.

    Raises:
        FolderTaken: another run writes there. ConfigError: there is another run in it. OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    fresh = not any(entry.name != LOCK for entry in folder.iterdir())
    lock = FolderLock(folder, f"--output {folder}", say=say)
    write_atomic(folder / "config.yaml", dump_recipe(run))
    return OwnedFolder(lock, fresh)


def discard(folder: Path) -> None:
    """Remove the folder of a run that never began, so that the corrected command finds it free.

    Where it is a link to another disk, the folder there is emptied.
    """
    with contextlib.suppress(OSError):  # what made the run fail is worth more than this
        for entry in folder.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink()
        folder.rmdir()


def finish(folder: Path, summary: dict[str, Any]) -> None:
    """Write summary.json, then the mark of completion."""
    write_atomic(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    write_atomic(folder / COMPLETED, json.dumps({"steps": summary["steps"]}) + "\n")
