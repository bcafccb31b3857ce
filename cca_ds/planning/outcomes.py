"""Memory, micro-batches, step, epoch and GPU hours of each placement of the reference on one allocation."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cca_ds.balance.memory import Memory
from cca_ds.planning.job import Job
from cca_ds.planning.nodes import NodeGroup
from cca_ds.planning.step_time import StepTime, micro_caps, step_time, work_of
from cca_ds.reference.placements import Placement


@dataclass(frozen=True)
class Outcome:
    """One placement, None without a reference, with or without activation checkpointing, on one allocation.

    `memories` and `caps` (largest micro-batch) have one entry for each group of `trainers`. `balanced` is None where
    not one pair fits on any GPU, `even` where an even share does not fit on the smallest. `producer_seconds` is the
    producers' time for a streamed reference of one step, `ahead_seconds` the time of a cached one before each epoch,
    `drawing_seconds` what the trainers take in a step to draw its images.
    """

    placement: Placement | None
    checkpointing: bool
    trainers: list[NodeGroup]
    producers: list[NodeGroup]
    memories: list[Memory]
    caps: list[int]
    balanced: StepTime | None
    even: StepTime | None
    steps: int
    ideal_step_seconds: float
    ahead_seconds: float = 0.0
    producer_seconds: float = 0.0
    drawing_seconds: float = 0.0

    @property
    def placement_name(self) -> str:
        """As in recipes; "none" without a reference."""
        return self.placement.name if self.placement else "none"

    @property
    def step_seconds(self) -> float:
        """Of the balanced partition, and no less than the producers need for a step; infinite where it does not fit."""
        return self._seconds(self.balanced)

    @property
    def epoch_seconds(self) -> float:
        """Steps and, for a cached reference, the log-likelihoods computed before them."""
        return self.steps * self.step_seconds + self.ahead_seconds

    @property
    def efficiency(self) -> float:
        """Share of the allocation that is used: the time that all its GPUs would need for what must be computed (not
        what is recomputed), over the epoch's.
        """
        return self.steps * self.ideal_step_seconds / self.epoch_seconds

    @property
    def even_step_seconds(self) -> float:
        """Of the even partition; infinite where it does not fit."""
        return self._seconds(self.even)

    def _seconds(self, step: StepTime | None) -> float:
        return max(step.seconds + self.drawing_seconds, self.producer_seconds) if step else float("inf")

    @property
    def even_efficiency(self) -> float:
        """`efficiency` of the even partition, 0 where it does not fit."""
        return self.steps * self.ideal_step_seconds / (self.steps * self.even_step_seconds + self.ahead_seconds)

    @property
    def gpu_hours(self) -> float:
        """Of an epoch, on trainers and producers together."""
        gpus = sum(group.ranks for group in [*self.trainers, *self.producers])
        return gpus * self.epoch_seconds / 3600


def outcome(job: Job, groups: Sequence[NodeGroup], placement: Placement | None, checkpointing: bool) -> Outcome:
    """Memory and time of one placement; None where the loss needs no reference."""
    if placement and placement.needs_producers:
        return _streamed(job, list(groups), placement, checkpointing)
    ahead = job.images * reference_seconds(job, groups) if placement and placement.stored else 0.0
    return _trained(job, list(groups), placement, checkpointing, even=True, ahead_seconds=ahead)


def own_outcome(outcomes: Sequence[Outcome], placement: Placement | None, checkpointing: bool | str) -> Outcome:
    """The recipe's own: "auto" computes activations again only where they do not fit otherwise."""
    without, again = (
        next(one for one in outcomes if one.placement == placement and one.checkpointing == on) for on in (False, True)
    )
    if checkpointing == "auto":
        return without if without.balanced or not again.balanced else again
    return again if checkpointing else without


def leaner_outcome(job: Job, groups: Sequence[NodeGroup], own: Outcome) -> Outcome | None:
    """`own`, the recipe's placement, without some of the nodes with the slowest network; None where no such choice is
    quicker.
    """
    ordered = sorted(groups, key=lambda group: (-group.device.node_link, -group.device.peak_flops))
    trials = (outcome(job, ordered[:kept], own.placement, own.checkpointing) for kept in range(1, len(ordered)))
    quicker = [trial for trial in trials if trial.epoch_seconds < own.epoch_seconds]
    return min(quicker, key=lambda trial: trial.epoch_seconds, default=None)


def reference_seconds(job: Job, groups: Sequence[NodeGroup]) -> float:
    """Seconds that all GPUs of `groups` together take for one pair's reference log-likelihoods, forwards
    only."""
    speed = sum(group.ranks * group.device.peak_flops * group.device.efficiency for group in groups)
    return job.model.forward_flops() * job.rows_per_pair / speed


def _trained(
    job: Job, trainers: list[NodeGroup], placement: Placement | None, checkpointing: bool, even: bool, **rest: float
) -> Outcome:
    """The outcome on these trainers; `rest` are `ahead_seconds` and `producer_seconds`."""
    ranks = sum(group.ranks for group in trainers)
    memory = job.memory(placement, ranks, checkpointing)
    memories = [memory] * len(trainers)
    caps = micro_caps(trainers, memories, job.pairs)
    work = work_of(job.model, placement, checkpointing, job.rows_per_pair, job.extra_forwards)
    arguments = (trainers, caps, job.pairs, job.model, work, job.sharding, placement)
    balanced = step_time(*arguments)
    ideal = job.pairs * reference_seconds(job, trainers) * job.passes
    if placement and placement.on_trainers:
        rest["drawing_seconds"] = job.drawing_seconds(trainers, producers=False)
    equal = step_time(*arguments, even=True) if even else None
    return Outcome(placement, checkpointing, trainers, [], memories, caps, balanced, equal, job.steps, ideal, **rest)


def _streamed(job: Job, groups: list[NodeGroup], placement: Placement, checkpointing: bool) -> Outcome:
    """The split of the nodes at which the trainers wait least: the fastest train, the slowest produce.

    More trainers train faster and leave fewer producers, so the best split is where the two times cross.
    """
    nodes = sum(group.nodes for group in groups)
    ordered = sorted(groups, key=lambda group: -group.device.peak_flops * group.device.efficiency * group.gpus)

    def split(training: int) -> Outcome:
        trainers, producers = _first_nodes(ordered, training)
        seconds = job.pairs * reference_seconds(job, producers) + job.drawing_seconds(producers, producers=True)
        trained = _trained(job, trainers, placement, checkpointing, even=False, producer_seconds=seconds)
        ideal = job.pairs * reference_seconds(job, groups) * job.passes
        return replace(trained, producers=producers, ideal_step_seconds=ideal)

    if nodes < 2:
        return replace(_trained(job, groups, placement, checkpointing, even=False), balanced=None)
    low, high = 1, nodes - 1
    while low < high:
        middle = (low + high) // 2
        trial = split(middle)
        if trial.balanced is not None and trial.balanced.seconds <= trial.producer_seconds:
            high = middle
        else:
            low = middle + 1
    best = min((split(k) for k in {max(1, low - 1), low}), key=lambda trial: trial.step_seconds)
    ranks = (best.trainers, best.caps, job.pairs, job.model)
    work = work_of(job.model, placement, checkpointing, job.rows_per_pair, job.extra_forwards)
    return replace(best, even=step_time(*ranks, work, job.sharding, placement, even=True))


def _first_nodes(groups: Sequence[NodeGroup], count: int) -> tuple[list[NodeGroup], list[NodeGroup]]:
    """The first `count` nodes of the groups, and the rest."""
    first, rest = [], []
    for group in groups:
        taken = min(group.nodes, count)
        count -= taken
        if taken:
            first.append(replace(group, nodes=taken))
        if taken < group.nodes:
            rest.append(replace(group, nodes=group.nodes - taken))
    return first, rest
