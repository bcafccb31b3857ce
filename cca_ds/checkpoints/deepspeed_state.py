"""Checkpoints of a run: DeepSpeed's shards, the random state, and the average, in folders that are whole or absent.

The protocol of the folders is `checkpoint_store.py`'s; DeepSpeed's own `latest` is never written.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from torch import Tensor
from torch.utils._pytree import tree_map

from cca_ds.checkpoints import store
from cca_ds.checkpoints.background_writer import BackgroundWriter
from cca_ds.checkpoints.errors import CheckpointError, clear_errors
from cca_ds.checkpoints.universal import load_universal
from cca_ds.cluster.launch import Ranks
from cca_ds.config.schema import Checkpoint
from cca_ds.training.policy import Policy

TAG = "deepspeed"
UNIVERSAL = "universal"


class Checkpoints:
    """Saves and restores one run.

    Args:
        root: the run's `checkpoints` folder.
        metadata: what a resuming run compares: configuration hash, ZeRO stage, precision.
    """

    def __init__(self, root: Path, ranks: Ranks, settings: Checkpoint, metadata: dict[str, Any]):
        self.root, self.ranks, self.settings, self.metadata = root, ranks, settings, metadata
        self._writer: BackgroundWriter | None = None
        self._newest = -1  # step of the newest checkpoint in `root`, the one being written included

    def due(self, step: int, steps: int) -> bool:
        """Whether step `step` (1 after the first) is one to save."""
        return step % self.settings.every_steps == 0 or step == steps

    def save(self, policy: Policy, step: int, wait: bool = False) -> None:
        """Write the checkpoint of `step`; collective. Raises CheckpointError and leaves older ones as they are.

        Asynchronously, what is to be written is copied to host memory here and written by a thread; the next
        save, or `close`, waits for it and raises what went wrong. With `wait` the checkpoint is complete when this
        returns, however it is written: for what is said of it next.
        """
        self.close()
        partial = store.begin(self.root, step, self.ranks.rank, deepspeed.comm.barrier)
        contents = _collect(policy, partial)
        contents.append((_random_state(), partial / f"random_rank_{self.ranks.rank:05d}.pt"))
        if policy.average is not None:
            contents.append((policy.average.shards, partial / f"average_rank_{self.ranks.rank:05d}.pt"))
        metadata = self.metadata | policy.scaling()
        if self.settings.asynchronous:
            self._writer = self._writer or BackgroundWriter()
            on_host = [(_to_host(state), path) for state, path in contents]
            self._writer.submit(self._write, on_host, partial, metadata)
        else:
            self._write(contents, partial, metadata)
        self._newest = step
        if wait or not self.settings.asynchronous:
            self._settle()

    def ensure(self, policy: Policy, step: int) -> None:
        """Return when the checkpoint of `step` is complete; written now if it is not the newest; collective."""
        if step != self._newest:
            self.save(policy, step, wait=True)
        else:
            self._settle()

    def _settle(self) -> None:
        """Return when every rank has written; collective."""
        self.close()
        deepspeed.comm.barrier()

    def _write(self, contents: list[tuple[Any, Path]], partial: Path, metadata: dict[str, Any]) -> None:
        try:
            for state, path in contents:
                with clear_errors(path):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    torch.save(state, path)
        except CheckpointError:
            shutil.rmtree(partial, ignore_errors=True)  # gives back its space
            raise
        files = [path for _, path in contents]
        published = store.publish(partial, files, self.ranks.rank, self.ranks.world_size, metadata)
        if published:
            store.retain(self.root, self.settings.keep_last, self.settings.keep_every)
            for converted in self.root.glob(f"step_*.{UNIVERSAL}"):  # for a start that is now behind us
                shutil.rmtree(converted, ignore_errors=True)

    def clean(self) -> None:
        """Remove what killed writers left; on one rank, before any writes."""
        store.clean_partials(self.root)

    def close(self) -> None:
        """Wait for what is still being written; raises CheckpointError where it failed."""
        if self._writer is not None:
            self._writer.wait()

    def restore(self, policy: Policy, folder: Path) -> None:
        """Continue from `folder`: bit for bit on as many ranks and at the same stage as it was written on."""
        manifest = store.read_manifest(folder)
        if folder.resolve().parent == self.root.resolve():
            self._newest = manifest.step
        universal = f"{folder.name}.{UNIVERSAL}"
        if self.is_native(manifest):
            _let_deepspeed_load(policy, folder, folder, TAG)
            if manifest.world_size == self.ranks.world_size:
                _set_random_state(_load(folder / f"random_rank_{self.ranks.rank:05d}.pt"))
        elif self._deepspeed_reads_universal(manifest):
            _let_deepspeed_load(policy, folder, folder.parent, universal)
            policy.mend_universal_state()
        else:
            taken = manifest.step - manifest.metadata.get("skipped_steps", 0)
            load_universal(policy, folder.with_name(universal), taken)
            policy.continue_after(manifest.step, manifest.metadata)
        if policy.average is not None:
            shards = [_load(folder / f"average_rank_{r:05d}.pt") for r in range(manifest.world_size)]
            policy.average.restore(shards)

    def is_native(self, manifest: store.Manifest) -> bool:
        """Whether DeepSpeed can read the checkpoint as it stands."""
        written, wanted = manifest.metadata.get("stage"), self.metadata["stage"]
        # at stage 0 every rank holds all
        return written == wanted and (wanted == 0 or manifest.world_size == self.ranks.world_size)

    def _deepspeed_reads_universal(self, manifest: store.Manifest) -> bool:
        return manifest.metadata.get("stage") == self.metadata["stage"] == 3

    def prepare(self, folder: Path) -> bool:
        """Convert a checkpoint of other ranks or another stage to DeepSpeed's universal form, once.

        Returns:
            True if DeepSpeed is to read that form, of which `deepspeed.initialize` has to be told.

        Raises:
            CheckpointError: the checkpoint cannot be continued in this precision or at this stage.
        """
        manifest = store.read_manifest(folder)
        written, wanted = manifest.metadata.get("precision"), self.metadata["precision"]
        if written != wanted:
            raise CheckpointError(
                f"checkpoint {folder}: was written in {written}, this run is in {wanted}; set precision={written}"
            )
        if self.is_native(manifest):
            return False
        if manifest.metadata.get("stage") == 0:
            raise CheckpointError(
                f"checkpoint {folder}: was written at ZeRO stage 0, which cannot be sharded; resume at stage 0"
            )
        universal = folder.with_name(f"{folder.name}.{UNIVERSAL}")
        if self.ranks.rank == 0 and not universal.is_dir():
            _to_universal(folder / TAG, universal)
        deepspeed.comm.barrier()
        return self._deepspeed_reads_universal(manifest)


class _Collector(TorchCheckpointEngine):
    """Takes what DeepSpeed wants to write, without writing it."""

    def __init__(self) -> None:
        super().__init__()
        self.contents: list[tuple[Any, Path]] = []

    def save(self, state_dict: Any, path: str) -> None:
        """Remember instead of writing."""
        self.contents.append((state_dict, Path(path)))


def _collect(policy: Policy, partial: Path) -> list[tuple[Any, Path]]:
    """(state, path) of every file that DeepSpeed's `save_checkpoint` makes on this rank; collective."""
    engine, collector = policy.engine, _Collector()
    usual, engine.checkpoint_engine = engine.checkpoint_engine, collector
    try:
        engine.save_checkpoint(str(partial), tag=TAG, save_latest=False)
    finally:
        engine.checkpoint_engine = usual
    return collector.contents


def _let_deepspeed_load(policy: Policy, checkpoint: Path, folder: Path, tag: str) -> None:
    try:
        path, _ = policy.engine.load_checkpoint(str(folder), tag=tag)
    except (RuntimeError, KeyError, AssertionError) as error:  # another model's names or shapes
        told = " ".join(str(error).split())[:300]
        raise CheckpointError(f"checkpoint {checkpoint}: does not fit this run's model ({told})") from error
    if path is None:
        raise CheckpointError(f"checkpoint {checkpoint}: DeepSpeed could not read it")


def _to_host(state: Any) -> Any:
    """Copies of all tensors in host memory, for a thread to write while training changes the originals."""
    return tree_map(
        lambda leaf: leaf.detach().to("cpu", copy=True) if isinstance(leaf, Tensor) else leaf, state
    )


def _to_universal(source: Path, target: Path) -> None:
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a conversion that was killed
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    command += ["--input_folder", str(source), "--output_folder", str(partial), "--inject_missing_state"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise CheckpointError(
            f"checkpoint {source.parent}: cannot be converted for another number of ranks: "
            f"{done.stderr.strip().splitlines()[-1]}"
        )
    partial.rename(target)


def _random_state() -> dict[str, Any]:
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    name, keys, *rest = np.random.get_state()
    state["numpy"] = [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest]
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def consolidated_weights(folder: Path) -> dict[str, Tensor]:
    """The policy's fp32 weights out of a checkpoint's shards, in one process and without ranks."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    manifest = store.verify(folder)
    if manifest.metadata.get("stage") == 0:
        return _load_plain(folder / TAG / "mp_rank_00_model_states.pt")
    weights = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=TAG)
    return {name: tensor.float() for name, tensor in weights.items()}


def _load_plain(path: Path) -> dict[str, Tensor]:
    # DeepSpeed stores plain Python objects beside the tensors; the file's hash was verified just before
    module = torch.load(path, map_location="cpu", weights_only=False)["module"]
    return {name: tensor.float() for name, tensor in module.items()}
