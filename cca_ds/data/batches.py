"""The micro-batches of one rank, made from a table of codes and read ahead by worker processes.

Letters: K pairs of a global batch, B pairs of a micro-batch, L codes per image, F forwards of a step.
"""

from __future__ import annotations

import atexit
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cca_ds.config import schema
from cca_ds.data.codes import CodeTable
from cca_ds.data.generated import GeneratedCodes
from cca_ds.data.pairs import PairBatch, epoch_order, make_pairs

LONGEST_TMPDIR = 60  # characters; Python adds the names of a folder and a socket
SECONDS_TO_DIE = 10  # that a killed worker may take until it counts as ended


@dataclass
class MicroBatch:
    """The input of one forward on one rank; the fields of its pairs are those of `PairBatch`.

    Attributes:
        codes_BL: int64.
        positions_B: int64, positions of the pairs in the global batch.
        generated_codes_BL: int64, of an image that the reference drew for each pair's label, where the loss needs one
            and it is known before the step.
        weight: 1; 0 for a forward whose pair belongs to another rank, run only because ZeRO-3 forwards are collective.
    """

    codes_BL: Tensor
    positive_labels_B: Tensor  # int64
    negative_labels_B: Tensor  # int64
    null_mask_B: Tensor  # bool
    positive_mask_B: Tensor  # bool
    log_lambda_B: Tensor  # float32
    gft_beta_B: Tensor  # float32
    sample_indices_B: Tensor  # int64
    positions_B: Tensor
    generated_codes_BL: Tensor | None = None
    step: int = 0
    weight: float = 1.0

    def to(self, device: torch.device | str) -> MicroBatch:
        """A copy on another device; the copies are asynchronous."""
        move = lambda value: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value  # noqa: E731
        return MicroBatch(**{name: move(value) for name, value in vars(self).items()})

    def pin_memory(self) -> MicroBatch:
        """A copy in pinned memory; the data loader calls this when `pin_memory` is set."""
        return MicroBatch(**{k: v.pin_memory() if isinstance(v, Tensor) else v for k, v in vars(self).items()})


@dataclass(frozen=True)
class BatchPlan:
    """What the pairs of a step depend on; the number of ranks and the micro-batch size are not among it.

    Attributes:
        global_size: pairs of a global batch, K.
        mask_probability: of a pair's label being replaced by `null_class`.
        contrastive: whether the loss needs another label for each pair.
    """

    global_size: int
    seed: int
    mask_probability: float
    null_class: int
    contrastive: bool = True

    def steps_per_epoch(self, images: int) -> int:
        """Number of whole global batches in an epoch; the remaining images of its order are left out.

        Raises:
            ValueError: the data set is smaller than one batch.
        """
        if images < self.global_size:
            raise ValueError(
                f"the data set has {images} images, fewer than batch.global_size={self.global_size}: "
                "lower batch.global_size or encode more images"
            )
        return images // self.global_size


def total_steps(batch: schema.Batch, steps_per_epoch: int) -> int:
    """Optimizer steps of the whole run."""
    steps = max(1, round(batch.epochs * steps_per_epoch))
    return min(steps, batch.max_steps) if batch.max_steps else steps


class Steps(Dataset):
    """Item s is the list of this rank's F micro-batches of step s.

    Args:
        first: position of this rank's first pair in the global batch.
        sizes: pairs of each of its F forwards; 0 for a forward of weight 0, see `MicroBatch`.
        generated: images that the reference drew, where the loss takes them from a table.

    Raises:
        ValueError: the table is smaller than one global batch.
    """

    def __init__(
        self, table: CodeTable, plan: BatchPlan, first: int, sizes: list[int], generated: GeneratedCodes | None = None
    ):
        self.table, self.plan, self.first, self.sizes, self.generated = table, plan, first, sizes, generated
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
            # a forward without pairs of its own takes the first pair of the global batch, with weight 0
            rows = slice(start, start + size) if size else slice(0, 1)
            batches.append(self._micro_batch(pairs, rows, step, weight=1.0 if size else 0.0))
            start += size
        return batches

    def _micro_batch(self, pairs: PairBatch, rows: slice, step: int, weight: float) -> MicroBatch:
        part = pairs[rows]
        codes_BL, _ = self.table.take(part.sample_indices_K, part.crops_K)
        tensor, generated_BL = torch.from_numpy, None
        if self.generated is not None:
            generated_BL = tensor(self.generated.take(part.sample_indices_K, step // self.steps_per_epoch))
        return MicroBatch(
            codes_BL=tensor(codes_BL),
            positive_labels_B=tensor(part.positive_labels_K),
            negative_labels_B=tensor(part.negative_labels_K),
            null_mask_B=tensor(part.null_mask_K),
            positive_mask_B=tensor(part.positive_mask_K),
            log_lambda_B=tensor(part.log_lambda_K).float(),
            gft_beta_B=tensor(part.gft_beta_K).float(),
            sample_indices_B=tensor(part.sample_indices_K),
            positions_B=torch.arange(rows.start, rows.stop),
            generated_codes_BL=generated_BL,
            step=step,
            weight=weight,
        )


def _ignore_signals(_worker: int) -> None:
    """Ignore signals that stop the trainer: they reach its whole process group, but its last steps still need data."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def read_ahead(
    steps: Steps, order: range, workers: int, prefetch: int, pin_memory: bool = False
) -> Iterator[tuple[int, list[MicroBatch]]]:
    """Yield (step, micro-batches) for the steps in `order`.

    Args:
        workers: processes that read; 0 reads in this process.
        prefetch: steps that they read ahead.
    """
    # a separate generator: a loader draws a seed from the default one, which would change a resumed run's dropout
    ahead = {"prefetch_factor": max(1, -(-prefetch // workers))} if workers else {}
    loader = DataLoader(
        steps, batch_size=None, sampler=order, num_workers=workers, pin_memory=pin_memory,
        worker_init_fn=_ignore_signals, generator=torch.Generator(), **ahead
    )  # fmt: skip
    _make_room_for_sockets(workers)
    iterator = iter(loader)
    processes = iterator._workers if workers else []
    try:
        yield from zip(order, iterator, strict=True)
    except (ConnectionError, EOFError) as error:  # the sockets of a killed worker close before torch sees it dead
        ended = multiprocessing.connection.wait([process.sentinel for process in processes], SECONDS_TO_DIE)
        died = [str(process.pid) for process in processes if process.sentinel in ended]
        if not died:
            raise
        raise RuntimeError(f"DataLoader worker (pid(s) {', '.join(died)}) exited unexpectedly") from error
    finally:  # also after an error: at its exit the process waits for workers, and they ignore SIGTERM
        if workers:
            iterator._shutdown_workers()
            for process in processes:
                process.kill()  # one that hangs: it is neither joined nor ended by a signal that it ignores


def _make_room_for_sockets(workers: int) -> None:
    """Let workers pass tensors through sockets in /tmp where TMPDIR is too long for the name of a socket, 107 bytes."""
    process = multiprocessing.current_process()
    if workers and len(os.fsencode(tempfile.gettempdir())) > LONGEST_TMPDIR and "tempdir" not in process._config:
        folder = tempfile.mkdtemp(prefix="cca_ds_", dir="/tmp")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        process._config["tempdir"] = folder
