"""The partition of a global batch over ranks of unequal speed and memory.

Letters: R ranks (W of them), n pairs of the global batch, n_r pairs of rank r, F forwards of a step.

ZeRO-3 forwards are collective: every rank gathers the same weights in the same order, so all ranks run the
same number F of forwards, and a rank that has nothing to do in one of them still runs it, on a dummy pair of
weight 0.
"""

import heapq
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


class BalanceError(ValueError):
    """A balance section or a partition that no assignment of pairs to ranks satisfies."""


@dataclass(frozen=True)
class Partition:
    """Which rank computes which pairs of every global batch, and in which forward.

    `micro_sizes[r][f]` is the number of pairs that rank r takes in forward f; 0 means a dummy forward of
    weight 0. Ranks take contiguous stretches of the global batch in the order of their rank, forwards
    contiguous stretches of their rank's. `seconds` is the predicted time of the slowest rank.

    Loss scale: DeepSpeed averages gradients over the W ranks, so the mean loss of a rank with n_r of n pairs
    counts n_r W / n; forward by forward that is its loss summed over pairs, times W / n, with no division by F.
    """

    micro_sizes: tuple[tuple[int, ...], ...]
    seconds: float

    @property
    def forwards(self) -> int:
        """Number F of forwards, the same on every rank: DeepSpeed's gradient accumulation steps."""
        return len(self.micro_sizes[0])

    @property
    def pairs(self) -> tuple[int, ...]:
        """Pairs n_r of each rank; their sum is the global batch."""
        return tuple(sum(sizes) for sizes in self.micro_sizes)

    def positions(self, rank: int) -> list[range]:
        """Positions in the global batch that each forward of `rank` takes; empty for a dummy forward."""
        start = sum(self.pairs[:rank])
        stretches = []
        for size in self.micro_sizes[rank]:
            stretches.append(range(start, start + size))
            start += size
        return stretches

    def describe(self, timed: bool = True) -> str:
        """One line for the log: forwards, pairs per rank (equal neighbours together), seconds where `timed`."""
        runs: list[list[int]] = []
        for rank, pairs in enumerate(self.pairs):
            if runs and runs[-1][2] == pairs:
                runs[-1][1] = rank
            else:
                runs.append([rank, rank, pairs])
        names = (f"{a}" if a == b else f"{a}-{b}" for a, b, _ in runs)
        assignment = ", ".join(f"rank {name}: {run[2]}" for name, run in zip(names, runs, strict=True))
        predicted = f"; predicted {self.seconds:.4g} s" if timed else ""
        return f"forwards {self.forwards}; pairs of {assignment}{predicted}"


def partition_batch(
    pairs: int,
    seconds_per_pair: Sequence[float],
    max_micro: Sequence[int],
    seconds_per_forward: float = 0.0,
    forwards: int | None = None,
) -> Partition:
    """The assignment of `pairs` to ranks whose slowest rank finishes first; exact.

    Minimises max_r n_r seconds_per_pair[r] + F seconds_per_forward over all (F, n_1 .. n_R) with sum n_r =
    pairs and 0 <= n_r <= F max_micro[r]. Among equally fast ones it takes the fewest forwards; pairs then go
    one by one to the rank that would finish them first, the lower rank where two would at once. The answer
    depends on the arguments only, so that ranks that hold the same measurements agree without communication.

    Args:
        pairs: global batch, at least 1.
        seconds_per_pair: one per rank, of forward and backward, positive.
        max_micro: largest micro-batch in pairs that fits in each rank's memory; a rank with 0 runs dummy forwards
            only.
        seconds_per_forward: what a forward costs whatever its size, the same on every rank.
        forwards: use this F, for an engine that is already built with it; None finds the best.

    Raises:
        BalanceError: when no assignment exists or an argument is out of range.
    """
    _check(pairs, seconds_per_pair, max_micro, seconds_per_forward)
    kinds: dict[tuple[float, int], list[int]] = {}  # thousands of ranks are a handful of kinds
    for rank, kind in enumerate(zip(seconds_per_pair, max_micro, strict=True)):
        kinds.setdefault(kind, []).append(rank)
    floor_seconds = _assign(pairs, [_Kind(s, pairs if cap else 0, r) for (s, cap), r in kinds.items()]).slowest
    best: tuple[float, int, _Assignment] | None = None
    fewest = -(-pairs // sum(max_micro))
    if forwards is not None and forwards < fewest:
        raise BalanceError(f"balance: {pairs} pairs do not fit in {forwards} forwards; they need {fewest}")
    trial = forwards or fewest
    # No number of forwards brings the slowest rank below `floor_seconds`: that bound ends the search.
    while best is None or (not forwards and floor_seconds + trial * seconds_per_forward < best[0]):
        assigned = _assign(pairs, [_Kind(s, trial * cap, ranks) for (s, cap), ranks in kinds.items()])
        seconds = assigned.slowest + trial * seconds_per_forward
        if best is None or seconds < best[0]:
            best = (seconds, trial, assigned)
        trial += 1
    seconds, forwards, assigned = best
    parts = {count: _even_sizes(count, forwards) for count in set(assigned.counts())}
    sizes = tuple(parts[count] for count in assigned.counts())
    return Partition(sizes, seconds)


def largest_micro(memory_bytes: float, fixed_bytes: float, bytes_per_pair: float) -> int:
    """Most pairs that fit in `memory_bytes` beside `fixed_bytes`; 0 when not even one does."""
    assert bytes_per_pair > 0
    return max(0, int((memory_bytes - fixed_bytes) // bytes_per_pair))


def measure_speed(step: Callable[[int], object], pairs: int, repeats: int) -> float:
    """Seconds per pair of `step(pairs)`, a forward and backward on this rank.

    After a first one to warm up, the median of `repeats`: robust against a neighbour's burst.

    `step` must not contain a collective: ranks that wait for one another all measure the slowest rank's
    speed. Give it an unsharded part of the model, a block or a few.
    """
    step(pairs)
    return statistics.median(_timed(step, pairs) for _ in range(repeats)) / pairs


def _timed(step: Callable[[int], object], size: int) -> float:
    _synchronize()
    start = time.perf_counter()
    step(size)
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    """Wait until the GPU has finished what was launched, so that the time is of the work and not of its launch."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@dataclass(frozen=True)
class _Kind:
    """Ranks that are equal: seconds per pair, most pairs a step."""

    seconds: float
    limit: int
    ranks: list[int]


@dataclass(frozen=True)
class _Assignment:
    """Pairs of every rank of a kind, and the ranks that take one more."""

    kinds: list[_Kind]
    pairs: list[int]
    larger: set[int]
    slowest: float

    def counts(self) -> list[int]:
        """Pairs per rank."""
        by_rank = {rank: n for kind, n in zip(self.kinds, self.pairs, strict=True) for rank in kind.ranks}
        return [by_rank[rank] + (rank in self.larger) for rank in range(len(by_rank))]


def _assign(pairs: int, kinds: list[_Kind]) -> _Assignment:
    """Pairs per rank with the smallest slowest time.

    Giving each pair to the rank that would finish it first is optimal, as a rank's finishing times only grow.
    All the pairs that this greedy rule takes up to a time are counted at once; it then runs on for the last few.
    """
    early = _common_finish(pairs, kinds) * (1 - 1e-9)  # slightly earlier, so that rounding adds no pair
    counts = [min(k.limit, int(min(early / k.seconds, k.limit))) for k in kinds]
    left = pairs - sum(n * len(k.ranks) for n, k in zip(counts, kinds, strict=True))
    heap = [(k.seconds * (n + 1), i) for i, (k, n) in enumerate(zip(kinds, counts, strict=True)) if n < k.limit]
    heapq.heapify(heap)
    larger: set[int] = set()
    while left > 0:
        finish, together = heap[0][0], []
        while heap and heap[0][0] == finish:
            together.append(heapq.heappop(heap)[1])
        if sum(len(kinds[i].ranks) for i in together) > left:
            larger = set(sorted(rank for i in together for rank in kinds[i].ranks)[:left])
            break
        for i in together:
            counts[i] += 1
            left -= len(kinds[i].ranks)
            if counts[i] < kinds[i].limit:
                heapq.heappush(heap, (kinds[i].seconds * (counts[i] + 1), i))
    slowest = max(n * k.seconds for n, k in zip(counts, kinds, strict=True))
    return _Assignment(kinds, counts, larger, max(slowest, finish) if larger else slowest)


def _common_finish(pairs: int, kinds: list[_Kind]) -> float:
    """Time at which ranks working at their own speed up to their limit have done `pairs` (fractions count)."""
    left, speed = float(pairs), sum(len(k.ranks) / k.seconds for k in kinds if k.limit)
    for kind in sorted((k for k in kinds if k.limit), key=lambda k: k.seconds * k.limit):
        if left <= kind.seconds * kind.limit * speed:
            break
        left -= kind.limit * len(kind.ranks)
        speed -= len(kind.ranks) / kind.seconds
    return max(0.0, left / speed) if speed > 0 else math.inf


def _even_sizes(count: int, forwards: int) -> tuple[int, ...]:
    """`count` in `forwards` parts that differ by one at most, larger ones first.

    Larger first on every rank, so that the forwards in which some rank has a pair more are the same ones
    everywhere.
    """
    small, larger = divmod(count, forwards)
    return (small + 1,) * larger + (small,) * (forwards - larger)


def _check(pairs: int, seconds: Sequence[float], caps: Sequence[int], seconds_per_forward: float) -> None:
    if pairs < 1:
        raise BalanceError(f"balance: a global batch of {pairs} pairs cannot be partitioned; give at least 1")
    if len(seconds) != len(caps) or not seconds:
        raise BalanceError(f"balance: {len(seconds)} speeds for {len(caps)} memory caps; give one of each per rank")
    for rank, second in enumerate(seconds):
        if not (0 < second < math.inf):
            raise BalanceError(f"balance: rank {rank} has {second} seconds per pair; it must be positive and finite")
    if min(caps) < 0 or seconds_per_forward < 0:
        raise BalanceError("balance: memory caps and seconds per forward must not be negative")
    if max(caps) == 0:
        raise BalanceError("balance: not one pair fits on any rank; use activation checkpointing or a smaller model")
