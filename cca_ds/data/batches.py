"""From the table of codes to the micro-batches of one rank, read ahead by worker processes.

Letters: K pairs of a global batch, B pairs of a micro-batch, L codes per image, F forwards of a step.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cca_ds.data.codes import CodeTable
from cca_ds.data.pairs import PairBatch, epoch_order, make_pairs


@dataclass
class MicroBatch:
    """What one forward of one rank sees. `weight` is 1, or 0 for a forward that only keeps ranks in step."""

    codes_BL: Tensor  # int64
    positive_labels_B: Tensor  # int64
    negative_labels_B: Tensor  # int64
    null_mask_B: Tensor  # bool
    positive_mask_B: Tensor  # bool
    log_lambda_B: Tensor  # float32
    sample_indices_B: Tensor  # int64
    positions_B: Tensor  # int64, places in the global batch
    step: int = 0
    weight: float = 1.0

    def to(self, device: torch.device | str) -> MicroBatch:
        """The same on another device; the copies do not wait."""
        move = lambda value: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value  # noqa: E731
        return MicroBatch(**{name: move(value) for name, value in vars(self).items()})

    def pin_memory(self) -> MicroBatch:
        """Called by the loader where a GPU is used."""
        return MicroBatch(
            **{k: v.pin_memory() if isinstance(v, Tensor) else v for k, v in vars(self).items()}
        )


@dataclass(frozen=True)
class BatchPlan:
    """All that decides which pairs a step trains on; ranks and micro-batches have no part in it."""

    global_size: int
    seed: int
    mask_probability: float
    null_class: int
    contrastive: bool = True

    def steps_per_epoch(self, images: int) -> int:
        """Whole global batches of an epoch; the rest of the images has its turn in another epoch's order.

        Raises:
            ValueError: the data set is smaller than one batch.
        """
        if images < self.global_size:
            raise ValueError(
                f"the data set has {images} images, fewer than batch.global_size={self.global_size}: "
                "lower batch.global_size or encode more images"
            )
        return images // self.global_size


class Steps(Dataset):
    """Item s: the micro-batches of step s that are this rank's, as a list of F `MicroBatch`.

    Args:
        table: the codes.
        plan: what a global batch is.
        first: this rank's first place in the global batch.
        sizes: pairs of each of its F forwards, 0 for a forward that only keeps ranks in step.
    """

    def __init__(self, table: CodeTable, plan: BatchPlan, first: int, sizes: list[int]):
        self.table, self.plan, self.first, self.sizes = table, plan, first, sizes
        self.steps_per_epoch = plan.steps_per_epoch(len(table))
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def global_pairs(self, step: int) -> PairBatch:
        """The K pairs of step `step`, counted over all epochs."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, epoch_order(len(self.table), self.plan.seed, epoch)
        size = self.plan.global_size
        indices_K = self._order[place * size : (place + 1) * size]
        return make_pairs(
            indices_K,
            self.table.labels[indices_K],
            null_class=self.plan.null_class,
            mask_probability=self.plan.mask_probability,
            crops=self.table.manifest.crops,
            seed=self.plan.seed,
            epoch=epoch,
            contrastive=self.plan.contrastive,
        )

    def __getitem__(self, step: int) -> list[MicroBatch]:
        pairs = self.global_pairs(step)
        batches, start = [], self.first
        for size in self.sizes:
            # a forward without pairs of its own runs on the first pair, with weight 0
            rows = slice(start, start + size) if size else slice(0, 1)
            batches.append(self._micro_batch(pairs, rows, step, weight=1.0 if size else 0.0))
            start += size
        return batches

    def _micro_batch(self, pairs: PairBatch, rows: slice, step: int, weight: float) -> MicroBatch:
        part = pairs[rows]
        codes_BL, _ = self.table.take(part.sample_indices_K, part.crops_K)
        tensor = torch.from_numpy
        return MicroBatch(
            codes_BL=tensor(codes_BL),
            positive_labels_B=tensor(part.positive_labels_K),
            negative_labels_B=tensor(part.negative_labels_K),
            null_mask_B=tensor(part.null_mask_K),
            positive_mask_B=tensor(part.positive_mask_K),
            log_lambda_B=tensor(part.log_lambda_K).float(),
            sample_indices_B=tensor(part.sample_indices_K),
            positions_B=torch.arange(rows.start, rows.stop),
            step=step,
            weight=weight,
        )


def _leave_signals_to_the_trainer(_worker: int) -> None:
    """A signal to stop reaches a whole process group; the steps up to the last checkpoint still need their data."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def read_ahead(
    steps: Steps, order: range, workers: int, prefetch: int, pin_memory: bool = False
) -> Iterator[tuple[int, list[MicroBatch]]]:
    """(step, micro-batches) in order, read by `workers` processes, `prefetch` steps ahead of the trainer."""
    # a generator of its own: a loader draws a seed from the default one, and a resumed run's dropout would differ
    ahead = {"prefetch_factor": max(1, -(-prefetch // workers))} if workers else {}
    loader = DataLoader(
        steps, batch_size=None, sampler=order, num_workers=workers, pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_the_trainer, generator=torch.Generator(), **ahead
    )  # fmt: skip
    yield from zip(order, loader, strict=True)
