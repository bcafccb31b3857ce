"""The planner's time: against a simulated schedule, by hand, and the best of all splits."""

import pytest

from cca_ds.balance.memory import Sharding
from cca_ds.cluster.devices import DEVICES
from cca_ds.config.recipes import load_recipe
from cca_ds.models.cost import model_cost
from cca_ds.planning.job import job_of as job_of_recipe
from cca_ds.planning.job import placement_of
from cca_ds.planning.nodes import parse_nodes
from cca_ds.planning.outcomes import _first_nodes, _trained, leaner_outcome, outcome, reference_seconds
from cca_ds.planning.step_time import links_of, micro_caps, pass_seconds, rank_devices, step_time, work_of
from cca_ds.reference.placements import PLACEMENTS
from cca_ds.training.workload import trained_flops, workload_of
from tests.support.planning import ZERO3, job_of

MIXED = "4xh100:8,2xa100:8,4xa40:8"


def simulated_pass(layers, computes, gather):
    """Seconds of a pass: on every rank a link queue and a computing queue, both in order, layer by layer.

    A gather begins when all ranks' links are free, and at most two layers ahead of the slowest rank's
    computing; layer u computes once it is gathered and layer u - 1 is done.
    """
    link_free, done = 0.0, [[0.0] * len(computes)]
    for layer in range(layers):
        window = max(done[max(0, layer - 1)])  # two layers ahead: prefetch buckets are finite
        link_free = max(link_free, window) + gather
        done.append([max(before, link_free) + compute for before, compute in zip(done[-1], computes, strict=True)])
    return max(done[-1])


@pytest.mark.parametrize("ratio", [0.01, 0.3, 0.9, 1.0, 1.1, 3.0, 50.0])
@pytest.mark.parametrize("layers", [4, 24])
def test_a_pass_takes_what_its_simulated_schedule_takes(layers, ratio):
    computes, gather = [0.010, 0.004, 0.007], 0.010 * ratio
    simulated = simulated_pass(layers, computes, gather)
    assert pass_seconds(layers, layers * max(computes), layers * gather) == pytest.approx(simulated, rel=0.02)


@pytest.mark.parametrize(("placement", "extra"), [("inference", 0), ("zero3", 0), ("cached", 0), (None, 1)])
@pytest.mark.parametrize("nodes", ["1xh100:4", "2xh100:2,1xa40:2", "1xa100:2,2xa40:4"])
def test_a_step_takes_what_its_simulated_schedule_takes(nodes, placement, extra):
    """All forwards of all ranks, pass after pass, beside the planner's sum; 2% is allowed for the
    optimizer."""
    job, groups = job_of("llamagen-xl", pairs=48), parse_nodes(nodes)
    devices = rank_devices(groups)
    record = PLACEMENTS[placement] if placement else None
    memory = job.memory(record, len(devices), True)
    caps = [min(cap, 5) for cap in micro_caps(groups, [memory] * len(groups), job.pairs)]  # several forwards
    work = work_of(job.model, record, True, extra_forwards=extra)
    step = step_time(groups, caps, job.pairs, job.model, work, ZERO3, record)
    gather = links_of(groups, job.model, ZERO3).far / job.model.layers
    gathers = {"reference": gather * (placement == "zero3"), "extra": gather * extra}
    gathers |= {"forward": gather, "backward": 2 * gather}
    total = 0.0
    for forward in range(step.partition.forwards):
        for name, seconds in gathers.items():
            flops = getattr(work, name) / job.model.layers
            computes = [
                max(sizes[forward], 1) * flops / (device.peak_flops * device.efficiency)
                for sizes, device in zip(step.partition.micro_sizes, devices, strict=True)
            ]
            total += simulated_pass(job.model.layers, computes, seconds)
    assert step.partition.forwards > 1
    assert step.seconds == pytest.approx(total, rel=0.02)


def test_one_gpu_by_hand():
    """No link: FLOPs over the stated rate, and 28 bytes a parameter through the memory once a step."""
    job, groups = job_of("llamagen-b"), parse_nodes("1xh100:1")
    found = outcome(job, groups, PLACEMENTS["cached"], False)
    flops = 6 * job.model.forward_flops() * job.pairs
    h100 = DEVICES["h100"]
    update = 28 * job.model.parameters / h100.memory_bandwidth
    assert found.balanced.seconds == pytest.approx(flops / (h100.peak_flops * h100.efficiency) + update, rel=1e-9)
    assert found.balanced.link_bytes == found.balanced.link_seconds == 0
    ahead = 1_281_167 * 2 * job.model.forward_flops() / (h100.peak_flops * h100.efficiency)
    assert found.epoch_seconds == pytest.approx(5004 * found.balanced.seconds + ahead, rel=1e-9)
    assert found.gpu_hours == pytest.approx(found.epoch_seconds / 3600)
    assert found.efficiency == pytest.approx(1.0, abs=0.01)


def test_guidance_free_training_takes_half_the_operations_of_cca():
    """Recipe beside recipe: 4 forwards of one sequence against 8 of two, one of the 4 without gradient."""
    seconds, operations = [], []
    for name in ("llamagen-b", "llamagen-b-gft"):
        run = load_recipe(name)
        job = job_of_recipe(run, model_cost(run.model.preset, run.model.shape), ZERO3, 1_281_167)
        found = outcome(job, parse_nodes("1xh100:1"), placement_of(run), False)
        h100 = DEVICES["h100"]
        seconds.append(found.balanced.seconds - 28 * job.model.parameters / h100.memory_bandwidth)
        operations.append(trained_flops(run, workload_of(run, {}, 1, "bf16")))
        assert job.rows_per_pair * job.passes * job.model.forward_flops() == pytest.approx(operations[-1])
    assert seconds[1] / seconds[0] == pytest.approx(0.5, abs=1e-3)  # the embedding of beta is the rest
    assert operations[1] / operations[0] == pytest.approx(0.5, abs=1e-3)


def test_links_by_hand():
    """Two nodes of 4: half of the weights cross the network, at 80% of 25 GB/s; three exchanges a forward."""
    job, groups = job_of("llamagen-3b"), parse_nodes("2xa40:4")
    size = job.model.parameters * 2
    links = links_of(groups, job.model, ZERO3)
    assert links.far == pytest.approx(max(size / 2, size * 7 / 8) / (0.8 * 25e9), rel=3e-3)  # PCIe is the slower here
    found = outcome(job, groups, PLACEMENTS["inference"], True).balanced
    assert found.link_bytes == pytest.approx(3 * found.partition.forwards * size * 7 / 8, rel=1e-9)
    four = outcome(job, groups, PLACEMENTS["zero3"], True).balanced
    assert four.link_bytes == pytest.approx(4 * four.partition.forwards * size * 7 / 8, rel=1e-9)
    hierarchical = Sharding.of({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 4}})
    slow = parse_nodes("2xa100:4", networks="a100=5")
    assert (
        outcome(job_of(sharding=hierarchical), slow, PLACEMENTS["cached"], True).balanced.seconds
        < outcome(job_of(), slow, PLACEMENTS["cached"], True).balanced.seconds
    )


def test_balanced_partitions_beat_even_ones_on_mixed_nodes_and_equal_them_on_equal_ones():
    mixed = outcome(job_of(), parse_nodes("2xh100:8,2xa40:8"), PLACEMENTS["inference"], True)
    assert mixed.balanced.seconds < 0.5 * mixed.even.seconds
    assert mixed.efficiency > 2 * mixed.even_efficiency
    equal = outcome(job_of(), parse_nodes("2xh100:8"), PLACEMENTS["inference"], True)
    assert equal.balanced.seconds == equal.even.seconds


def test_streamed_takes_the_best_of_all_splits():
    job, groups = job_of(), parse_nodes("3xh100:8,3xa100:8,4xa40:8")
    found = outcome(job, groups, PLACEMENTS["streamed"], True)
    best = min(
        max(
            _trained(job, trainers, PLACEMENTS["streamed"], True, even=False).balanced.seconds,
            job.pairs * reference_seconds(job, producers),
        )
        for trainers, producers in (_first_nodes(groups, count) for count in range(1, 10))
    )
    assert found.step_seconds == pytest.approx(best, rel=1e-12)
    assert sum(group.nodes for group in [*found.trainers, *found.producers]) == 10


def test_leaving_slow_nodes_out_is_noticed():
    job, groups = job_of(), parse_nodes(MIXED, networks="a40=2")
    own = outcome(job, groups, PLACEMENTS["inference"], True)
    leaner = leaner_outcome(job, groups, own)
    assert leaner.epoch_seconds < own.epoch_seconds
    assert "a40" not in {group.device.name for group in leaner.trainers}
    equal = parse_nodes("4xh100:8")
    assert leaner_outcome(job, equal, outcome(job, equal, PLACEMENTS["inference"], True)) is None


def test_links_of_unequal_nodes_by_hand():
    """The slowest network and the slowest link inside a node, a latency for each doubling of the ranks and layer."""
    job = job_of("llamagen-3b")
    size, layers = 2 * job.model.parameters, 24
    mixed = links_of(parse_nodes("1xa100:4,1xa40:4", networks="a40=10"), job.model, ZERO3)
    assert mixed.far == pytest.approx(
        max(size / 2 / (0.8 * 10e9), size * 7 / 8 / (0.8 * 25e9)) + 5e-6 * 3 * layers, rel=1e-9
    )
    usual = links_of(parse_nodes("1xa100:4,1xa40:4"), job.model, ZERO3)  # the A40's own link is the slowest
    assert usual.far == pytest.approx(size * 7 / 8 / (0.8 * 25e9) + 5e-6 * 3 * layers, rel=1e-9)
    assert mixed.near == mixed.far and mixed.far_bytes == size * 7 / 8
    four = links_of(parse_nodes("4xa100:1", networks="a100=10"), job.model, ZERO3)  # three quarters cross the network
    assert four.far == pytest.approx(size * 3 / 4 / (0.8 * 10e9) + 5e-6 * 2 * layers, rel=1e-9)
    hierarchical = Sharding.of({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 4}})
    inside = links_of(parse_nodes("2xa100:4"), job.model, hierarchical)
    assert inside.near == pytest.approx(size * 3 / 4 / (0.8 * 300e9) + 5e-6 * 2 * layers, rel=1e-9)
    pair = links_of(parse_nodes("1xa100:2"), job.model, hierarchical)  # fewer ranks than the partition asks for
    assert pair.near == pytest.approx(size / 2 / (0.8 * 300e9) + 5e-6 * layers, rel=1e-9)
    one = links_of(parse_nodes("1xa100:1"), job.model, ZERO3)
    assert (one.far, one.near, one.far_bytes) == (0.0, 0.0, 0.0)


def sharded(stage, hierarchical=1):
    return Sharding.of({"zero_optimization": {"stage": stage, "zero_hpz_partition_size": hierarchical}})


@pytest.mark.parametrize("placement", ["cached", "inference", "zero3"])
@pytest.mark.parametrize("sharding", [sharded(0), sharded(1), sharded(2), sharded(3), sharded(3, 2)], ids=str)
def test_a_step_of_two_forwards_by_hand(sharding, placement):
    """Four A100 in two nodes, eight pairs in two forwards of one pair each, with and without what the links add."""
    job, groups = job_of("llamagen-b", pairs=8, sharding=sharding), parse_nodes("2xa100:2", networks="a100=2")
    model, record, layers = job.model, PLACEMENTS[placement], 12
    found = step_time(groups, [1], 8, model, work_of(model, record, False), sharding, record)
    assert found.partition.pairs == (2, 2, 2, 2) and found.partition.forwards == 2
    links = links_of(groups, model, sharding)
    rate = 312e12 * 0.5
    forward = 2 * model.forward_flops() / rate  # a pair's two rows
    per_pass = {
        "reference": (forward * (placement != "cached"), links.far * (placement == "zero3")),
        "forward": (forward, links.far * (sharding.stage == 3)),
        "backward": (2 * forward, {2: links.far, 3: links.near + links.far}.get(sharding.stage, 0.0)),
    }
    chain = sum(max(c, g) + min(c, g) / layers for c, g in per_pass.values())
    once = links.far * {0: 2, 1: 2, 2: 1, 3: 0}[sharding.stage]
    update = 28 * model.parameters / (4 if sharding.stage else 1) / 2000e9
    assert found.seconds == pytest.approx(2 * chain + once + update, rel=1e-9)
    assert found.compute_seconds == pytest.approx(2 * sum(c for c, _ in per_pass.values()), rel=1e-9)
    assert found.link_seconds == pytest.approx(2 * sum(g for _, g in per_pass.values()) + once, rel=1e-9)
    gathers = {0: 2, 1: 2, 2: 3, 3: 6 if sharding.hierarchical == 1 else 4}[sharding.stage]
    gathers += 2 * (placement == "zero3")
    assert found.link_bytes == pytest.approx(gathers * links.far_bytes, rel=1e-9)
    perfect = 8 * sum(c for c, _ in per_pass.values()) / 4
    assert found.efficiency == pytest.approx(perfect / found.seconds, rel=1e-9)


def test_bytes_of_a_hierarchical_step_leave_the_exchanges_within_a_group_out():
    """Two thirds of a gather's time within the pairs of one node, which would round to a gather more."""
    job, groups = job_of("llamagen-b", pairs=4, sharding=sharded(3, 2)), parse_nodes("1xa100:4")
    record = PLACEMENTS["cached"]
    for pairs, forwards in ((4, 1), (12, 3)):
        found = step_time(groups, [1], pairs, job.model, work_of(job.model, record, False), sharded(3, 2), record)
        assert found.partition.forwards == forwards
        assert found.link_bytes == pytest.approx(2 * forwards * 2 * job.model.parameters * 3 / 4, rel=1e-9)


def test_unequal_gpus_by_hand():
    """The update waits for the slowest memory; an even share is what fits on the smallest; perfect shares by speed."""
    job, groups = job_of("llamagen-b", pairs=4, sharding=sharded(0)), parse_nodes("1xh100:1,1xa40:1")
    record = PLACEMENTS["cached"]
    work = work_of(job.model, record, False)
    assert work.total == work.reference + work.extra + work.forward + work.backward == 6 * job.model.forward_flops()
    fast, slow = (work.total / (d.peak_flops * d.efficiency) for d in (DEVICES["h100"], DEVICES["a40"]))
    even = step_time(groups, [4, 1], 4, job.model, work, sharded(0), record, even=True)
    assert even.partition.micro_sizes == ((1, 1), (1, 1))  # one pair at a time, as on the A40
    far = links_of(groups, job.model, sharded(0)).far
    update = 28 * job.model.parameters / 696e9
    assert even.seconds == pytest.approx(2 * slow + 2 * far + update, rel=1e-9)
    perfect = 4 / (1 / fast + 1 / slow)
    assert even.efficiency == pytest.approx(perfect / even.seconds, rel=1e-9)
    balanced = step_time(groups, [4, 4], 4, job.model, work, sharded(0), record)
    assert balanced.partition.pairs == (4, 0) and balanced.compute_seconds == pytest.approx(max(4 * fast, slow))
    assert step_time(groups, [0, 0], 4, job.model, work, sharded(0), record) is None
    assert step_time(groups, [4, 0], 4, job.model, work, sharded(0), record, even=True) is None


def test_caps_by_hand():
    job, groups = job_of("llamagen-b", pairs=150), parse_nodes("1xh100:1,1xa40:1")
    memory = job.memory(PLACEMENTS["cached"], 2, False)
    each = [int((0.94 * gib * 2**30 - memory.fixed) // memory.activations_per_pair) for gib in (80, 48)]
    assert micro_caps(groups, [memory, memory], 150) == [min(150, cap) for cap in each] and each[1] < 150
