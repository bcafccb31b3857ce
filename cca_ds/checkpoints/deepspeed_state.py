"""Checkpoints of a run: DeepSpeed's shards, the random state and the moving average.

`store.py` makes their folders whole or absent; DeepSpeed's own `latest` is never written.
"""

from __future__ import annotations

import contextlib
import enum
import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import deepspeed
import numpy as np
import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from safetensors import safe_open
from torch import Tensor
from torch.utils._pytree import tree_map

from cca_ds.checkpoints import store
from cca_ds.checkpoints.background_writer import BackgroundWriter
from cca_ds.checkpoints.errors import CheckpointError, clear_errors
from cca_ds.checkpoints.restricted_load import restricted_load
from cca_ds.cluster.collectives import on_first
from cca_ds.cluster.launch import Ranks
from cca_ds.config.schema import Checkpoint
from cca_ds.files import appears, expand, save_safetensors

TAG = "deepspeed"
UNIVERSAL = "universal"


class Averaged(Protocol):
    """A moving average of weights, a shard a rank."""

    shards: dict[str, Tensor]

    def restore(self, shards: list[dict[str, Tensor]]) -> None:
        """Continue from the shards of all ranks of the run that saved them."""
        ...


class Trained(Protocol):
    """What is saved: a DeepSpeed engine with what it does not save itself (`training.policy.Policy`)."""

    engine: deepspeed.DeepSpeedEngine
    ema: Averaged | None

    def scaling(self) -> dict[str, Any]:
        """fp16's counts for the manifest; empty in another precision."""
        ...

    def repair_universal_state(self) -> None:
        """Undo what reading a universal checkpoint does to the optimizer."""
        ...


class Checkpoints:
    """Saves and restores one run.

    Args:
        root: the run's `checkpoints` folder.
        metadata: what a resuming run compares: settings, hashes of the data and weights, ZeRO stage, precision.
        still_ours: raises where another process writes to the run's folder.
        progress: what a checkpoint's metadata keeps of the run at its step.
    """

    def __init__(self, root: Path, ranks: Ranks, settings: Checkpoint, metadata: dict[str, Any],
                 still_ours: Callable[[], None] = lambda: None,
                 progress: Callable[[], dict[str, Any]] = dict):  # fmt: skip
        self.still_ours, self._progress = still_ours, progress
        self.root, self.ranks, self.settings, self.metadata = root, ranks, settings, metadata
        self._writer: BackgroundWriter | None = None
        self._newest = -1  # step of the newest checkpoint in `root`, the one being written included
        self._saved_at = time.monotonic()

    def overdue(self) -> bool:
        """Whether `checkpoint.every_minutes` are over since the last save; rank 0's clock counts."""
        minutes = self.settings.every_minutes
        return self.ranks.rank == 0 and minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes

    def due(self, step: int, steps: int) -> bool:
        """Whether step `step` (1 after the first) is one to save."""
        return step % self.settings.every_steps == 0 or (step == steps and self.settings.final)

    def save(self, trained: Trained, step: int, wait: bool = False) -> None:
        """Write the checkpoint of `step`; collective. Raises CheckpointError and leaves older ones as they are.

        Asynchronously, what is to be written is copied to host memory here and written by a thread; the next
        save, or `close`, waits for it and raises what went wrong. With `wait` the checkpoint is complete when this
        returns, however it is written.
        """
        self.close()
        self.still_ours()
        previous, needed = self._newest, expected_bytes(trained)
        partial = store.begin(self.root, step, self.ranks.rank, deepspeed.comm.barrier, needed)
        if previous >= 0:  # every rank has written it: `begin` waits for all
            self._require_visible(previous)
        with _deleted_on_failure(partial):
            contents = _collect(trained, partial)
            contents.append((_random_state(), partial / f"random_rank_{self.ranks.rank:05d}.safetensors"))
            if trained.ema is not None:
                contents.append((trained.ema.shards, partial / f"average_rank_{self.ranks.rank:05d}.safetensors"))
            if self.settings.asynchronous:
                contents = [(_to_host(state), path) for state, path in contents]
        metadata = self.metadata | trained.scaling() | self._progress()
        if self.settings.asynchronous:
            self._writer = self._writer or BackgroundWriter()
            self._writer.submit(self._write, contents, partial, metadata)
        else:
            self._write(contents, partial, metadata)
        self._newest, self._saved_at = step, time.monotonic()
        if wait or not self.settings.asynchronous:
            self._settle()

    def ensure(self, trained: Trained, step: int) -> None:
        """Return when the checkpoint of `step` is complete; written now if it is not the newest; collective."""
        if step != self._newest:
            self.save(trained, step, wait=True)
        else:
            self._settle()

    def _settle(self) -> None:
        """Return when every rank has written; collective."""
        self.close()
        deepspeed.comm.barrier()
        self._require_visible(self._newest)

    def _require_visible(self, step: int) -> None:
        """Raise CheckpointError on rank 0 where a checkpoint that some rank published is not to be seen from there."""
        folder = self.root / store.folder_name(step)
        if self.ranks.rank == 0 and not appears(folder):
            raise CheckpointError(
                f"checkpoint {folder}: was published, and is not to be seen on {self.ranks.host}: are all nodes' "
                f"{self.root} one folder of a shared file system?"
            )

    def require_space(self, trained: Trained, steps: int) -> None:
        """Before the first step: room for the checkpoints that are kept and one more; collective.

        Args:
            steps: of the whole run.

        Raises:
            StorageError: on every rank, with the bytes that are missing.
        """
        on_first(self.ranks, lambda: store.require_room(self.root, expected_bytes(trained), self.settings, steps))

    def _write(self, contents: list[tuple[Any, Path]], partial: Path, metadata: dict[str, Any]) -> None:
        with _deleted_on_failure(partial):
            for state, path in contents:
                with clear_errors(path):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    save_own(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
        self.still_ours()
        files = [path for _, path in contents]
        published = store.publish(partial, files, self.ranks.rank, self.ranks.world_size, metadata=metadata)
        if published:
            store.retain(self.root, self.settings.keep_last, self.settings.keep_every)
            for converted in self.root.glob(f"step_*.{UNIVERSAL}"):  # for a start that is now behind us
                shutil.rmtree(converted, ignore_errors=True)

    def close(self) -> None:
        """Wait for what is still being written; raises CheckpointError where it failed."""
        if self._writer is not None:
            self._writer.wait()

    def to_resume(self, resume: str) -> Path | None:
        """The checkpoint to continue from, found and verified by rank 0; None for a start from nothing; collective.

        Args:
            resume: "auto" takes the newest intact one, "never" none, a path that one.

        Raises:
            CheckpointError: the checkpoint that was named is damaged, or all of the run's are.
        """
        found: list[Path | None] = [None]
        if self.ranks.rank == 0:
            store.clean_partials(self.root)
            if resume == "auto":
                passed_over: list[str] = []
                newest = store.newest_verified(self.root, passed_over.append)
                found = [newest[0] if newest else None]
                for line in passed_over:
                    print(line, file=sys.stderr)
                if newest:
                    store.set_aside_damaged(self.root, newest[0])
            elif resume != "never":
                store.verify(expand(resume))
                found = [expand(resume)]
        deepspeed.comm.broadcast_object_list(found, src=0)
        return found[0]

    def restore(self, trained: Trained, folder: Path) -> int:
        """Continue from `folder`, bit for bit on as many ranks as it was written on; returns its step."""
        manifest = store.read_manifest(folder)
        if folder.resolve().parent == self.root.resolve():
            self._newest = manifest.step
        with store.listed_files(folder) as listed:
            if self.is_native(manifest):
                _load_engine(trained, folder, listed, TAG)
                if manifest.world_size == self.ranks.world_size:
                    _set_random_state(load_own(listed / f"random_rank_{self.ranks.rank:05d}"))
            else:
                _load_engine(trained, folder, self.root, f"{folder.name}.{UNIVERSAL}")
                trained.repair_universal_state()
            if trained.ema is not None:
                shards = [load_own(listed / f"average_rank_{r:05d}") for r in range(manifest.world_size)]
                trained.ema.restore(shards)
        return manifest.step

    def is_native(self, manifest: store.Manifest) -> bool:
        """Whether DeepSpeed reads the checkpoint as it is: the same ranks, or stage 0, where each holds all."""
        return self.metadata["stage"] == 0 or manifest.world_size == self.ranks.world_size

    def prepare(self, folder: Path) -> bool:
        """Convert a checkpoint of another number of ranks to DeepSpeed's universal form, once; collective.

        Returns:
            True if DeepSpeed will read that form, which `deepspeed.initialize` has to know.

        Raises:
            CheckpointError: the checkpoint was written in another precision or at another ZeRO stage.
        """
        manifest = store.read_manifest(folder)
        written = manifest.metadata.get("data")  # which older checkpoints do not have
        if written is not None and written != self.metadata["data"]:
            raise CheckpointError(
                f"checkpoint {folder}: was trained on other data ({written}, this run's is {self.metadata['data']}); "
                "name that table in data.codes, or start a new run from its weights (export, then model.weights=FILE)"
            )
        for key, written in manifest.metadata.get("weights", {}).items():  # which older checkpoints do not have
            if self.metadata.get("weights", {}).get(key, written) != written:
                raise CheckpointError(
                    f"checkpoint {folder}: {key} was another file when it was written (its sha256 began with "
                    f"{written[:12]}); name that file, or start a new run from this checkpoint's weights"
                )
        for key, setting in (("precision", "precision"), ("stage", "zero_optimization.stage")):
            written, present = manifest.metadata.get(key), self.metadata[key]
            if written != present:
                raise CheckpointError(
                    f"checkpoint {folder}: was written with {setting}={written}, this run has {present}; "
                    f"set {setting}={written}, or start a new run from its weights (export, then model.weights=FILE)"
                )
        if self.is_native(manifest):
            return False
        # in this run's folder: that of the checkpoint may be another run's, or not writable
        on_first(self.ranks, lambda: _to_universal(folder, self.root / f"{folder.name}.{UNIVERSAL}"))
        return True


class _Collector(TorchCheckpointEngine):
    """Collects what DeepSpeed would write, without writing it."""

    def __init__(self) -> None:
        super().__init__()
        self.contents: list[tuple[Any, Path]] = []

    def save(self, state_dict: Any, path: str) -> None:
        """Keep the state and its path instead of writing."""
        self.contents.append((state_dict, Path(path)))


def expected_bytes(trained: Trained) -> int:
    """What a checkpoint takes, but for some kilobytes."""
    parameters = list(trained.engine.module.parameters())
    elements = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters)
    stage, averaged = trained.engine.zero_optimization_stage(), trained.ema is not None
    return elements * store.bytes_per_weight(stage, parameters[0].element_size(), averaged)


@contextlib.contextmanager
def _deleted_on_failure(partial: Path) -> Iterator[None]:
    """Turn what a full disk raises into a StorageError; after any failure `partial` gives back its space."""
    try:
        with clear_errors(partial):
            yield
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _collect(trained: Trained, partial: Path) -> list[tuple[Any, Path]]:
    """(state, path) of every file that DeepSpeed's `save_checkpoint` makes on this rank; collective."""
    engine, collector = trained.engine, _Collector()
    usual, engine.checkpoint_engine = engine.checkpoint_engine, collector
    try:
        engine.save_checkpoint(str(partial), tag=TAG, save_latest=False)
    finally:
        engine.checkpoint_engine = usual
    return [(_without_enums(state), path) for state, path in collector.contents]


def _without_enums(state: Any) -> Any:
    """The state with DeepSpeed's enums as the numbers they are: some Pythons pickle an enum as a call of getattr."""
    return _map(lambda leaf: int(leaf) if isinstance(leaf, enum.Enum) and isinstance(leaf, int) else leaf, state)


def _map(change: Callable[[Any], Any], state: Any) -> Any:
    """The state with every leaf changed; a tensor's size is a leaf and stays one, which DeepSpeed's readers need."""
    return tree_map(change, state, is_leaf=lambda part: isinstance(part, torch.Size))


def _load_engine(trained: Trained, checkpoint: Path, folder: Path, tag: str) -> None:
    try:
        with restricted_load(checkpoint, sorted((folder / tag).rglob("*.pt"))):
            path, _ = trained.engine.load_checkpoint(str(folder), tag=tag)
    except (RuntimeError, KeyError, AssertionError) as error:  # another model's names or shapes
        cause = " ".join(str(error).split())[:300]
        raise CheckpointError(f"checkpoint {checkpoint}: does not fit this run's model ({cause})") from error
    if path is None:
        raise CheckpointError(f"checkpoint {checkpoint}: DeepSpeed could not read it")


def _to_host(state: Any) -> Any:
    """Copies of all tensors in host memory, for a thread to write while training changes the originals."""
    return _map(lambda leaf: leaf.detach().to("cpu", copy=True) if isinstance(leaf, Tensor) else leaf, state)


def _to_universal(checkpoint: Path, target: Path) -> None:
    """Convert a checkpoint anew: nothing vouches for the files of an earlier conversion."""
    partial = target.with_name(target.name + ".partial")
    target.parent.mkdir(parents=True, exist_ok=True)
    for earlier in (partial, target):
        shutil.rmtree(earlier, ignore_errors=True)
    with store.listed_files(checkpoint) as listed:
        command = [sys.executable, "-m", restricted_load.__module__, str(listed / TAG), str(partial)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        cause = (done.stderr.strip().splitlines() or [f"DeepSpeed's converter ended with {done.returncode}"])[-1]
        raise CheckpointError(
            f"checkpoint {checkpoint}: cannot be converted for another number of ranks ({cause}); "
            "resume on as many as wrote it, or with more memory"
        )
    partial.rename(target)


def _random_state() -> dict[str, Any]:
    """Tensors and JSON's types."""
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    name, keys, *rest = np.random.get_state()
    state["numpy"], state["numpy_rest"] = torch.from_numpy(np.asarray(keys).astype(np.int64)), [name, *rest]
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    if "numpy_rest" in state:
        keys, (name, *rest) = state["numpy"], state["numpy_rest"]
    else:  # of a .pt file
        name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def save_own(state: dict[str, Any], path: Path) -> None:
    """State of this package: its tensors in safetensors, all else as JSON in the file's metadata."""
    tensors = {name: value.detach().contiguous() for name, value in state.items() if isinstance(value, Tensor)}
    rest = {name: value for name, value in state.items() if name not in tensors}
    save_safetensors(tensors, path, {"state": json.dumps(rest)})


def load_own(path: Path) -> dict[str, Any]:
    """What `save_own` wrote, on the CPU; `path` is without its suffix. Checkpoints of older versions have .pt files."""
    if (old := path.with_name(f"{path.name}.pt")).is_file():
        with restricted_load(old.resolve().parent, [old]):
            return torch.load(old, map_location="cpu", weights_only=True)
    with safe_open(path.with_name(f"{path.name}.safetensors"), "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()} | json.loads(file.metadata()["state"])  # noqa: SIM118


def consolidated_weights(folder: Path) -> dict[str, Tensor]:
    """The policy's fp32 weights out of a checkpoint's shards, in one process and without ranks."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    manifest = store.verify(folder)
    with store.listed_files(folder) as listed, restricted_load(folder, sorted((listed / TAG).glob("*.pt"))):
        if manifest.metadata.get("stage") == 0:
            weights = torch.load(listed / TAG / "mp_rank_00_model_states.pt", "cpu", weights_only=True)["module"]
        else:
            weights = get_fp32_state_dict_from_zero_checkpoint(str(listed), tag=TAG)
        return {name: tensor.float() for name, tensor in weights.items()}
