"""Fill a cache of reference log-likelihoods, ahead of a run (`--cache_reference`) or beside it (`--produce_reference`).

Letters: K pairs of a global batch, S steps of a shard, L codes per image.

Producers share the shards by their rank and talk to nobody but the file system: one that dies and comes back skips
what is there.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cca_ds.cluster.launch import Ranks
from cca_ds.config.schema import RunConfig
from cca_ds.console import progress
from cca_ds.data.batches import Steps
from cca_ds.files import write_atomic
from cca_ds.reference.cache import ReferenceCache, ReferenceCacheError, Shard, cache_key
from cca_ds.reference.replica import InferenceReference
from cca_ds.training.inputs import batch_plan, check_tokenizer, open_table, open_tokenizer, total_steps
from cca_ds.training.policy import starting_weights
from cca_ds.training.run_folder import COMPLETED


def produce(run: RunConfig, ranks: Ranks, precision: str, ahead: bool) -> None:
    """Compute this rank's shards of the whole run.

    Args:
        ahead: stay at most `reference.ahead_steps` ahead of the trainers, and wait for them.

    Raises:
        ReferenceCacheError: no cache folder named, or it belongs to another run.
    """
    if run.reference.cache is None:
        raise ReferenceCacheError("name the folder to fill: --set reference.cache=FOLDER")
    table = open_table(run, Path(run.reference.cache).expanduser() / "data")
    tokenizer = open_tokenizer(run)
    check_tokenizer(run, table, tokenizer)
    weights = starting_weights(run, run.reference.weights or run.model.weights, tokenizer, for_reference=True)
    cache = ReferenceCache(run.reference.cache, cache_key(run, table, weights, precision))
    reference = InferenceReference(run, weights, precision, tokenizer)
    steps = Steps(table, batch_plan(run, table), 0, [run.batch.global_size])
    last = total_steps(run, steps.steps_per_epoch)
    shards = range(ranks.rank, -(-last // cache.shard_steps), ranks.world_size)
    for shard in progress(shards, "reference log-likelihoods", total=len(shards), show=ranks.rank == 0):
        cache.note_producer(ranks.rank, ranks.host, shard)
        first = shard * cache.shard_steps
        if cache.path(shard).is_file():
            continue
        while ahead and first > cache.trainer_step() + run.reference.ahead_steps:
            cache.note_producer(ranks.rank, ranks.host, shard)
            time.sleep(1.0)
        order = range(first, min(first + cache.shard_steps, last))
        cache.write(
            shard, _compute(reference, steps, order, run.reference.batch_size, torch.device(ranks.device))
        )
    if all(cache.path(shard).is_file() for shard in range(-(-last // cache.shard_steps))):
        # the last rank to finish, or several at once, to the same effect
        write_atomic(cache.folder / COMPLETED, json.dumps({"steps": last}) + "\n")


def _compute(
    reference: InferenceReference, steps: Steps, order: range, batch_size: int, device: torch.device
) -> Shard:
    samples, positive, negative = [], [], []
    for step in order:
        (batch,) = steps[step]
        samples.append(batch.sample_indices_B.numpy())
        for labels, results in ((batch.positive_labels_B, positive), (batch.negative_labels_B, negative)):
            results += _log_likelihoods(reference, batch.codes_BL, labels, batch_size, device)
    return Shard(np.concatenate(samples), np.concatenate(positive), np.concatenate(negative))


def _log_likelihoods(
    reference: InferenceReference, codes_KL: Tensor, labels_K: Tensor, batch_size: int, device: torch.device
) -> list[np.ndarray]:
    parts = zip(codes_KL.split(batch_size), labels_K.split(batch_size), strict=True)
    return [
        reference.log_likelihoods(codes_BL.to(device), labels_B.to(device)).cpu().numpy()
        for codes_BL, labels_B in parts
    ]
