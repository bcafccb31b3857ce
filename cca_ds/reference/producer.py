"""Fill a cache of reference log-likelihoods, ahead of a run (`--cache_reference`) or beside it (`--produce_reference`).

Letters: K pairs of a global batch, S steps of a shard, B pairs of a forward, L codes per image.

Producers share the shards by their rank and communicate through the file system only: one that dies and comes back
skips the shards that are there.
"""

from __future__ import annotations

import json
import time

import numpy as np
import torch

from cca_ds.cluster.launch import Ranks
from cca_ds.console import progress, say
from cca_ds.data.batches import Steps
from cca_ds.files import write_atomic
from cca_ds.reference.cache import COMPLETED, ReferenceCache, Shard
from cca_ds.reference.replica import ReplicaReference


def fill_cache(
    cache: ReferenceCache, reference: ReplicaReference, steps: Steps, total_steps: int, ranks: Ranks,
    ahead_steps: int | None = None, online: bool = False, wait_seconds: float = 600.0,
) -> None:  # fmt: skip
    """Compute this rank's shards of a whole run and write those that are not there.

    Args:
        steps: the run's global batches, cut into micro-batches of one forward.
        total_steps: steps of the run.
        ahead_steps: stay at most so many steps ahead of the trainers, and wait for them; None: do not wait.
        online: draw each pair's generated image too.
        wait_seconds: for the trainers of a run that continues one which had ended.
    """
    finished_before = cache.trainer()[1]  # an earlier, shorter run of this cache
    most = ranks.world_size if ahead_steps is None else ahead_steps // cache.shard_steps + 1
    if most < ranks.world_size and ranks.rank == 0:
        say(
            f"{most} of {ranks.world_size} producers work at a time: reference.ahead_steps={ahead_steps} holds no more "
            f"files of {cache.shard_steps} steps; set it to {cache.shard_steps * (ranks.world_size - 1)}"
        )
    last_shard = -(-total_steps // cache.shard_steps)
    shards = range(ranks.rank, last_shard, ranks.world_size)
    for shard in progress(shards, "reference log-likelihoods", total=len(shards), show=ranks.rank == 0):
        cache.note_producer(ranks.rank, ranks.host, shard)
        first = shard * cache.shard_steps
        whole = range(first, first + cache.shard_steps)  # beyond the run's end too: a longer run uses them
        if cache.path(shard).is_file():
            if cache.is_intact(shard, np.concatenate([steps.global_pairs(step).sample_indices_K for step in whole])):
                continue
            say(f"{cache.path(shard)} is damaged or of another run: computing it again")
        waited_since = time.monotonic()
        while ahead_steps is not None:
            step, finished = cache.trainer()
            if finished and not (finished_before and time.monotonic() - waited_since < wait_seconds):
                say(f"the run has ended after step {step}; producer {ranks.rank} ends too")
                return
            finished_before = finished
            if first <= step + ahead_steps:
                break
            cache.note_producer(ranks.rank, ranks.host, shard)
            time.sleep(1.0)
        cache.write(shard, _compute(reference, steps, whole, torch.device(ranks.device), online))
    if all(cache.path(shard).is_file() for shard in range(last_shard)):
        # the last rank to finish, or several at once, to the same effect
        write_atomic(cache.folder / COMPLETED, json.dumps({"steps": total_steps}) + "\n")


def _compute(reference: ReplicaReference, steps: Steps, order: range, device: torch.device, online: bool) -> Shard:
    samples, positive, negative, drawn = [], [], [], []
    for batch in (batch.to(device) for step in order for batch in steps[step]):
        codes_BL = batch.codes_BL if batch.generated_codes_BL is None else batch.generated_codes_BL
        if online:
            codes_BL = reference.draw(batch)
            drawn.append(codes_BL.cpu().numpy().astype(np.uint16))
        samples.append(batch.sample_indices_B.cpu().numpy())
        positive.append(reference.log_likelihoods(batch.codes_BL, batch.positive_labels_B).cpu().numpy())
        negative.append(reference.log_likelihoods(codes_BL, batch.negative_labels_B).cpu().numpy())
    stored = (np.concatenate(samples), np.concatenate(positive), np.concatenate(negative))
    return Shard(*stored, np.concatenate(drawn) if online else None)
