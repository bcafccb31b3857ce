"""The GPUs that the project has figures for: peak operations, memory and links."""

from dataclasses import dataclass

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


def _device(name: str, gib: float, teraflops: float, efficiency: float, hbm: float, link: float, node: float) -> Device:
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


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 operations a second of a GPU by its maker's name, e.g. "NVIDIA H100 80GB HBM3"; None for one that
    DEVICES does not have, and for a CPU.
    """
    words = device_name.lower().replace("-", " ").split()
    return next((device.peak_flops for name, device in DEVICES.items() if name in words), None)
