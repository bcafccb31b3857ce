"""Checks before the first step: every rank answers, runs the same code and configuration, and has a device of its own.

check_ranks(ranks, timeout_seconds, {"configuration": hash, "data manifest": hash})
"""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import time
from collections import Counter
from collections.abc import Mapping
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import TypedDict

import torch
import torch.distributed as dist

from cca_ds.cluster import node_facts
from cca_ds.cluster.job_state import note_faulty
from cca_ds.cluster.launch import LaunchError, Ranks
from cca_ds.cluster.rank_logs import log_only
from cca_ds.console import say

_PACKAGE = Path(__file__).resolve().parents[1]
_PACKAGES = ("torch", "deepspeed", "numpy", "datasets", "cca_ds")
_SHARED = "preflight"


class NodeFault(LaunchError):
    """Some nodes, not the input, are at fault: another attempt without them may succeed."""

    exit_code = 1


class Report(TypedDict):
    """What a rank sends to the others before the first step, as JSON."""

    rank: int
    host: str
    device: str  # the GPU's name, or "cpu"
    device_id: str  # unique on the host: a GPU's UUID
    node: dict[str, str]  # driver, fabric and faults, as `node_facts.describe_node`
    commit: str  # of git, "none" outside a checkout
    matmul: float  # operations a second
    all_reduce: float  # bytes a second
    same: dict[str, str]  # values that must be equal on all ranks
    host_same: dict[str, str]  # values that must be equal on all ranks of a host


def check_ranks(ranks: Ranks, timeout_seconds: float, run: Mapping[str, str]) -> None:
    """Compare the ranks' versions, source code and `run`, then try and time two collectives. A collective.

    Where several nodes take part, or something is odd, rank 0 prints a table of all nodes. Nodes that fail, or that
    are far behind equal ones, are written down for the job's next attempt.

    Args:
        ranks: this process's place; the process group is up.
        timeout_seconds: limit for all ranks to report, and again for each of the two collectives.
        run: further values that must be equal on all ranks, e.g. hashes of the configuration and the data manifest.

    Raises:
        LaunchError: ranks differ, did not answer in time, or share a device; the line names ranks and hosts.
    """
    own = describe(ranks, run)
    reports = _exchange(ranks, own, timeout_seconds, "reports")
    compare(reports)
    _try_collectives(ranks, reports, timeout_seconds)
    own["all_reduce"] = node_facts.timed_all_reduce(torch.device(ranks.device))
    reports = _exchange(ranks, own, timeout_seconds, "speeds")
    note_faulty(dict.fromkeys(report["host"] for report in node_facts.slow_ranks(reports, node_facts.FAR_BEHIND)))
    if ranks.rank == 0:
        warnings = node_facts.warnings(reports)
        show = say if len({report["host"] for report in reports}) > 1 or warnings else log_only
        for line in (*node_facts.table(reports), *(f"warning: {warning}" for warning in warnings)):
            show(line if show is say else f"{line}\n")


def describe(ranks: Ranks, run: Mapping[str, str]) -> Report:
    """This rank's report; `run` is added to the values that must be equal on all ranks."""
    return {
        "rank": ranks.rank,
        "host": ranks.host,
        "device": device_name(ranks.device),
        "device_id": _device_id(ranks),
        "node": node_facts.describe_node(ranks.device, _device_id(ranks), ranks.local_rank == 0),
        "commit": _commit(),
        "matmul": node_facts.timed_matmul(torch.device(ranks.device)),
        "all_reduce": 0.0,
        "same": {**_versions(), "the source code": _sources(), "kind of device": ranks.device.partition(":")[0], **run},
        "host_same": {"devices of the host": ", ".join(_visible_devices(ranks.device))},
    }


def compare(reports: list[Report]) -> None:
    """Raise LaunchError at the first value that differs, naming the ranks in the minority, or at a shared device."""
    for name in dict.fromkeys(key for report in reports for key in report["same"]):
        _check_equal(reports, name, [report["same"].get(name, "nothing") for report in reports])
    for host in dict.fromkeys(report["host"] for report in reports):
        here = [report for report in reports if report["host"] == host]
        for name in here[0]["host_same"]:
            _check_equal(here, name, [report["host_same"].get(name, "nothing") for report in here])
        owners: dict[str, int] = {}
        for report in here:
            other = owners.setdefault(report["device_id"], report["rank"])
            if other != report["rank"]:
                raise LaunchError(
                    f"ranks {other} and {report['rank']} on {host} share one device ({report['device_id']}): "
                    "start one rank per device"
                )


def _check_equal(reports: list[Report], name: str, values: list[str]) -> None:
    if len(set(values)) == 1:
        return
    (common, count), *_ = Counter(values).most_common()
    if list(values).count(values[0]) == count:
        common = values[0]  # with no majority, the others are compared with rank 0
    odd = [
        f"rank {report['rank']} on {report['host']} has {value}"
        for report, value in zip(reports, values, strict=True)
        if value != common
    ]
    more = f" and {len(odd) - 8} more" if len(odd) > 8 else ""
    message = f"{name} differs: {'; '.join(odd[:8])}{more}; the others have {common}"
    others = {report["host"] for report, value in zip(reports, values, strict=True) if value != common}
    if len(others) < len({report["host"] for report in reports}) / 2:  # a few nodes are not like the rest
        note_faulty(others)
        raise NodeFault(message)
    raise LaunchError(message)


def _exchange(ranks: Ranks, own: Report, timeout_seconds: float, purpose: str) -> list[Report]:
    """All ranks' reports, by rank. They go through the store, which, unlike a collective, shows which are missing."""
    store = _store(purpose)
    store.set(str(ranks.rank), json.dumps(own))
    texts = _wait_for_keys(store, ranks.world_size, timeout_seconds)
    absent = [rank for rank, text in enumerate(texts) if text is None]
    if absent:
        known = [json.loads(text) for text in texts if text is not None]
        hosts = "; ".join(dict.fromkeys(f"rank {report['rank']} on {report['host']}" for report in known[:8]))
        raise NodeFault(f"{_list_ranks(absent)} did not report within {timeout_seconds:g} s; heard from: {hosts}")
    return [json.loads(text) for text in texts]


def _wait_for_keys(store: dist.Store, world_size: int, timeout_seconds: float) -> list[str | None]:
    """Values of the keys "0" to world_size - 1; None where a key was not set within the limit."""
    texts: list[str | None] = [None] * world_size
    end = time.monotonic() + timeout_seconds
    while None in texts:
        for rank, text in enumerate(texts):
            if text is None and store.check([str(rank)]):
                texts[rank] = store.get(str(rank)).decode()
        if None in texts:
            if time.monotonic() > end:
                break
            time.sleep(0.02)
    return texts


def _try_collectives(ranks: Ranks, reports: list[Report], timeout_seconds: float) -> None:
    """Run one all-reduce and one all-gather; raise LaunchError if one is late or its result is wrong."""
    device = torch.device(ranks.device)
    world_size = ranks.world_size
    total = torch.tensor([float(ranks.rank + 1)], device=device)
    gathered = torch.empty(world_size, device=device)
    _finish("all-reduce", dist.all_reduce(total, async_op=True), ranks, reports, timeout_seconds)
    work = dist.all_gather_into_tensor(gathered, torch.tensor([float(ranks.rank)], device=device), async_op=True)
    _finish("all-gather", work, ranks, reports, timeout_seconds)
    if total.item() != world_size * (world_size + 1) / 2 or gathered.tolist() != list(range(world_size)):
        raise NodeFault(
            f"rank {ranks.rank} on {ranks.host}: a collective over {world_size} ranks gave wrong numbers "
            f"(sum {total.item():g}); look at the network and its libraries"
        )


def _finish(name: str, work: dist.Work, ranks: Ranks, reports: list[Report], seconds: float) -> None:
    """Wait for a collective; after `seconds` raise LaunchError that names the ranks that have not finished it."""
    store, end, reason = _store(name), time.monotonic() + seconds, ""
    try:
        while not work.is_completed() and time.monotonic() < end:
            time.sleep(0.002)
        if work.is_completed():
            work.wait()
            store.set(str(ranks.rank), "done")
            return
    except RuntimeError as error:  # a peer's process ended
        reason = f" ({str(error).splitlines()[0]})"
    answered = _wait_for_keys(store, ranks.world_size, timeout_seconds=1.0)
    unfinished = [reports[rank] for rank, text in enumerate(answered) if text is None and rank != ranks.rank]
    named = "; ".join(f"rank {report['rank']} on {report['host']}" for report in unfinished[:8]) or "all but this one"
    if unfinished and len(unfinished) < ranks.world_size - 1:  # else nobody knows whose fault it is
        note_faulty({report["host"] for report in unfinished} - {ranks.host})
    raise NodeFault(
        f"{name} did not answer within {seconds:g} s on rank {ranks.rank} on {ranks.host}{reason}; "
        f"not done either: {named}"
    )


def _store(purpose: str) -> dist.Store:
    store = dist.PrefixStore(f"{_SHARED}/{purpose}", dist.distributed_c10d._get_default_store())
    store.set_timeout(timedelta(seconds=30))
    return store


def _list_ranks(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:16])) + (", ..." if len(numbers) > 16 else "")
    return f"rank{'s' if len(numbers) > 1 else ''} {shown}"


def _versions() -> dict[str, str]:
    """Versions of Python, the packages, CUDA and NCCL: they change the arithmetic or the protocol between ranks."""
    found = {"the version of Python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[f"the version of {package}"] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found["the version of CUDA"] = str(torch.version.cuda)
        found["the version of NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def _sources() -> str:
    """A hash of the package's sources, which unlike a commit covers local edits."""
    digest = hashlib.sha256()
    for source in sorted(_PACKAGE.rglob("*.py")):
        digest.update(source.relative_to(_PACKAGE).as_posix().encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:16]


def _commit() -> str:
    """The git commit; "none" where the package was installed without its repository, or the node has no git."""
    command = ["git", "-C", str(_PACKAGE), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "none"


def device_name(device: str) -> str:
    """The GPU's product name, e.g. "NVIDIA H100 80GB HBM3", or "cpu"."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"


def _device_id(ranks: Ranks) -> str:
    if ranks.device.startswith("cuda"):
        return str(torch.cuda.get_device_properties(ranks.device).uuid)
    return f"cpu rank {ranks.rank}"  # ranks may share a CPU


def _visible_devices(device: str) -> list[str]:
    if not device.startswith("cuda"):
        return ["cpu"]
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
