"""Allocations of nodes, as `--nodes` names them: "4xh100:8,2xa100:8"."""

import difflib
import re
from dataclasses import dataclass, replace

from cca_ds.cluster.devices import DEVICES, Device

GROUP = re.compile(r"(\d+)x([a-z0-9-]+)(?::(\d+))?")
GPUS_PER_NODE = 8
MOST_GPUS, MOST_GROUPS = 100_000, 64
LINK_SHARE = 0.8  # of a link's rate that large collectives reach


@dataclass(frozen=True)
class NodeGroup:
    """`nodes` equal nodes with `gpus` GPUs each."""

    device: Device
    nodes: int
    gpus: int

    @property
    def ranks(self) -> int:
        """GPUs in all, one rank each."""
        return self.nodes * self.gpus


def parse_nodes(text: str, efficiencies: str = "", networks: str = "") -> list[NodeGroup]:
    """Groups of nodes from "4xh100:8,2xa100:8": nodes x device : GPUs a node (8 unless given).

    `efficiencies` ("h100=0.45") and `networks` ("a40=12.5", GB/s a node) replace the table's figures.

    Raises:
        ValueError: for what cannot be read, with the nearest known device.
    """
    devices = dict(DEVICES)
    for name, value in _values(efficiencies, "--efficiency"):
        if not 0 < value <= 1:
            raise ValueError(f"--efficiency {name}={value:g} must lie in (0, 1]")
        devices[name] = replace(devices[name], efficiency=value)
    for name, value in _values(networks, "--network"):
        devices[name] = replace(devices[name], node_link=value * 1e9)
    groups = []
    for part in filter(None, (part.strip().lower() for part in text.split(","))):
        match = GROUP.fullmatch(part) if len(part) < 80 else None
        if not match or int(match[1]) < 1 or int(match[3] or GPUS_PER_NODE) < 1:
            raise ValueError(f"--nodes {part[:80]}: write NODESxDEVICE:GPUS, e.g. 4xh100:8")
        groups.append(NodeGroup(devices[_known(match[2], "--nodes")], int(match[1]), int(match[3] or GPUS_PER_NODE)))
    for flag, values in (("--efficiency", efficiencies), ("--network", networks)):
        for name, value in _values(values, flag):
            if all(group.device.name != devices[name].name for group in groups):
                raise ValueError(f"{flag} {name}={value:g}: --nodes {text[:80]} has none of these")
    if not groups:
        raise ValueError("--nodes names no node; write NODESxDEVICE:GPUS, e.g. 4xh100:8")
    if (ranks := sum(group.ranks for group in groups)) > MOST_GPUS or len(groups) > MOST_GROUPS:
        raise ValueError(
            f"--nodes: {ranks:,} GPUs in {len(groups)} groups; at most {MOST_GPUS:,} in {MOST_GROUPS} are planned"
        )
    return groups


def _values(text: str, flag: str) -> list[tuple[str, float]]:
    pairs = []
    for part in filter(None, (part.strip().lower() for part in text.split(","))):
        name, _, number = part.partition("=")
        try:
            value = float(number)
        except ValueError:
            value = 0.0
        if not 0 < value < 1e9:
            raise ValueError(f"{flag} {part}: write DEVICE=NUMBER with a positive number below 1e9")
        pairs.append((_known(name, flag), value))
    return pairs


def _known(name: str, flag: str) -> str:
    if name not in DEVICES:
        near = difflib.get_close_matches(name, DEVICES, n=1, cutoff=0.0)[0]
        raise ValueError(f"{flag}: no GPU named {name}; did you mean {near}? known: {', '.join(DEVICES)}")
    return name
