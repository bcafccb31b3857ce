"""Seconds of one step on unequal GPUs, from a batch's partition, the model's operations and the links.

A step is F forwards (see `cca_ds/balance/partition.py`), each a chain of passes over the layers: reference, forwards of
the policy without gradient where the loss has any, its forward, its backward. In a pass, layer after layer is gathered
on the link while the one before is computed; both queues are in order, so a pass of U layers with c seconds of
computing and g of link a layer takes U max(c, g) + min(c, g). Ranks wait for one another at every gather, so c is the
slowest rank's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cca_ds.balance.memory import USABLE_SHARE, Memory, Sharding
from cca_ds.balance.partition import BalanceError, Partition, largest_micro, partition_batch
from cca_ds.cluster.devices import Device
from cca_ds.models.cost import ModelCost
from cca_ds.planning.nodes import LINK_SHARE, NodeGroup
from cca_ds.reference.placements import Placement

HOP_SECONDS = 5e-6  # a collective's latency, for each doubling of the ranks
OPTIMIZER_BYTES = 28  # AdamW reads and writes weights, gradient, master weight and two moments, a parameter
BYTES = 2  # of a gathered weight and of a reduced gradient


@dataclass(frozen=True)
class Work:
    """Operations of one pair, pass by pass; the passes of a forward run one after another."""

    reference: float
    extra: float  # of the policy, without gradient
    forward: float
    backward: float

    @property
    def total(self) -> float:
        """Operations of one pair on the trainers."""
        return self.reference + self.extra + self.forward + self.backward


@dataclass(frozen=True)
class Links:
    """Seconds that one gather or scatter of the whole model takes on the slowest link on its way.

    `near` is the time within groups of ranks of one node, for hierarchical partitions; without them it equals `far`.
    """

    far: float
    near: float
    far_bytes: float  # that every GPU receives in one such gather


@dataclass(frozen=True)
class StepTime:
    """A partition with its predicted time.

    `compute_seconds` and `link_seconds` are each resource's own time, `seconds` the step's with both overlapped;
    `link_bytes` is what every GPU receives. `efficiency` is the time of a perfect split without links over `seconds`.
    """

    partition: Partition
    seconds: float
    compute_seconds: float
    link_seconds: float
    link_bytes: float
    efficiency: float


def work_of(
    model: ModelCost, placement: Placement | None, checkpointing: bool, rows_per_pair: int = 2, extra_forwards: int = 0
) -> Work:
    """A backward is two forwards, three with the recomputation; a reference on the trainers one forward more."""
    forward = model.forward_flops() * rows_per_pair
    reference = forward if placement and placement.on_trainers else 0.0
    return Work(reference, forward * extra_forwards, forward, forward * (3 if checkpointing else 2))


def rank_devices(groups: Sequence[NodeGroup]) -> list[Device]:
    """The device of each rank, nodes in the order of the allocation."""
    return [group.device for group in groups for _ in range(group.ranks)]


def links_of(groups: Sequence[NodeGroup], model: ModelCost, sharding: Sharding) -> Links:
    """A ring over all ranks: nodes exchange over the slowest network, GPUs of a node over the slowest
    link."""
    size = model.parameters * BYTES
    ranks, nodes = sum(group.ranks for group in groups), sum(group.nodes for group in groups)
    network = min(group.device.node_link for group in groups) * LINK_SHARE
    inside = min(group.device.gpu_link for group in groups) * LINK_SHARE
    latency = HOP_SECONDS * math.log2(max(ranks, 1)) * model.layers
    across = size * (nodes - 1) / nodes / network
    within = size * (ranks - 1) / ranks / inside
    far = max(across, within) + latency if ranks > 1 else 0.0
    near = far
    if sharding.hierarchical > 1:
        part = min(sharding.hierarchical, ranks)
        near = size * (part - 1) / part / inside + HOP_SECONDS * math.log2(part) * model.layers
    return Links(far, near, size * (ranks - 1) / ranks)


def pass_links(
    links: Links, sharding: Sharding, placement: Placement | None, extra_forwards: float = 0.0
) -> tuple[float, float, float, float]:
    """Link seconds of the passes of one forward of a step, in the order of `Work`."""
    reference = links.far if placement and placement.sharded else 0.0
    if sharding.stage < 3:
        return (reference, 0.0, 0.0, links.far if sharding.stage == 2 else 0.0)
    return (reference, links.far * extra_forwards, links.far, links.near + links.far)


def pass_seconds(layers: int, compute: float, link: float) -> float:
    """U max(c, g) + min(c, g) for a pass of `compute` = U c seconds of computing and `link` = U g of link."""
    return max(compute, link) + min(compute, link) / layers


def micro_caps(groups: Sequence[NodeGroup], memories: Sequence[Memory], pairs: int) -> list[int]:
    """Most pairs that fit in one forward, for every group; at most the global batch."""
    caps = []
    for group, memory in zip(groups, memories, strict=True):
        usable = group.device.memory_bytes * USABLE_SHARE
        caps.append(min(pairs, largest_micro(usable, memory.fixed, memory.activations_per_pair)))
    return caps


def step_time(
    groups: Sequence[NodeGroup],
    caps: Sequence[int],
    pairs: int,
    model: ModelCost,
    work: Work,
    sharding: Sharding,
    placement: Placement | None,
    even: bool = False,
) -> StepTime | None:
    """The predicted step of a balanced partition, or of an `even` one; None where not a pair fits.

    An even partition gives every rank the same number of pairs, in micro-batches that fit on the smallest GPU.
    """
    devices = rank_devices(groups)
    speeds = {g.device.name: work.total / (g.device.peak_flops * g.device.efficiency) for g in groups}
    seconds = [speeds[device.name] for device in devices]
    limits = [cap for group, cap in zip(groups, caps, strict=True) for _ in range(group.ranks)]
    links = links_of(groups, model, sharding)
    per_pass = pass_links(links, sharding, placement, work.extra / work.forward)
    candidates = []
    try:
        if even:
            candidates.append(partition_batch(pairs, [1.0] * len(devices), [min(limits)] * len(devices)))
        else:
            # The link hides behind the computing or the other way round; the better of both partitions is taken.
            for exposed in (sum(per_pass) / model.layers, sum(per_pass)):
                candidates.append(partition_batch(pairs, seconds, limits, exposed))
    except BalanceError:
        return None
    times = [_evaluate(one, seconds, devices, model, work, sharding, links, per_pass) for one in candidates]
    return min(times, key=lambda time: time.seconds)


def _evaluate(
    batch: Partition,
    seconds: Sequence[float],
    devices: Sequence[Device],
    model: ModelCost,
    work: Work,
    sharding: Sharding,
    links: Links,
    per_pass: tuple[float, float, float, float],
) -> StepTime:
    shares = [part / work.total for part in (work.reference, work.extra, work.forward, work.backward)]
    kinds = set(zip(batch.micro_sizes, seconds, strict=True))
    total = compute = 0.0
    for index in range(batch.forwards):
        # A rank without pairs runs a dummy pair, which takes as long as a true one.
        slowest = max(max(sizes[index], 1) * second for sizes, second in kinds)
        compute += slowest
        for share, link in zip(shares, per_pass, strict=True):
            total += pass_seconds(model.layers, slowest * share, link)
    once = links.far * gathers_a_step(sharding)
    shard = len(devices) if sharding.stage >= 1 else 1
    update = model.parameters / shard * OPTIMIZER_BYTES / min(device.memory_bandwidth for device in devices)
    perfect = sum(batch.pairs) / sum(1 / second for second in seconds)
    total += once + update
    link_seconds = batch.forwards * sum(per_pass) + once
    near = batch.forwards * links.near if sharding.stage == 3 and sharding.hierarchical > 1 else 0.0
    gathers = round((link_seconds - near) / links.far) if links.far else 0
    return StepTime(batch, total, compute, link_seconds, gathers * links.far_bytes, perfect / total)


def gathers_a_step(sharding: Sharding) -> int:
    """Exchanges of the whole model once a step: at stage 3 none, at 2 the new weights, below the gradients
    too."""
    return {3: 0, 2: 1}.get(sharding.stage, 2)
