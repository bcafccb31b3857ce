"""What each placement of the reference makes of an allocation: memory, micro-batches, step, epoch, GPU
hours."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cca_ds.planning.architecture import Architecture
from cca_ds.planning.memory import Memory, Sharding, memory_of
from cca_ds.planning.nodes import NodeGroup
from cca_ds.planning.step_time import StepTime, micro_caps, step_time, work_of

PLACEMENTS = ("inference", "zero3", "cached", "streamed")


@dataclass(frozen=True)
class Job:
    """What is to be trained: `pairs` a step, `images` an epoch, 2 sequences a pair where negatives count."""

    model: Architecture
    sharding: Sharding
    pairs: int
    images: int
    sequences: int = 2
    reference_offload: bool = False
    tensor_parallel: int = 1
    element_bytes: int = 2

    @property
    def steps(self) -> int:
        """Steps of an epoch; the last, incomplete batch is left out."""
        return max(1, self.images // self.pairs)


@dataclass(frozen=True)
class Outcome:
    """One placement, with or without activation checkpointing, on one allocation.

    `memories` and `caps` (largest micro-batch) stand for the groups of `trainers`. `balanced` and `even` are
    None where not one pair fits on any GPU, or an even share not on the smallest; `producer_seconds` is
    what a streamed reference of one step takes its producers, `ahead_seconds` what a cached one takes before
    each epoch.
    """

    placement: str
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

    @property
    def step_seconds(self) -> float:
        """Of the balanced cut, and no less than the producers need for a step."""
        return max(self.balanced.seconds, self.producer_seconds) if self.balanced else float("inf")

    @property
    def epoch_seconds(self) -> float:
        """Steps and, for a cached reference, the log-likelihoods computed before them."""
        return self.steps * self.step_seconds + self.ahead_seconds

    @property
    def efficiency(self) -> float:
        """Share of the allocation that is put to use: the time that all its GPUs would need for what must be
        computed (not what is recomputed), over the epoch's.
        """
        return self.steps * self.ideal_step_seconds / self.epoch_seconds

    @property
    def even_step_seconds(self) -> float:
        """Of the even cut; infinite where it does not fit."""
        return max(self.even.seconds, self.producer_seconds) if self.even else float("inf")

    @property
    def even_efficiency(self) -> float:
        """The allocation's share under the even cut, 0 where that does not fit."""
        return (
            self.steps * self.ideal_step_seconds / (self.steps * self.even_step_seconds + self.ahead_seconds)
        )

    @property
    def gpu_hours(self) -> float:
        """Of an epoch, on trainers and producers together."""
        gpus = sum(group.ranks for group in [*self.trainers, *self.producers])
        return gpus * self.epoch_seconds / 3600


def outcome(job: Job, groups: Sequence[NodeGroup], placement: str, checkpointing: bool) -> Outcome:
    """Memory and time of one placement."""
    if placement == "streamed":
        return _streamed(job, list(groups), checkpointing)
    ahead = job.images * reference_seconds(job, groups) if placement == "cached" else 0.0
    return _trained(job, list(groups), placement, checkpointing, even=True, ahead_seconds=ahead)


def leaner_outcome(job: Job, groups: Sequence[NodeGroup], own: Outcome) -> Outcome | None:
    """`own`, the recipe's placement, without some of the slowest networks' nodes, where that is quicker."""
    ordered = sorted(groups, key=lambda group: (-group.device.node_link, -group.device.peak_flops))
    trials = (
        outcome(job, ordered[:kept], own.placement, own.checkpointing) for kept in range(1, len(ordered))
    )
    quicker = [trial for trial in trials if trial.epoch_seconds < own.epoch_seconds]
    return min(quicker, key=lambda trial: trial.epoch_seconds, default=None)


def reference_seconds(job: Job, groups: Sequence[NodeGroup]) -> float:
    """Seconds that all GPUs of `groups` together take for one pair's reference log-likelihoods, forwards
    only."""
    speed = sum(group.ranks * group.device.peak_flops * group.device.efficiency for group in groups)
    return job.model.forward_flops() * job.sequences / speed


def _trained(
    job: Job, trainers: list[NodeGroup], placement: str, checkpointing: bool, even: bool, **rest: object
) -> Outcome:
    ranks = sum(group.ranks for group in trainers)
    memory = memory_of(
        job.model,
        job.sharding,
        ranks,
        placement,
        checkpointing,
        reference_offload=job.reference_offload,
        tensor_parallel=job.tensor_parallel,
        sequences_per_pair=job.sequences,
        element_bytes=job.element_bytes,
    )
    memories = [memory] * len(trainers)
    caps = micro_caps(trainers, memories, job.pairs)
    work = work_of(job.model, placement, checkpointing, job.sequences)
    arguments = (trainers, caps, job.pairs, job.model, work, job.sharding, placement)
    balanced = step_time(*arguments)
    ideal = job.pairs * reference_seconds(job, trainers) * (4 if job.sequences == 2 else 3)
    equal = step_time(*arguments, even=True) if even else None
    return Outcome(
        placement, checkpointing, trainers, [], memories, caps, balanced, equal, job.steps, ideal, **rest
    )


def _streamed(job: Job, groups: list[NodeGroup], checkpointing: bool) -> Outcome:
    """The split of the nodes at which the trainers wait least: the fastest train, the slowest produce.

    More trainers train faster and leave fewer producers, so the best split is where the two times cross.
    """
    nodes = sum(group.nodes for group in groups)
    ordered = sorted(
        groups, key=lambda group: -group.device.peak_flops * group.device.efficiency * group.gpus
    )

    def split(training: int) -> Outcome:
        trainers, producers = _first_nodes(ordered, training)
        seconds = job.pairs * reference_seconds(job, producers)
        trained = _trained(job, trainers, "streamed", checkpointing, even=False, producer_seconds=seconds)
        ideal = job.pairs * reference_seconds(job, groups) * 4
        return replace(trained, producers=producers, ideal_step_seconds=ideal)

    if nodes < 2:
        return replace(_trained(job, groups, "streamed", checkpointing, even=False), balanced=None)
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
    work = work_of(job.model, "streamed", checkpointing, job.sequences)
    return replace(best, even=step_time(*ranks, work, job.sharding, "streamed", even=True))


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
