"""This rank's micro-batches, read ahead, cut by the balance of the ranks.

Letters: F forwards of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from cca_ds.balance.balancer import Balancer
from cca_ds.cluster.coordination import Coordinator
from cca_ds.config import schema
from cca_ds.data.batches import MicroBatch, Steps, read_ahead
from cca_ds.training.inputs import RunInputs


class BatchReader:
    """Micro-batches of one rank, step by step.

    Args:
        inputs: table, plan and steps.
        settings: the recipe's `data` section.
        balancer: the partition of the global batch, measured again between steps where the recipe asks for it.
        coordinator: this process among the ranks.
        say: prints a line on rank 0's console.
    """

    def __init__(self, inputs: RunInputs, settings: schema.Data, balancer: Balancer, coordinator: Coordinator,
                 say: Callable[[str], None]):  # fmt: skip
        self.inputs, self.settings, self.balancer = inputs, settings, balancer
        self.coordinator, self.say = coordinator, say

    def steps(self, first: int) -> Iterator[tuple[int, list[MicroBatch]]]:
        """(step, its F micro-batches of this rank, on the CPU) from step `first` to the run's last."""
        step, last = first, self.inputs.steps
        while step < last:
            end = next((s for s in range(step + 1, last) if self.balancer.due(s)), last)
            yield from self._read(range(step, end))
            step = end
            if step < last:
                self.coordinator.beat(step, "measuring the ranks")
                self.balancer.measure_again()
                self.say(f"balance after step {step}: {self.balancer.describe()}")

    def _read(self, order: range) -> Iterator[tuple[int, list[MicroBatch]]]:
        pinned = self.coordinator.device.type == "cuda"
        data = self.settings
        return read_ahead(self.own_steps(), order, data.workers, data.prefetch, pin_memory=pinned)

    def own_steps(self) -> Steps:
        """The steps of the run as this rank sees them under the present partition."""
        rank, partition = self.coordinator.ranks.rank, self.balancer.partition
        first = partition.positions(rank)[0].start
        return self.inputs.own_steps(first, list(partition.micro_sizes[rank]))
