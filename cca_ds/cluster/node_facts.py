"""What a rank's node and device are, and how fast: for the table before the first step, and the nodes that stand out.

Letters: n side of the timed matrices.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

LAGGING, FAR_BEHIND = 0.8, 0.5  # of the median speed of equal devices; the second is not waited for again
_REPEATS = 5
_FABRICS = Path("/sys/class/infiniband")


def describe_node(device: str, device_id: str, first_on_node: bool) -> dict[str, str]:
    """Driver, fabric, and errors of the GPU and its driver, as far as this process may read them.

    Args:
        device: "cuda:0" or "cpu". device_id: the GPU's UUID.
        first_on_node: this rank reads the kernel's log, once for the node.
    """
    driver, ecc = _query_gpu(device_id) if device.startswith("cuda") else ("", "")
    faults = [f"{ecc} uncorrected memory errors"] if ecc.isdigit() and int(ecc) else []
    faults += _driver_faults() if first_on_node and device.startswith("cuda") else []
    return {"driver": driver, "fabric": fabric(_FABRICS), "faults": "; ".join(faults)}


def fabric(folder: Path) -> str:
    """Active ports of InfiniBand, or RDMA over Ethernet, e.g. "4 x InfiniBand 400 Gb/s"; "Ethernet" without any."""
    rates: list[str] = []
    for port in sorted(folder.glob("*/ports/*")):
        state, rate, layer = (_word(port / name) for name in ("state", "rate", "link_layer"))
        if "ACTIVE" in state:
            rates.append(f"{layer or 'InfiniBand'} {rate.partition(' ')[0]} Gb/s")
    return "; ".join(f"{rates.count(rate)} x {rate}" for rate in dict.fromkeys(rates)) or "Ethernet"


def _word(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _query_gpu(device_id: str) -> tuple[str, str]:
    """Driver version, and uncorrected ECC errors since the last restart, "" where they cannot be read."""
    fields = "driver_version,ecc.errors.uncorrected.volatile.total"
    uuid = device_id if device_id.startswith("GPU-") else f"GPU-{device_id}"
    lines = _output(["nvidia-smi", f"--id={uuid}", f"--query-gpu={fields}", "--format=csv,noheader,nounits"])
    driver, _, ecc = (lines[0] if lines else "").partition(",")
    return driver.strip(), ecc.strip()


def _driver_faults() -> list[str]:
    """The last Xid, NVIDIA's name for a GPU's error, of the kernel's log; often only root may read that."""
    found = [line for line in _output(["dmesg"]) if "NVRM: Xid" in line]
    match = re.search(r"Xid.*?: (\d+)", found[-1]) if found else None
    return [f"Xid {match[1]} in the kernel's log"] if match else []


def _output(command: list[str]) -> list[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []


def timed_matmul(device: torch.device) -> float:
    """Operations a second of a product of two [n, n]: bf16 and n = 8192 on a GPU, fp32 and n = 512 on a CPU."""
    side, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    one = torch.ones(side, side, dtype=dtype, device=device)
    return 2 * side**3 / _seconds(lambda: one @ one, device)


def timed_all_reduce(device: torch.device) -> float:
    """Bytes a second of an all-reduce: 64 MiB on GPUs, 1 MiB on CPUs; 0 for a single rank. A collective."""
    if dist.get_world_size() == 1:
        return 0.0
    values = torch.zeros(2**24 if device.type == "cuda" else 2**18, device=device)
    return values.numel() * 4 / _seconds(lambda: dist.all_reduce(values), device)


def _seconds(work: Any, device: torch.device) -> float:
    times = []
    for _ in range(_REPEATS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def slow_ranks(reports: Sequence[Mapping[str, Any]], share: float) -> list[Mapping[str, Any]]:
    """Reports of ranks below `share` of the median speed of all ranks on equal GPUs; CPUs, which share cores, are
    not compared.
    """
    found = []
    for name in dict.fromkeys(report["device"] for report in reports):
        equal = [report for report in reports if report["device"] == name and name != "cpu"]
        usual = statistics.median_high(report["matmul"] for report in equal) if len(equal) > 1 else 0.0
        found += [report for report in equal if report["matmul"] < share * usual]
    return found


def table(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line for each host: ranks, devices, driver, fabric, speeds and errors; ranks that lag are marked."""
    rows = [["node", "ranks", "devices", "driver", "fabric", "matmul TFLOP/s", "all-reduce GB/s", "remarks"]]
    slow = {report["rank"]: report for report in slow_ranks(reports, LAGGING)}
    for host in dict.fromkeys(report["host"] for report in reports):
        here = [report for report in reports if report["host"] == host]
        numbers = [report["rank"] for report in here]
        ranks = f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else f"{numbers[0]}"
        kinds = ", ".join(f"{sum(r['device'] == name for r in here)} x {name}" for name in dict.fromkeys(
            report["device"] for report in here))  # fmt: skip
        remarks = [f"rank {rank} lags" for rank in numbers if rank in slow]
        remarks += [report["node"]["faults"] for report in here if report["node"]["faults"]]
        rows.append([
            host, ranks, kinds, here[0]["node"]["driver"] or "-", here[0]["node"]["fabric"],
            _range([report["matmul"] / 1e12 for report in here]),
            _range([report["all_reduce"] / 1e9 for report in here]), "; ".join(dict.fromkeys(remarks)),
        ])  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _range(values: list[float]) -> str:
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low} to {high}"


def warnings(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is odd and no reason to stop: other fabrics, GPU errors, slow ranks, other commits of equal sources."""
    found = []
    fabrics: dict[str, list[str]] = {}
    for report in reports:
        hosts = fabrics.setdefault(report["node"]["fabric"], [])
        hosts += [report["host"]] if report["host"] not in hosts else []
    if len(fabrics) > 1:
        named = "; ".join(f"{', '.join(hosts[:8])}: {name}" for name, hosts in fabrics.items())
        found.append(f"nodes on different fabrics, and the slowest bounds every exchange ({named})")
    commits = {report["commit"] for report in reports}
    if len(commits) > 1:
        found.append(f"the sources are equal and their commits are not ({', '.join(sorted(commits))}): some node has "
                     "no git, or another checkout")  # fmt: skip
    for report in slow_ranks(reports, LAGGING):
        found.append(f"rank {report['rank']} on {report['host']} computes {report['matmul'] / 1e12:.3g} TFLOP/s, "
                     f"below {LAGGING:.0%} of what equal devices do")  # fmt: skip
    return found
