"""The GPUs that planning knows, and allocations of them such as "4xh100:8,2xa100:8"."""

import difflib
import re
from dataclasses import dataclass, replace

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """One GPU model and the links it usually comes with; figures are vendors', in one direction.

    `peak_flops` dense bf16 a second; `efficiency` the share of it that training reaches, communication apart;
    `memory_bandwidth`, `gpu_link` (a GPU's own, NVLink or PCIe) and `node_link` (a node's network) bytes a
    second.
    """

    name: str
    memory_bytes: float
    peak_flops: float
    efficiency: float
    memory_bandwidth: float
    gpu_link: float
    node_link: float


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


def _device(
    name: str, gib: float, teraflops: float, efficiency: float, hbm: float, link: float, node: float
) -> Device:
    return Device(name, gib * GIB, teraflops * 1e12, efficiency, hbm * 1e9, link * 1e9, node * 1e9)


DEVICES = {
    device.name: device
    for device in (
        #       name    GiB  TFLOP/s  share  memory  GPU link  node link, GB/s
        _device("b200", 180, 2250, 0.40, 8000, 900, 400),
        _device("h200", 141, 989, 0.42, 4800, 450, 400),
        _device("h100", 80, 989, 0.42, 3350, 450, 400),
        _device("a100", 80, 312, 0.50, 2000, 300, 200),
        _device("a100-40gb", 40, 312, 0.50, 1555, 300, 200),
        _device("l40s", 48, 362, 0.45, 864, 25, 50),
        _device("a6000", 48, 155, 0.50, 768, 25, 25),
        _device("a40", 48, 150, 0.50, 696, 25, 25),
    )
}
GROUP = re.compile(r"(\d+)x([a-z0-9-]+)(?::(\d+))?")
GPUS_PER_NODE = 8


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
        match = GROUP.fullmatch(part)
        if not match or int(match[1]) < 1 or match[3] == "0":
            raise ValueError(f"--nodes {part}: write NODESxDEVICE:GPUS, e.g. 4xh100:8")
        groups.append(
            NodeGroup(devices[_known(match[2], "--nodes")], int(match[1]), int(match[3] or GPUS_PER_NODE))
        )
    if not groups:
        raise ValueError("--nodes names no node; write NODESxDEVICE:GPUS, e.g. 4xh100:8")
    return groups


def _values(text: str, flag: str) -> list[tuple[str, float]]:
    pairs = []
    for part in filter(None, (part.strip().lower() for part in text.split(","))):
        name, _, number = part.partition("=")
        try:
            value = float(number)
        except ValueError:
            value = 0.0
        if value <= 0:
            raise ValueError(f"{flag} {part}: write DEVICE=NUMBER with a positive number")
        pairs.append((_known(name, flag), value))
    return pairs


def _known(name: str, flag: str) -> str:
    if name not in DEVICES:
        near = difflib.get_close_matches(name, DEVICES, n=1, cutoff=0.0)[0]
        raise ValueError(f"{flag}: no GPU named {name}; did you mean {near}? known: {', '.join(DEVICES)}")
    return name
