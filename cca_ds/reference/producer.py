"""Fill a cache of reference log-likelihoods, ahead of a run (`--cache_reference`) or beside it (`--produce_reference`).

Letters: K pairs of a global batch, S steps of a shard, L codes per image.

Producers share the shards by their rank and communicate through the file system only: one that dies and comes back
skips the shards that are there.
"""

from __future__ import annotations

import json
import time

import numpy as np
import torch
from torch import Tensor

from cca_ds.cluster.launch import Ranks
from cca_ds.console import progress, say
from cca_ds.data.batches import Steps
from cca_ds.files import write_atomic
from cca_ds.reference.cache import COMPLETED, ReferenceCache, Shard
from cca_ds.reference.replica import ReplicaReference


def fill_cache(
    cache: ReferenceCache, reference: ReplicaReference, steps: Steps, total_steps: int, ranks: Ranks, batch_size: int,
    ahead_steps: int | None = None,
) -> None:  # fmt: skip
    """Compute this rank's shards of a whole run and write those that are not there.

    Args:
        steps: the run's global batches, each as one micro-batch.
        total_steps: steps of the run.
        batch_size: pairs in a forward.
        ahead_steps: stay at most so many steps ahead of the trainers, and wait for them; None: do not wait.
    """
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
        while ahead_steps is not None and first > cache.trainer_step() + ahead_steps:
            cache.note_producer(ranks.rank, ranks.host, shard)
            time.sleep(1.0)
        cache.write(shard, _compute(reference, steps, whole, batch_size, torch.device(ranks.device)))
    if all(cache.path(shard).is_file() for shard in range(last_shard)):
        # the last rank to finish, or several at once, to the same effect
        write_atomic(cache.folder / COMPLETED, json.dumps({"steps": total_steps}) + "\n")


def _compute(reference: ReplicaReference, steps: Steps, order: range, batch_size: int, device: torch.device) -> Shard:
    samples, positive, negative = [], [], []
    for step in order:
        (batch,) = steps[step]
        samples.append(batch.sample_indices_B.numpy())
        for labels, results in ((batch.positive_labels_B, positive), (batch.negative_labels_B, negative)):
            results += _log_likelihoods(reference, batch.codes_BL, labels, batch_size, device)
    return Shard(np.concatenate(samples), np.concatenate(positive), np.concatenate(negative))


def _log_likelihoods(
    reference: ReplicaReference, codes_KL: Tensor, labels_K: Tensor, batch_size: int, device: torch.device
) -> list[np.ndarray]:
    parts = zip(codes_KL.split(batch_size), labels_K.split(batch_size), strict=True)
    return [
        reference.log_likelihoods(codes_BL.to(device), labels_B.to(device)).cpu().numpy()
        for codes_BL, labels_B in parts
    ]
