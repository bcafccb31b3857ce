"""What a pair costs on this rank alone: time and memory of the run's own model, without any collective.

Letters: B rows of a forward, L codes per image.

ZeRO-3's forward is collective, and ranks that wait for one another all measure the slowest one's speed. So the
recipe's model is built here a second time, unsharded, with four blocks at most; a deeper model's time and memory
follow from those with four and with one, block by block. It is built for every measurement and freed afterwards.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cca_ds.balance.memory import USABLE_SHARE, Memory, Sharding, memory_of
from cca_ds.balance.partition import largest_micro, measure_speed
from cca_ds.cluster.failures import is_out_of_memory
from cca_ds.models import DTYPES
from cca_ds.models.base import list_of_blocks
from cca_ds.models.cost import ModelCost

MOST_BLOCKS = 4  # of the measured model
_REPEATS = 3
_EXCHANGE_ELEMENTS = 2**21  # of the timed all-gather


@dataclass(frozen=True)
class Workload:
    """What a run computes, as far as measuring it needs to know.

    Args:
        model: sizes of the whole model.
        build: builds the run's model with `MOST_BLOCKS` blocks at most, otherwise of its own shape.
        precision: "bf16", "fp16" or "fp32".
        rows_per_pair: sequences of a pair through the policy (`LossSpec.rows_per_pair`).
        sharding: what the ds_config sets of memory.
        compute: what the policy computes instead of log-likelihoods (`LossSpec.forward`).
        reference_bytes: what the reference keeps on each GPU (`Placement.held_bytes`); 0 without one.
    """

    model: ModelCost
    build: Callable[[], nn.Module]
    precision: str
    rows_per_pair: int
    sharding: Sharding
    reference_bytes: float = 0.0
    compute: Callable[..., Tensor] | None = None

    @property
    def element_bytes(self) -> int:
        """Bytes of a weight."""
        return torch.finfo(DTYPES[self.precision]).bits // 8

    def memory(self, ranks: int, checkpointing: bool) -> Memory:
        """The bytes on each GPU, by the memory model."""
        return memory_of(
            self.model,
            self.sharding,
            ranks,
            checkpointing,
            reference_bytes=self.reference_bytes,
            rows_per_pair=self.rows_per_pair,
            element_bytes=self.element_bytes,
        )

    def fixed_bytes(self, ranks: int) -> float:
        """GPU bytes that the run will allocate beside the activations; what CUDA itself takes is not in it."""
        return self.memory(ranks, checkpointing=False).allocated


class MeasuredModel:
    """The run's model, shortened, on this rank's device, e.g. "cuda:0" or "cpu"."""

    def __init__(self, workload: Workload, device: str):
        self.device, self.rows_per_pair = torch.device(device), workload.rows_per_pair
        self.compute = workload.compute
        self.layers = workload.model.layers
        with _own_randomness(self.device), self.device:
            module = workload.build()
        self.module = module.to(self.device, DTYPES[workload.precision]).train()
        self._blocks_name, self._blocks = list_of_blocks(self.module)

    def seconds_per_pair(self, pairs: int) -> float:
        """Seconds of a forward and backward of `pairs` pairs, divided by their number: the median of a few passes.

        A pass's fixed overhead is included, as it is in the run. Where memory is short, fewer pairs are timed.
        """
        return self._whole(lambda: self._time(pairs))

    def bytes_per_pair(self, pairs: int) -> float:
        """CUDA memory that one more pair needs at the peak of a pass of about `pairs` pairs.

        Where memory is short, smaller passes are measured.
        """
        larger = max(2, pairs)
        while True:
            try:
                return max(self._whole(functools.partial(self._slope, larger)), 1.0)
            except RuntimeError as error:
                if not is_out_of_memory(error) or larger == 2:
                    raise
            larger = max(2, larger // 2)
            torch.cuda.empty_cache()

    def _whole(self, measure: Callable[[], float]) -> float:
        """`measure` of the whole depth: of the model as it is, or extended from all its blocks and from one."""
        own = len(self._blocks)
        several = measure()
        if own == self.layers:
            return several
        setattr(self.module, self._blocks_name, self._blocks[:1])
        try:
            one = measure()
        finally:
            setattr(self.module, self._blocks_name, self._blocks)
        block = (several - one) / (own - 1)
        if block <= 0:  # lost in noise
            return several * self.layers / own
        return one + (self.layers - 1) * block

    def _time(self, pairs: int) -> float:
        while True:
            try:
                with _own_randomness(self.device):
                    return measure_speed(self._step, pairs, _REPEATS)
            except RuntimeError as error:
                if not is_out_of_memory(error) or pairs == 1:
                    raise
                pairs //= 2

    def _slope(self, larger: int) -> float:
        smaller = larger // 2
        return (self._peak(larger) - self._peak(smaller)) / (larger - smaller)

    def _peak(self, pairs: int) -> float:
        torch.cuda.reset_peak_memory_stats(self.device)
        with _own_randomness(self.device):
            self._step(pairs)
        return float(torch.cuda.max_memory_allocated(self.device))

    def _step(self, pairs: int) -> None:
        self.module(*self._inputs(pairs), compute=self.compute).sum().backward()
        self.module.zero_grad(set_to_none=True)

    def _inputs(self, pairs: int) -> tuple[Tensor, ...]:
        rows = pairs * self.rows_per_pair
        shape = (rows, self.module.sequence_length)
        codes_BL = torch.randint(self.module.vocab_size, shape, device=self.device)
        labels_B = torch.randint(self.module.num_classes, (rows,), device=self.device)
        conditioned = self.module.conditioning is not None
        return (codes_BL, labels_B, *([torch.zeros(rows, device=self.device)] if conditioned else []))


def micro_that_fits(workload: Workload, ranks: int, measured: MeasuredModel, pairs: int) -> int:
    """Most pairs of a forward that fit in this rank's GPU beside weights, optimizer, buffers and reference.

    What a pair needs is measured; the rest, which is not allocated yet, follows from `balance.memory`. At most `pairs`.
    """
    free, _ = torch.cuda.mem_get_info(measured.device)
    return min(pairs, largest_micro(free * USABLE_SHARE, workload.fixed_bytes(ranks), measured.bytes_per_pair(pairs)))


def seconds_per_forward(weights_bytes: float, stage: int, world_size: int, device: str) -> float:
    """Seconds of exchanges that each forward of a step costs a rank, from one timed all-gather. Collective.

    At stage 3 two gathers of all weights and one reduction of their gradients, at stage 2 the reduction, below nothing.
    """
    exchanges = {3: 3, 2: 1}.get(stage, 0)
    if world_size == 1 or not exchanges:
        return 0.0
    part = torch.zeros(-(-_EXCHANGE_ELEMENTS // world_size), device=device)
    whole = torch.empty(world_size * len(part), device=device)
    times = []
    for _ in range(1 + _REPEATS):
        start = time.perf_counter()
        torch.distributed.all_gather_into_tensor(whole, part)
        whole[-1].item()  # a GPU is done when its numbers can be read
        times.append(time.perf_counter() - start)
    return exchanges * statistics.median(times[1:]) * weights_bytes / (4 * len(whole))


def _own_randomness(device: torch.device) -> AbstractContextManager[None]:
    """Restores the run's random state on leaving: measuring must not change the trajectory."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
