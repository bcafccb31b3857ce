"""Stored log-likelihoods of the reference: computed ahead or beside the training, read in the reference's place.

    CACHE/key.json                what the numbers belong to; a run with another key is refused
    CACHE/shard_000012.arrow      steps 12 S to 13 S - 1: one row a pair, in the order of the global batch; with the
                                  codes of each pair's generated image where they are drawn online
    CACHE/producers/*.json        who works on which shard, and the time of that report
    CACHE/trainer.json            the step that training has reached, which bounds how far producers run ahead, and
                                  whether it has ended

Letters: K pairs of a global batch, S steps of a shard, B pairs of a micro-batch, L codes per image.

Shards appear whole or not at all, so either side may die at any moment and come back.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cca_ds.config.schema import RunConfig
from cca_ds.console import say
from cca_ds.data.batches import MicroBatch
from cca_ds.data.codes import CodeTable
from cca_ds.data.generated import ONLINE, GeneratedCodes
from cca_ds.files import expand, write_atomic, write_new
from cca_ds.models.weight_files import state_hash
from cca_ds.reference.interface import DrawingReference, ReferenceInputs
from cca_ds.untrusted import decoding, read_json, regular_file

COMPLETED, TRAINER = "COMPLETED", "trainer.json"
COLUMNS = ("step", "sample", "log_p_positive", "log_p_negative")
DRAWN = "generated"  # a column of shards with images
CHECKSUM, KEY = "sha256", "key"  # in a shard's metadata
_POLL_SECONDS = 0.2
_REPORT_SECONDS = 30.0


class ReferenceCacheError(ValueError):
    """A cache that belongs to another run or is damaged."""


class ReferenceTimeout(ReferenceCacheError):
    """A shard that did not come in time: producers may still be starting, so trying again can help."""

    exit_code = 1


def shard_steps(run: RunConfig) -> int:
    """Steps of a file: the recipe's, else 8; else 1 where producers draw images, which takes them a minute a step."""
    return run.reference.shard_steps or (1 if run.data.generated == ONLINE else 8)


def cache_key(
    run: RunConfig, table: CodeTable, weights_hash: str, precision: str, generated: GeneratedCodes | None = None
) -> dict[str, Any]:
    """All that the stored numbers depend on; beta, lambda and learning rate do not change them, nor does the loss but
    for where its rejected halves come from.
    """
    drawn = {DRAWN: generated.table.manifest.content_hash() if generated else run.data.generated}
    return {
        "reference": weights_hash,
        "model": run.model.preset,
        "overrides": dict(run.model.overrides),
        "data": hashlib.sha256((table.folder / "manifest.json").read_bytes()).hexdigest(),
        "seed": run.seed,
        "global_size": run.batch.global_size,
        "mask_probability": run.loss.condition_mask_probability,
        "shard_steps": shard_steps(run),
        "precision": precision,
        **(drawn if run.data.generated else {}),
    }


def open_cache(inputs: ReferenceInputs, make: bool = True) -> ReferenceCache:
    """The cache of `reference.cache` for a run, whose key rank 0 computes; collective.

    Args:
        make: make the folder where there is none.

    Raises:
        ReferenceCacheError: the folder's numbers belong to another run.
    """
    run, ranks = inputs.run, inputs.coordinator.ranks
    hashes = [state_hash(inputs.weights) if inputs.weights is not None else ""]
    if ranks.world_size > 1:
        torch.distributed.broadcast_object_list(hashes, src=0)
    assert run.reference.cache is not None
    key = cache_key(run, inputs.table, hashes[0], inputs.precision, inputs.generated)
    if run.reference.shard_steps is None:
        key["shard_steps"] = _stored_shard_steps(expand(run.reference.cache)) or key["shard_steps"]
    return ReferenceCache(run.reference.cache, key, make)


def _stored_shard_steps(folder: Path) -> int | None:
    """Steps of a file of a cache that is there: it may have been begun with another default."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # `ReferenceCache` says what is wrong with it
        steps = read_json(folder / "key.json")["shard_steps"]
        return steps if type(steps) is int and steps > 0 else None
    return None


@dataclass(frozen=True)
class Shard:
    """Numbers of S steps: [S K] each, step by step in the order of the global batch."""

    samples: np.ndarray  # int64
    positive: np.ndarray  # float32, log p_reference(x_k | c_k)
    negative: np.ndarray  # float32, log p_reference(x_k | c'_k), or of the generated image under c_k
    generated: np.ndarray | None = None  # uint16 [S K, L], codes of that image where it is drawn online


class ReferenceCache:
    """A folder of shards that belong to one key.

    Args:
        make: make the folder where there is none.

    Raises:
        ReferenceCacheError: the folder's key is another, the fields that differ are named; or there is no folder.
    """

    def __init__(self, folder: str | Path, key: dict[str, Any], make: bool = True):
        self.folder = expand(folder)
        self.shard_steps, self.global_size = key["shard_steps"], key["global_size"]
        self._key_hash = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        path = self.folder / "key.json"
        if make:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_new(path, json.dumps(key, indent=1) + "\n")  # of two runs that begin at once one gets the folder
        try:
            path.stat()
            found = dict(read_json(path))
        except FileNotFoundError:
            raise ReferenceCacheError(
                f"reference.cache={folder}: holds no cache; make it with --cache_reference"
            ) from None
        except (ValueError, TypeError):
            raise ReferenceCacheError(f"{path} cannot be read: delete {self.folder} and compute it again") from None
        differing = [f"{name} ({found.get(name)!r} there)" for name in found | key if found.get(name) != key.get(name)]
        if differing:
            raise ReferenceCacheError(
                f"reference.cache={folder} belongs to another run: {', '.join(differing)} differ; "
                "name another folder, or compute this run's with --cache_reference"
            )

    def path(self, shard: int) -> Path:
        """Where shard number `shard` is or will be."""
        return self.folder / f"shard_{shard:06d}.arrow"

    def shard_of(self, step: int) -> int:
        """The shard that holds a step."""
        return step // self.shard_steps

    def write(self, shard: int, content: Shard) -> None:
        """Store a shard with its checksum, whole or not at all. Raises ReferenceCacheError for a NaN or an infinity."""
        import pyarrow

        if odd := _not_finite(content):
            raise ReferenceCacheError(f"the reference's {odd}: look at reference.weights, or take precision=fp32")
        steps = np.repeat(np.arange(len(content.samples) // self.global_size), self.global_size)
        columns = [steps + shard * self.shard_steps, content.samples, content.positive, content.negative]
        names, arrays = list(COLUMNS), [pyarrow.array(column) for column in columns]
        if (drawn := content.generated) is not None:
            names.append(DRAWN)
            arrays.append(pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(drawn.ravel()), drawn.shape[1]))
        batch = pyarrow.record_batch(arrays, names=names)
        batch = batch.replace_schema_metadata({CHECKSUM: _checksum(shard, content), KEY: self._key_hash})
        sink = pyarrow.BufferOutputStream()
        with pyarrow.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)
        write_atomic(self.path(shard), sink.getvalue().to_pybytes())

    def read(self, shard: int) -> Shard:
        """Read a shard and compare it with its checksum and the cache's key, which older versions did not write.

        Raises:
            ReferenceCacheError: the file is damaged, holds another shard, or is another cache's.
        """
        import pyarrow

        try:
            with open(regular_file(self.path(shard)), "rb") as source:
                table = pyarrow.ipc.open_file(source.read()).read_all()
            drawn = None
            if DRAWN in table.column_names:
                drawn = table.column(DRAWN).combine_chunks().flatten().to_numpy().reshape(table.num_rows, -1)
            content = Shard(*(table.column(name).to_numpy() for name in COLUMNS[1:]), drawn)
            metadata = table.schema.metadata
        except (pyarrow.ArrowException, KeyError, OSError, ValueError) as error:
            raise ReferenceCacheError(self.damaged(shard, " ".join(str(error).split()))) from None
        if metadata is not None:
            if metadata.get(CHECKSUM.encode()) != _checksum(shard, content).encode():
                raise ReferenceCacheError(self.damaged(shard, "its numbers differ from its checksum"))
            if metadata.get(KEY.encode(), self._key_hash.encode()) != self._key_hash.encode():
                raise ReferenceCacheError(self.damaged(shard, "it was written for another cache"))
        if odd := _not_finite(content):
            raise ReferenceCacheError(self.damaged(shard, odd))
        return content

    def damaged(self, shard: int, how: str) -> str:
        """The line for a shard that cannot be used."""
        return f"{self.path(shard)} is damaged ({how}): --cache_reference computes it again"

    def require(self, steps: int) -> None:
        """Read all that a run of so many steps needs.

        Raises:
            ReferenceCacheError: a shard is damaged, or steps are missing; older versions also wrote short shards.
        """
        shards, have, incomplete = -(-steps // self.shard_steps), 0, 0
        for shard in range(shards):
            needed = min(self.shard_steps, steps - shard * self.shard_steps)
            rows = len(self.read(shard).samples) if self.path(shard).is_file() else 0
            found = min(rows // self.global_size, needed)
            have += found if not incomplete else 0
            incomplete += found < needed
        if incomplete:
            raise ReferenceCacheError(
                f"reference.cache={self.folder} holds the first {have} of the run's {steps} steps ({incomplete} of "
                f"{shards} files are missing or too short): compute the others with --cache_reference"
            )

    def is_intact(self, shard: int, samples: np.ndarray) -> bool:
        """Whether a shard is there, whole, and of these samples [S K]."""
        try:
            return np.array_equal(self.read(shard).samples, samples)
        except ReferenceCacheError:
            return False

    def note_producer(self, rank: int, host: str, shard: int) -> None:
        """Record which shard a producer works on, for messages of those that wait."""
        (self.folder / "producers").mkdir(exist_ok=True)
        note = {"rank": rank, "host": host, "shard": shard, "time": time.time()}
        write_atomic(self.folder / "producers" / f"rank_{rank:05d}.json", json.dumps(note))

    def producers(self) -> str:
        """One phrase about every producer: rank, host, shard and how long ago it reported."""
        phrases = []
        for path in sorted((self.folder / "producers").glob("rank_*.json")):
            with decoding(path, ReferenceCacheError):
                note = read_json(path)
                phrases.append(
                    f"producer {note['rank']} on {note['host']} at shard {note['shard']}, "
                    f"last report {time.time() - note['time']:.0f} s ago"
                )
        return "; ".join(phrases) or "no producer has reported; start one with --produce_reference"

    def note_trainer(self, step: int) -> None:
        """Record how far training is, which bounds how far producers run ahead."""
        self._write_trainer(step, finished=False)

    def note_finished(self, step: int) -> None:
        """Record that training has ended after `step` steps: no producer has to wait for it any more."""
        self._write_trainer(step, finished=True)

    def _write_trainer(self, step: int, finished: bool) -> None:
        write_atomic(self.folder / TRAINER, json.dumps({"step": step, "finished": finished}))

    def trainer(self) -> tuple[int, bool]:
        """The step that training has reached, 0 before it began, and whether it has ended."""
        path = self.folder / TRAINER
        if not path.exists():
            return 0, False
        with decoding(path, ReferenceCacheError, "delete it"):
            found = read_json(path)
            return int(found["step"]), bool(found.get("finished", False))  # which older versions did not write


def _not_finite(content: Shard) -> str | None:
    for name, values in (("positive", content.positive), ("negative", content.negative)):
        if len(odd := np.flatnonzero(~np.isfinite(values))):
            first = odd[0]
            return f"{name} log-likelihood of sample {content.samples[first]} is {values[first]}"
    return None


def _checksum(shard: int, content: Shard) -> str:
    digest = hashlib.sha256(str(shard).encode())
    drawn = [] if content.generated is None else [content.generated]
    for column in (content.samples, content.positive, content.negative, *drawn):
        digest.update(np.ascontiguousarray(column).tobytes())
    return digest.hexdigest()


class CachedReference(DrawingReference):
    """log p_reference read from a cache; waits up to `wait_seconds` for a shard where producers stream them.

    Args:
        reports: True on the rank that records training's step for the producers and prints whom it waits for.
        agree: from (step, this rank misses the shard, it has waited too long) to the same two for any rank; may be
            collective, since every rank asks for each shard at the same place and leaves the wait with one answer.
    """

    def __init__(self, cache: ReferenceCache, wait_seconds: float = 0.0, reports: bool = False,
                 agree: Callable[[int, bool, bool], tuple[bool, bool]] | None = None):  # fmt: skip
        self.cache, self.wait_seconds, self.reports = cache, wait_seconds, reports
        self._agree = agree or (lambda step, missing, late: (missing, late))
        self._number, self._shard = -1, None
        self._step, self._waited = 0, 0.0
        self._written, self._last = 0.0, -1  # when the shard was written; the last of those that follow without a gap

    def __call__(self, batch: MicroBatch, inputs: tuple[Tensor, ...]) -> Tensor:
        """[2B] float32, [positive, negative]; see `interface.Reference`."""
        shard, places = self._rows(batch)
        both = np.concatenate([shard.positive[places], shard.negative[places]])
        return torch.from_numpy(both).to(batch.codes_BL.device)

    def draw(self, batch: MicroBatch) -> Tensor:
        """The images that a producer drew; see `interface.DrawingReference`."""
        shard, places = self._rows(batch)
        if shard.generated is None:
            raise ReferenceCacheError(self.cache.damaged(self._number, "it holds no generated images"))
        return torch.from_numpy(shard.generated[places].astype(np.int64)).to(batch.codes_BL.device)

    def tags(self) -> dict[str, float]:
        """Of streamed ones: seconds waited since the last call, steps that producers are ahead, age of the shard."""
        if not (self.reports and self.wait_seconds and self._shard is not None):
            return {}
        waited, self._waited = self._waited, 0.0
        self._last = max(self._last, self._number)
        while self.cache.path(self._last + 1).is_file():
            self._last += 1
        return {
            "reference/wait_seconds": waited,
            "reference/steps_ahead": float((self._last + 1) * self.cache.shard_steps - self._step - 1),
            "reference/age_seconds": time.time() - self._written,
        }

    def finished(self, step: int) -> None:
        """Tell the producers, who would wait for the steps of a run that ended early."""
        if self.reports and self.wait_seconds:
            self.cache.note_finished(step)

    def _rows(self, batch: MicroBatch) -> tuple[Shard, np.ndarray]:
        """The shard of a micro-batch and the places of its pairs in it."""
        shard = self._get(batch.step)
        first = (batch.step % self.cache.shard_steps) * self.cache.global_size
        places = first + batch.positions_B.cpu().numpy()
        if places.max() >= len(shard.samples):  # written by an older version, for a shorter run
            raise ReferenceCacheError(
                f"{self.cache.path(self._number)}: ends before step {batch.step + 1}: "
                "delete it and compute it again with --cache_reference"
            )
        if (shard.samples[places] != batch.sample_indices_B.cpu().numpy()).any():
            raise ReferenceCacheError(
                f"{self.cache.path(self._number)}: holds other samples at step {batch.step + 1}: "
                "delete it and compute it again with --cache_reference"
            )
        return shard, places

    def _get(self, step: int) -> Shard:
        self._step = step
        number = self.cache.shard_of(step)
        if number != self._number:
            if self.reports and self.wait_seconds:
                self.cache.note_trainer(step)
            started = time.monotonic()
            self._wait(number, step)
            self._waited += time.monotonic() - started
            self._number, self._shard = number, self.cache.read(number)
            self._written = self.cache.path(number).stat().st_mtime
        assert self._shard is not None
        return self._shard

    def _wait(self, number: int, step: int) -> None:
        started = reported = time.monotonic()
        while True:
            waited = time.monotonic() - started
            missing, late = self._agree(step, not self.cache.path(number).is_file(), waited >= self.wait_seconds)
            if not missing:
                return
            if late:
                needs = f"step {step + 1} needs {self.cache.path(number)}, which is missing"
                if self.wait_seconds:
                    raise ReferenceTimeout(f"{needs} after {waited:.0f} s: {self.cache.producers()}")
                raise ReferenceCacheError(f"{needs}: compute it with --cache_reference")
            if self.reports and time.monotonic() - reported > _REPORT_SECONDS:
                say(f"step {step + 1} waits for shard {number}: {self.cache.producers()}")
                reported = time.monotonic()
            time.sleep(_POLL_SECONDS)
