"""The cut of a run: decided before the engine is built, measured again while it trains.

Letters: W ranks, F forwards of a step.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from cca_ds.balance import peers
from cca_ds.balance.measure import (
    Probe,
    count_parameters,
    element_bytes,
    micro_that_fits,
    rows_per_pair,
    seconds_per_forward,
)
from cca_ds.balance.partition import BalanceError, Cut, cut
from cca_ds.balance.slowdown import Slowdown
from cca_ds.cluster.launch import Ranks
from cca_ds.config.deepspeed_file import zero_stage
from cca_ds.config.schema import RunConfig


class Balancer:
    """Who computes which pairs; every rank holds the same numbers and so the same cut.

    Made before `deepspeed.initialize`, which is told F. Collective, as is `measure_again`.

    Args:
        ds: DeepSpeed's file as read.
        tokenizer: VAR's.

    Raises:
        BalanceError: a rank of which the recipe says nothing, or a batch that fits nowhere.
    """

    def __init__(
        self,
        run: RunConfig,
        ds: dict[str, Any],
        ranks: Ranks,
        precision: str,
        tokenizer: nn.Module | None = None,
    ):
        self.run, self.ranks, self.precision, self.tokenizer = run, ranks, precision, tokenizer
        self.peers = peers.meet_peers(ranks)
        self.measured = run.balance.mode == "measured"
        self.caps = peers.given_caps(run.balance, run.batch.micro_size, self.peers)
        self._share = -(-run.batch.global_size // ranks.world_size)  # pairs of this rank, even at first
        if max(self.caps) == 0:
            raise BalanceError("balance.micro_sizes leaves no rank a pair; give one of them at least 1")
        self.slowdown = self._slowdown()
        overhead = 0.0
        if self.measured:
            if ranks.device != "cpu":
                self.caps = self._caps_that_fit(ds)
            weights = count_parameters(run) * element_bytes(precision)
            overhead = max(
                self._gather(seconds_per_forward(weights, zero_stage(ds), ranks.world_size, ranks.device))
            )
        self.seconds = self._seconds()
        self.cut = cut(run.batch.global_size, self.seconds, self.caps, overhead)
        self._share = self.cut.pairs[ranks.rank]

    def due(self, step: int) -> bool:
        """Whether the ranks are to be measured again before step `step`."""
        every = self.run.balance.remeasure_every
        return self.measured and bool(every) and step % every == 0

    def measure_again(self) -> Cut:
        """The cut for the speeds of now, with the F that DeepSpeed accumulates over. Collective."""
        self.seconds = self._seconds()
        self.cut = cut(self.run.batch.global_size, self.seconds, self.caps, forwards=self.cut.forwards)
        self._share = self.cut.pairs[self.ranks.rank]
        return self.cut

    def slow(self, module: nn.Module) -> None:
        """Slow the policy on this rank, where the recipe says so."""
        if self.slowdown is not None:
            self.slowdown.attach(module)

    def describe(self) -> str:
        """The cut and what it follows from, for the log."""
        timed = self.run.balance.mode != "even"
        told = self.cut.describe(timed)
        return (
            f"{told}; {self.run.balance.mode}: {peers.describe_speeds(self.peers, self.seconds)}"
            if timed
            else told
        )

    def describe_slowdown(self) -> str | None:
        """The ranks that are slowed on purpose, for a loud line in the log; None where none is."""
        factors = {peer: peers.look_up(self.run.balance.slowdown, peer) for peer in self.peers}
        slowed = [f"{peer} {factor:g} times" for peer, factor in factors.items() if factor and factor > 1.0]
        if not slowed:
            return None
        return f"WARNING: balance.slowdown SLOWS RANKS ON PURPOSE: {'; '.join(slowed)}"

    def _slowdown(self) -> Slowdown | None:
        """This rank's, from what a pair takes on the middle one of all ranks where the recipe does not say."""
        settings = self.run.balance
        if not settings.slowdown:
            return None
        seconds = settings.slowdown_seconds
        if seconds is None:
            unslowed = sorted(self._gather(self._probe().seconds_per_pair(self._timed_pairs())))
            seconds = unslowed[len(unslowed) // 2]
        factor = peers.look_up(settings.slowdown, self.peers[self.ranks.rank]) or 1.0
        return Slowdown(factor, seconds, rows_per_pair(self.run))

    def _seconds(self) -> list[float]:
        """Seconds per pair by rank, as the recipe wants them known."""
        if self.measured:
            own = self._probe(self.slowdown).seconds_per_pair(self._timed_pairs())
            return peers.settle(self._gather(own))
        if self.run.balance.mode == "given":
            return peers.given_seconds(self.run.balance.speeds, self.peers)
        return [1.0] * self.ranks.world_size

    def _caps_that_fit(self, ds: dict[str, Any]) -> list[int]:
        own, world_size = self.caps[self.ranks.rank], self.ranks.world_size
        return self._gather(micro_that_fits(self.run, ds, world_size, self.precision, self._probe(), own))

    def _timed_pairs(self) -> int:
        """A measurement costs a few forwards of the size that this rank runs anyhow."""
        return max(1, min(self.caps[self.ranks.rank], self._share))

    def _probe(self, slowdown: Slowdown | None = None) -> Probe:
        return Probe(self.run, self.ranks.device, self.precision, self.tokenizer, slowdown)

    def _gather(self, value: Any) -> list[Any]:
        return peers.gather(value, self.ranks.world_size)
