"""The partition of a run's batches: decided before the engine is built, measured again while it trains.

Letters: F forwards of a step.
"""

from __future__ import annotations

from typing import TypeVar

from cca_ds.balance import peers
from cca_ds.balance.measure import MeasuredModel, Workload, micro_that_fits, seconds_per_forward
from cca_ds.balance.partition import BalanceError, Partition, partition_batch
from cca_ds.cluster.launch import Ranks
from cca_ds.config.schema import Balance, Batch

Value = TypeVar("Value")


class Balancer:
    """Which rank computes which pairs; every rank holds the same numbers and so the same partition.

    It is built before `deepspeed.initialize`, whose accumulation steps are F. Building it and `measure_again` are
    collective.

    Args:
        settings: mode, speeds and limits of the ranks.
        batch: the global batch, and the most pairs of a forward.
        workload: what is measured in mode "measured".
        ranks: this process's rank, host and device.

    Raises:
        BalanceError: a rank without a speed in mode "given", or a batch that fits on no rank.
    """

    def __init__(self, settings: Balance, batch: Batch, workload: Workload, ranks: Ranks):
        self.settings, self.workload, self.ranks = settings, workload, ranks
        self.global_size = batch.global_size
        self.peers = peers.gather_peers(ranks)
        self.mode = peers.chosen_mode(settings, self.peers)
        self.measured = self.mode == "measured"
        self.caps = peers.given_caps(settings, batch.micro_size, self.peers)
        self._share = -(-batch.global_size // ranks.world_size)  # pairs of this rank, even at first
        if max(self.caps) == 0:
            raise BalanceError("balance.micro_sizes leaves no rank a pair; give one of them at least 1")
        overhead = 0.0
        if self.measured:
            if ranks.device != "cpu":
                self.caps = self._caps_that_fit()
            weights = workload.model.parameters * workload.element_bytes
            stage = workload.sharding.stage
            overhead = max(self._gather(seconds_per_forward(weights, stage, ranks.world_size, ranks.device)))
        self.seconds = self._seconds()
        self.partition = partition_batch(self.global_size, self.seconds, self.caps, overhead)
        self._share = self.partition.pairs[ranks.rank]

    def due(self, step: int) -> bool:
        """Whether the ranks are to be measured again before step `step`."""
        every = self.settings.remeasure_every
        return self.measured and bool(every) and step % every == 0

    def measure_again(self) -> Partition:
        """The partition for the present speeds, with the F that DeepSpeed accumulates over. Collective."""
        self.seconds = self._seconds()
        self.partition = partition_batch(self.global_size, self.seconds, self.caps, forwards=self.partition.forwards)
        self._share = self.partition.pairs[self.ranks.rank]
        return self.partition

    def describe(self) -> str:
        """The partition and the speeds that it follows from, for the log."""
        timed = self.mode != "even"
        line = self.partition.describe(timed)
        if not timed:
            return line
        return f"{line}; {self.mode}: {peers.describe_speeds(self.peers, self.seconds)}"

    def warning(self) -> str | None:
        """What an even partition costs on unequal devices; None where nothing is wrong."""
        return peers.cost_of_even(self.peers) if self.mode == "even" else None

    def _seconds(self) -> list[float]:
        """Seconds per pair by rank: measured, from the recipe's speeds, or equal."""
        if self.measured:
            own = MeasuredModel(self.workload, self.ranks.device).seconds_per_pair(self._timed_pairs())
            return peers.average_equal_ranks(self._gather(own))
        if self.mode == "given":
            return peers.given_seconds(self.settings.speeds, self.peers)
        return [1.0] * self.ranks.world_size

    def _caps_that_fit(self) -> list[int]:
        measured = MeasuredModel(self.workload, self.ranks.device)
        own = self.caps[self.ranks.rank]
        return self._gather(micro_that_fits(self.workload, self.ranks.world_size, measured, own))

    def _timed_pairs(self) -> int:
        """A measurement costs a few forwards of the size that this rank runs in any case."""
        return max(1, min(self.caps[self.ranks.rank], self._share))

    def _gather(self, value: Value) -> list[Value]:
        return peers.gather(value, self.ranks.world_size)
