"""What the ranks of a run agree on at every step: sums, whether to stop, and that all of them are alive."""

from __future__ import annotations

import torch
from torch import Tensor

from cca_ds.cluster.launch import Ranks
from cca_ds.cluster.stop_signal import Stopped, StopSignal
from cca_ds.cluster.watchdog import Watchdog


class Coordinator:
    """One process among the ranks of a run; of several ranks, the process group is up.

    Args:
        ranks: this process's place.
        stop: remembers signals to stop; None where a signal ends the process at once.
        watchdog: gets a heartbeat at every step; None where ranks are not watched.
    """

    def __init__(self, ranks: Ranks, stop: StopSignal | None = None, watchdog: Watchdog | None = None):
        self.ranks, self.watchdog = ranks, watchdog
        self._stop = stop
        self.device = torch.device(ranks.device)

    @property
    def stop_requested(self) -> bool:
        """Whether this process was asked to stop."""
        return self._stop is not None and self._stop.requested

    def beat(self, step: int, doing: str = "training") -> None:
        """Report to the watchdog what this rank does at step `step`; every rank calls it equally often."""
        if self.watchdog is not None:
            self.watchdog.beat(step, doing)

    def sum_over_ranks(self, values: Tensor, overdue: bool = False) -> tuple[Tensor, bool, bool]:
        """The sum of a float64 vector over all ranks, whether any rank was asked to stop, and whether a checkpoint is
        `overdue` on any; one all-reduce.
        """
        both = torch.cat([values, values.new_tensor([float(self.stop_requested), float(overdue)])])
        if self.ranks.world_size > 1:
            torch.distributed.all_reduce(both)
        stop, late = (both[-2:] > 0).tolist()
        return both[:-2], stop, late

    def max_over_ranks(self, value: float) -> float:
        """The largest value of all ranks, infinity where any is not a number; collective."""
        largest = torch.tensor(value, dtype=torch.float64, device=self.device).nan_to_num(torch.inf, torch.inf)
        if self.ranks.world_size > 1:
            torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
        return largest.item()

    def agree_while_waiting(self, step: int, missing: bool, late: bool) -> tuple[bool, bool]:
        """Whether any rank still misses what it waits for, and whether any has waited too long; collective.

        Raises:
            Stopped: on every rank, where something is missing and any rank was asked to stop.
        """
        self.beat(step, "waiting for the reference")
        flags = torch.tensor([missing, late, self.stop_requested], dtype=torch.float32, device=self.device)
        torch.distributed.all_reduce(flags)
        missing, late, stop = (flags > 0).tolist()
        if missing and stop:
            raise Stopped(step)
        return missing, late

    def close(self) -> None:
        """Stop watching, at the end of a run without errors; collective."""
        if self.watchdog is not None:
            self.watchdog.close()
