"""The partition of a batch over unequal ranks: exact against brute force, and the loss scale that makes it
invisible."""

import itertools
import random
import time

import pytest
import torch

from cca_ds.balance.partition import BalanceError, largest_micro, measure_speed, partition_batch


def brute_force_seconds(pairs, seconds, caps, seconds_per_forward):
    """Smallest slowest-rank time over every number of forwards and every assignment, by trying them all."""
    best = float("inf")
    for forwards in range(1, pairs + 1):
        limits = [min(pairs, forwards * cap) for cap in caps]
        for counts in itertools.product(*(range(limit + 1) for limit in limits)):
            if sum(counts) == pairs:
                slowest = max(n * s for n, s in zip(counts, seconds, strict=True))
                best = min(best, slowest + forwards * seconds_per_forward)
    return best


@pytest.mark.parametrize("seed", range(120))
def test_no_assignment_beats_the_partition(seed):
    draw = random.Random(seed)
    ranks, pairs = draw.randint(1, 4), draw.randint(1, 9)
    speeds = [1.0, 1.5, 2.0, 3.0, 0.1, 0.7] if seed % 2 else [draw.uniform(0.1, 3) for _ in range(6)]
    seconds = [draw.choice(speeds) for _ in range(ranks)]
    caps = [draw.randint(0, 4) for _ in range(ranks)]
    caps[draw.randrange(ranks)] += 1
    per_forward = draw.choice([0.0, 0.05, 0.5, 2.0])
    result = partition_batch(pairs, seconds, caps, per_forward)
    assert result.seconds == pytest.approx(brute_force_seconds(pairs, seconds, caps, per_forward), rel=1e-12)
    assert sum(result.pairs) == pairs
    slowest = max(n * s for n, s in zip(result.pairs, seconds, strict=True))
    assert result.seconds == pytest.approx(slowest + result.forwards * per_forward, rel=1e-12)
    assert result == partition_batch(pairs, seconds, caps, per_forward)


@pytest.mark.parametrize("seed", range(40))
def test_sizes_are_even_within_memory_and_as_many_on_every_rank(seed):
    draw = random.Random(1000 + seed)
    ranks = draw.randint(1, 12)
    seconds, caps = [draw.uniform(0.1, 2) for _ in range(ranks)], [draw.randint(1, 6) for _ in range(ranks)]
    result = partition_batch(draw.randint(1, 200), seconds, caps)
    for sizes, cap in zip(result.micro_sizes, caps, strict=True):
        assert len(sizes) == result.forwards
        assert max(sizes) <= cap
        assert max(sizes) - min(sizes) <= 1
    taken = [position for rank in range(ranks) for span in result.positions(rank) for position in span]
    assert taken == list(range(sum(result.pairs)))  # every pair once, in the order of the global batch


def test_by_hand():
    """Three to one: a rank three times slower gets a quarter; memory then forces a second forward."""
    free = partition_batch(32, [1.0, 3.0], [32, 32])
    assert free.pairs == (24, 8) and free.forwards == 1 and free.seconds == 24.0
    capped = partition_batch(32, [1.0, 3.0], [12, 32])
    assert capped.micro_sizes == ((12, 12), (4, 4)) and capped.seconds == 24.0
    # A forward that costs 10 s is worth avoiding: one forward of (12, 20) takes 60 + 10, two take 24 + 20.
    assert partition_batch(32, [1.0, 3.0], [12, 32], 10.0).forwards == 2
    # At 40 s a forward, one of (12, 20) takes 100 and two take 104.
    assert partition_batch(32, [1.0, 3.0], [12, 32], 40.0).micro_sizes == ((12,), (20,))


def test_ties_take_the_fewest_forwards_and_the_lower_rank():
    assert partition_batch(3, [1.0, 1.0], [4, 4]).micro_sizes == ((2,), (1,))
    assert partition_batch(1, [1.0, 1.0, 1.0], [1, 1, 1]).pairs == (1, 0, 0)


def test_ranks_without_pairs_run_dummy_forwards_of_weight_zero():
    result = partition_batch(4, [1.0, 100.0, 1.0], [2, 2, 0])
    assert result.micro_sizes == ((2, 2), (0, 0), (0, 0))
    assert result.positions(1) == [range(4, 4), range(4, 4)]


def test_the_stated_loss_scale_makes_the_average_over_ranks_that_of_the_whole_batch():
    """Mean over ranks of n_r W / n times the rank's mean loss, and of its summed losses times W / n."""
    losses = torch.randn(23, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    result, ranks, pairs = partition_batch(23, [1.0, 2.5, 7.0, 900.0], [4, 3, 1, 1]), 4, 23
    by_rank = by_forward = 0.0
    for rank in range(ranks):
        own = [losses[span.start : span.stop] for span in result.positions(rank)]
        if result.pairs[rank]:
            by_rank += torch.cat(own).mean() * result.pairs[rank] * ranks / pairs / ranks
        by_forward += sum(part.sum() * ranks / pairs for part in own) / ranks
    assert result.pairs[3] == 0 and result.forwards > 1
    assert by_rank.item() == pytest.approx(losses.mean().item(), rel=1e-12)
    assert by_forward.item() == pytest.approx(losses.mean().item(), rel=1e-12)


def test_thousands_of_ranks_are_partitioned_within_a_second():
    seconds = [0.1] * 2048 + [0.3] * 1024 + [0.9] * 1024
    start = time.process_time()
    result = partition_batch(16384, seconds, [8] * 2048 + [4] * 2048)
    assert time.process_time() - start < 1.0
    assert result.seconds == pytest.approx(16384 / sum(1 / s for s in seconds), rel=0.2)


def test_description_groups_equal_ranks():
    line = partition_batch(7, [1.0, 1.0, 3.0], [8, 8, 8]).describe()
    assert "rank 0-1: 3" in line and "rank 2: 1" in line and "forwards 1" in line and "\n" not in line


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((0, [1.0], [1]), "0 pairs"),
        ((4, [1.0], [1, 2]), "1 speeds for 2"),
        ((4, [1.0, 0.0], [1, 2]), "rank 1 has 0.0"),
        ((4, [1.0, float("nan")], [1, 2]), "rank 1 has nan"),
        ((4, [1.0], [0]), "not one pair fits"),
        ((4, [1.0], [-1]), "must not be negative"),
        ((4, [], []), "0 speeds"),
    ],
)
def test_an_impossible_partition_gives_the_reason(arguments, reason):
    with pytest.raises(BalanceError, match=reason):
        partition_batch(*arguments)


def test_largest_micro():
    assert largest_micro(100, 10, 30) == 3
    assert largest_micro(100, 10, 90) == 1
    assert largest_micro(100, 120, 30) == 0


class Clock:
    """A clock that only `step` moves, so that speeds are exact."""

    def __init__(self, cost):
        self.now, self.cost, self.calls = 0.0, cost, []

    def perf_counter(self):
        return self.now

    def step(self, size):
        self.now += self.cost(size, len(self.calls))
        self.calls.append(size)


def measured(monkeypatch, cost, pairs, repeats=5):
    clock = Clock(cost)
    monkeypatch.setattr("cca_ds.balance.partition.time.perf_counter", clock.perf_counter)
    return measure_speed(clock.step, pairs, repeats), clock


def test_speed_is_the_time_of_a_pass_over_its_pairs(monkeypatch):
    speed, clock = measured(monkeypatch, lambda size, call: 5.0 + 0.25 * size, 4)
    assert speed == pytest.approx(6.0 / 4)
    assert clock.calls == [4] * 6  # one pass to warm up, five timed


def test_warm_up_and_bursts_do_not_count(monkeypatch):
    """The first pass and two of the five timed ones are a hundred times slower."""
    speed, _ = measured(monkeypatch, lambda size, call: size * (100.0 if call in (0, 2, 4) else 1.0), 2)
    assert speed == pytest.approx(1.0)


def test_speed_of_real_passes_grows_with_the_model(device):
    def step_of(width):
        layer = torch.nn.Linear(width, width, device=device)
        return lambda size: layer(torch.ones(16 * size, width, device=device)).sum().backward()

    wide = 2048 if device == "cpu" else 16384  # of a small one a GPU times the launches, whatever its width
    assert measure_speed(step_of(wide), 16, 5) > measure_speed(step_of(16), 16, 5)  # a hundred times, when alone


def test_a_partition_at_a_fixed_number_of_forwards():
    assert partition_batch(16, [1.0, 3.0], [4, 4]).forwards == 3
    fixed = partition_batch(16, [1.0, 3.0], [4, 4], forwards=4)
    assert fixed.forwards == 4 and fixed.pairs == (12, 4)
    assert partition_batch(16, [1.0, 3.0], [4, 4], forwards=2).pairs == (8, 8)  # the caps leave no choice
    with pytest.raises(BalanceError, match="do not fit in 1 forwards"):
        partition_batch(16, [1.0, 3.0], [4, 4], forwards=1)
