"""Speed and memory limit of each rank, looked up in the tables of a recipe's `balance` section.

Letters: W ranks.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from cca_ds.balance.partition import BalanceError
from cca_ds.cluster.devices import peak_flops
from cca_ds.cluster.launch import Ranks
from cca_ds.cluster.preflight import device_name
from cca_ds.config.schema import Balance

Value = TypeVar("Value")
_EQUAL = 0.05  # speeds this close are one speed: two equal GPUs never measure quite the same


@dataclass(frozen=True)
class Peer:
    """What the recipe's tables name a rank by; `device` is its maker's name, or "cpu"."""

    rank: int
    host: str
    device: str

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} ({self.device})"


def gather_peers(ranks: Ranks) -> list[Peer]:
    """All ranks, in order. Collective."""
    return gather(Peer(ranks.rank, ranks.host, device_name(ranks.device)), ranks.world_size)


def gather(value: Any, world_size: int) -> list[Any]:
    """Every rank's value, in order, the same list on every rank. Collective."""
    found: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(found, value)
    return found


def chosen_mode(settings: Balance, peers: Sequence[Peer]) -> str:
    """`balance.mode`; for "auto", "measured" where devices differ and "even" where they do not."""
    if settings.mode != "auto":
        return settings.mode
    return "measured" if len({peer.device for peer in peers}) > 1 else "even"


def cost_of_even(peers: Sequence[Peer]) -> str | None:
    """A warning of what equal shares cost on unequal devices, by their peaks; None where they are equal."""
    kinds = list(dict.fromkeys(peer.device for peer in peers))
    if len(kinds) == 1:
        return None
    peaks = [peak_flops(peer.device) for peer in peers]
    known = [peak for peak in peaks if peak is not None]
    lost = 1 - min(known) * len(known) / sum(known) if len(known) == len(peaks) else None
    cost = f", about {100 * lost:.0f}% of their throughput" if lost is not None else ""
    return (
        f"warning: balance.mode=even on {' and '.join(kinds)}: all ranks wait for the slowest{cost}; "
        "balance.mode=measured gives each what it can do"
    )


def look_up(table: Mapping[str, Value], peer: Peer) -> Value | None:
    """A rank's value in a table of the recipe: by its number, else its host, else its device.

    A device matches its whole name or words of it ("H100" is an "NVIDIA H100 80GB HBM3", "A10" is no
    "A100"); of several keys that match, the longest counts. None where no key matches.
    """
    for key in (str(peer.rank), peer.host, peer.host.partition(".")[0]):
        if key in table:
            return table[key]
    fitting = [key for key in table if re.search(rf"(?<!\w){re.escape(key)}(?!\w)", peer.device, re.IGNORECASE)]
    fitting = [key for key in fitting if not key.isdecimal()]  # a number is a rank's, not part of "A10 24GB"
    return table[max(fitting, key=len)] if fitting else None


def given_seconds(speeds: Mapping[str, float], peers: Sequence[Peer]) -> list[float]:
    """Seconds per pair of every rank from `balance.speeds` (pairs a second).

    Raises:
        BalanceError: names the first rank without an entry.
    """
    seconds = []
    for peer in peers:
        speed = look_up(speeds, peer)
        if speed is None:
            raise BalanceError(
                f"balance.speeds has no entry for {peer}: known: {', '.join(speeds)}; add its number, host or "
                "device with its pairs a second, or use balance.mode=measured"
            )
        seconds.append(1.0 / speed)
    return seconds


def given_caps(settings: Balance, micro_size: int, peers: Sequence[Peer]) -> list[int]:
    """Most pairs in a forward of every rank: `balance.micro_sizes`, else `batch.micro_size`."""
    found = [look_up(settings.micro_sizes, peer) for peer in peers]
    return [micro_size if cap is None else cap for cap in found]


def average_equal_ranks(seconds: Sequence[float], tolerance: float = _EQUAL) -> list[float]:
    """Measured seconds without the noise between equal ranks.

    Ranks are grouped from the fastest on: those within `tolerance` of a group's fastest belong to it, and all of a
    group get its median.
    """
    groups: list[list[float]] = []
    for second in sorted(seconds):
        if groups and second <= groups[-1][0] * (1 + tolerance):
            groups[-1].append(second)
        else:
            groups.append([second])
    medians = {second: statistics.median(group) for group in groups for second in group}
    return [medians[second] for second in seconds]


def describe_speeds(peers: Sequence[Peer], seconds: Sequence[float]) -> str:
    """For the log: milliseconds a pair; neighbouring ranks of one host and device are listed together."""
    runs: list[list[int]] = []
    for index, peer in enumerate(peers):
        previous = peers[runs[-1][-1]] if runs else None
        if previous and (previous.host, previous.device) == (peer.host, peer.device):
            runs[-1].append(index)
        else:
            runs.append([index])
    parts = []
    for run in runs:
        name = f"rank {run[0]}" if len(run) == 1 else f"ranks {run[0]}-{run[-1]}"
        times = [f"{1e3 * seconds[i]:.3g}" for i in run]
        shown = ", ".join(times) if len(run) <= 8 else f"{min(times, key=float)} to {max(times, key=float)}"
        parts.append(f"{name} on {peers[run[0]].host} ({peers[run[0]].device}) {shown} ms a pair")
    return "; ".join(parts)
