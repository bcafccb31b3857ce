"""Ranks from whatever started this process: deepspeed, torchrun, srun (also --mpi=pmix), mpirun, or nobody.

    ranks = find_ranks(os.environ)
    initialize(ranks, timeout_seconds=1800)
    ...
    shutdown()

A process without any launcher's variable is a world of one. Variables that are incomplete or contradict each
other are a LaunchError: a world of one by mistake trains the same model on every GPU of a node.
"""

from __future__ import annotations

import itertools
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta

from cca_ds.cluster import rendezvous

_TORCH_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_OWN_LAUNCHER_MARKS = {"TORCHELASTIC_RUN_ID": "torchrun", "CROSS_SIZE": "deepspeed"}
# srun's steps are numbered from 0; the batch script, an interactive shell and a prolog have numbers up here
_FIRST_SPECIAL_STEP = 0xFFFFFFF0


class LaunchError(ValueError):
    """The environment does not determine the ranks, or the ranks did not find each other."""


class NotAllArrived(LaunchError):
    """A rank did not come in time: a failure of the cluster, not of the input."""

    exit_code = 1


@dataclass(frozen=True)
class Ranks:
    """The place of this process among those of one start."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    node_rank: int
    host: str
    device: str  # "cuda:3" or "cpu"
    launcher: str  # "deepspeed", "torchrun", "slurm", "mpi", "environment" or "alone"
    master_address: str | None = None  # None: `initialize` finds it
    master_port: int | None = None
    start_key: str = ""  # under srun: the same on all ranks of one start, and on no other's


def find_ranks(environ: Mapping[str, str], cuda_devices: int | None = None) -> Ranks:
    """Read this process's place from its launcher's variables.

    Args:
        environ: the environment; nothing else is looked at.
        cuda_devices: CUDA devices this process sees; None asks torch.

    Raises:
        LaunchError: variables are missing, malformed or contradict each other.
    """
    if any(name in environ for name in (*_TORCH_VARIABLES[:3], "LOCAL_WORLD_SIZE")):
        ranks = _from_torch_variables(environ)
    elif any(name.startswith("OMPI_COMM_WORLD_") or name == "MPI_LOCALRANKID" for name in environ):
        ranks = _from_mpirun(environ)  # before srun's: mpirun's own helpers are started by srun
    elif "SLURM_JOB_ID" in environ or "SLURM_PROCID" in environ or "SLURM_STEP_ID" in environ:
        ranks = _from_slurm(environ)
    elif "PMI_RANK" in environ or "PMI_SIZE" in environ:
        ranks = _from_mpirun(environ)
    elif "PMIX_RANK" in environ:
        ranks = _from_mpi_library(environ)
    elif "MASTER_ADDR" in environ or "MASTER_PORT" in environ:
        raise LaunchError(
            "MASTER_ADDR or MASTER_PORT is set but no launcher's rank is: start with deepspeed, torchrun, "
            "srun or mpirun, or unset them to run a single process"
        )
    else:
        ranks = Ranks(0, 0, 1, 1, 0, socket.gethostname(), "", "alone", "127.0.0.1")
    _check(ranks)
    return replace(ranks, device=_device(ranks, cuda_devices))


def choose_accelerator() -> None:
    """Set DS_ACCELERATOR=cpu where there is no GPU; DeepSpeed reads it when it is imported, and else warns."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def initialize(ranks: Ranks, timeout_seconds: float = 1800.0, rendezvous_seconds: float = 300.0) -> Ranks:
    """Wait for all ranks and start DeepSpeed's communication: gloo on CPU, NCCL on CUDA.

    Sets RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT for this process.

    Args:
        ranks: from `find_ranks`.
        timeout_seconds: limit of the watchdog, after which a rank that does not answer ends the run.
            Collectives fail only after twice as long, as the watchdog can name the rank.
        rendezvous_seconds: limit for all ranks to arrive (`distributed.rendezvous_seconds`).

    Returns:
        `ranks` with the master's address and port filled in.

    Raises:
        LaunchError: ranks did not arrive in time; the line names them.
    """
    ranks = _with_address_and_port(ranks)
    cuda = ranks.device.startswith("cuda")
    device_index = int(ranks.device.partition(":")[2] or 0)
    os.environ.update(
        RANK=str(ranks.rank),
        # DeepSpeed takes the device's number from here, which is 0 where a rank is shown only its own GPU
        LOCAL_RANK=str(device_index if cuda else ranks.local_rank),
        WORLD_SIZE=str(ranks.world_size),
        LOCAL_WORLD_SIZE=str(ranks.local_world_size),
        LOCAL_SIZE=str(ranks.local_world_size),
        MASTER_ADDR=str(ranks.master_address),
        MASTER_PORT=str(ranks.master_port),
    )
    # DeepSpeed requires that this one, where present, equals LOCAL_RANK
    os.environ.pop("OMPI_COMM_WORLD_LOCAL_RANK", None)

    choose_accelerator()
    import deepspeed
    import torch

    if cuda:
        torch.cuda.set_device(device_index)
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # collectives that `flight_recorder` can show
    else:
        # its shared-memory collectives are compiled at first use: a minute, and a stale lock hangs it
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend, limit = ("nccl" if cuda else "gloo"), timedelta(seconds=2 * timeout_seconds)
    store = _meet(ranks, rendezvous_seconds)
    store.set_timeout(limit)
    try:
        torch.distributed.init_process_group(
            backend,
            store=torch.distributed.PrefixStore("process group", store),
            rank=ranks.rank,
            world_size=ranks.world_size,
            timeout=limit,
        )
        # it takes over the group that exists
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=limit)
    except torch.distributed.DistError as error:  # a rank that came and ended, or a network between two that is down
        raise NotAllArrived(
            f"rank {ranks.rank} on {ranks.host}: all {ranks.world_size} ranks came to {ranks.master_address}:"
            f"{ranks.master_port}, but not all reached each other; see which rank's log ends early, and that the "
            f"nodes' network lets any port through ({str(error).splitlines()[0][:200]})"
        ) from error
    return ranks


def shutdown() -> None:
    """Leave the process group; without one, do nothing."""
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _with_address_and_port(ranks: Ranks) -> Ranks:
    """`ranks` with the master's address and port."""
    if ranks.master_address is not None and ranks.master_port is not None:
        return ranks
    if ranks.world_size == 1:
        return replace(ranks, master_address="127.0.0.1", master_port=rendezvous.free_port())
    if ranks.launcher == "slurm":
        return replace(ranks, master_port=rendezvous.derived_port(ranks.start_key))
    # a lone machine's own name need not resolve
    own = "127.0.0.1" if ranks.local_world_size == ranks.world_size else ranks.host
    try:
        address, port = rendezvous.agree_through_mpi(own, ranks.rank, ranks.world_size)
    except rendezvous.RendezvousError as error:
        raise LaunchError(str(error)) from None
    return replace(ranks, master_address=address, master_port=port)


def _meet(ranks: Ranks, seconds: float):
    """The store at which all ranks have arrived. Under torchrun its agent serves it, and starts ranks again."""
    served_by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    key = ranks.start_key or f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    assert ranks.master_address is not None and ranks.master_port is not None
    try:
        return rendezvous.meet(
            ranks.master_address,
            ranks.master_port,
            key,
            ranks.rank,
            ranks.world_size,
            seconds,
            serve=ranks.rank == 0 and not served_by_agent,
        )
    except rendezvous.NotAllArrived as error:
        raise NotAllArrived(str(error)) from None
    except rendezvous.RendezvousError as error:
        # under srun the next attempt derives another port
        raise (NotAllArrived if ranks.start_key else LaunchError)(str(error)) from None


def _from_torch_variables(environ: Mapping[str, str]) -> Ranks:
    missing = [name for name in _TORCH_VARIABLES if not environ.get(name)]
    if missing:
        present = [name for name in (*_TORCH_VARIABLES, "LOCAL_WORLD_SIZE") if environ.get(name)]
        raise LaunchError(
            f"{', '.join(present)} set but {', '.join(missing)} missing: a launcher sets all of them; "
            f"start with deepspeed, torchrun, srun or mpirun, or unset them to run a single process"
        )
    launcher = next((name for mark, name in _OWN_LAUNCHER_MARKS.items() if mark in environ), "environment")
    rank, world_size = _number(environ, "RANK"), _number(environ, "WORLD_SIZE")
    if launcher == "environment":
        _check_against_outer(environ, "SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_ID", rank, world_size)
        _check_against_outer(
            environ, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", rank, world_size
        )
    local_size = next((name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if name in environ), None)
    local_rank = _number(environ, "LOCAL_RANK")
    local_world_size = _number(environ, local_size) if local_size else (world_size if world_size == 1 else 0)
    node_rank = next((_number(environ, n) for n in ("GROUP_RANK", "CROSS_RANK") if n in environ), 0)
    return Ranks(
        rank,
        local_rank,
        world_size,
        local_world_size or local_rank + 1,
        node_rank,
        socket.gethostname(),
        "",
        launcher,
        environ["MASTER_ADDR"],
        _number(environ, "MASTER_PORT"),
    )


def _check_against_outer(environ, rank_name, size_name, mark, rank, world_size) -> None:
    """RANK exported once for all tasks makes every task rank 0 of a world of its own: refuse it."""
    if mark not in environ or rank_name not in environ or size_name not in environ:
        return
    outer = _number(environ, rank_name), _number(environ, size_name)
    if outer[1] > 1 and outer != (rank, world_size):
        raise LaunchError(
            f"RANK={rank} and WORLD_SIZE={world_size} contradict {rank_name}={outer[0]} and "
            f"{size_name}={outer[1]}: unset RANK, LOCAL_RANK and WORLD_SIZE and let the launcher set them"
        )


def _from_slurm(environ: Mapping[str, str]) -> Ranks:
    if "SLURM_STEP_ID" not in environ or _number(environ, "SLURM_STEP_ID") >= _FIRST_SPECIAL_STEP:
        job = environ.get("SLURM_JOB_ID", "?")
        raise LaunchError(f"inside Slurm job {job} but not started by srun: put `srun` before the command")
    required = ["SLURM_JOB_ID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_NODEID", "SLURM_STEP_NODELIST"]
    missing = [name for name in required if not environ.get(name)]
    if missing:
        raise LaunchError(f"started by srun, but {', '.join(missing)} missing: let srun pass its environment")
    rank, world_size = _number(environ, "SLURM_PROCID"), _number(environ, "SLURM_NTASKS")
    for name, value in (("SLURM_STEP_NUM_TASKS", world_size), ("PMIX_RANK", rank), ("PMI_RANK", rank)):
        if name in environ and _number(environ, name) != value:
            raise LaunchError(
                f"{name}={environ[name]} contradicts srun's SLURM_PROCID={rank} of SLURM_NTASKS={world_size}"
            )
    master, node = environ.get("MASTER_ADDR") or slurm_master(environ), environ.get("SLURMD_NODENAME")
    if rank == 0 and node and "MASTER_ADDR" not in environ and node != master:
        raise LaunchError(f"rank 0 runs on {node}, not on the step's first node {master}: set MASTER_ADDR={node}")
    step, restart = environ["SLURM_STEP_ID"], environ.get("SLURM_RESTART_COUNT", "0")
    return Ranks(
        rank,
        _number(environ, "SLURM_LOCALID"),
        world_size,
        _slurm_local_world_size(environ, rank),
        _number(environ, "SLURM_NODEID"),
        node or socket.gethostname(),
        "",
        "slurm",
        master,
        _number(environ, "MASTER_PORT") if environ.get("MASTER_PORT") else None,
        f"slurm:{environ['SLURM_JOB_ID']}.{step}:{restart}",
    )


def slurm_master(environ: Mapping[str, str]) -> str:
    """The node of the step's task 0.

    A heterogeneous job's step has the union of its components' nodes, sorted by name, as its list, while its
    tasks are numbered component by component: task 0 is on the first component's first node.
    """
    try:
        step_hosts = expand_hosts(environ["SLURM_STEP_NODELIST"])
        for component in range(_number(environ, "SLURM_HET_SIZE") if "SLURM_HET_SIZE" in environ else 0):
            own = expand_hosts(environ[f"SLURM_JOB_NODELIST_HET_GROUP_{component}"])
            here = [host for host in own if host in step_hosts]
            if here:
                return here[0]
    except KeyError as missing:
        raise LaunchError(f"a heterogeneous Slurm job without {missing.args[0]}: start with srun") from None
    except ValueError as error:
        raise LaunchError(str(error)) from None
    return step_hosts[0]


def _slurm_local_world_size(environ: Mapping[str, str], rank: int) -> int:
    if environ.get("SLURM_GTIDS"):  # this node's task numbers
        tasks = environ["SLURM_GTIDS"].split(",")
        if str(rank) not in tasks:
            raise LaunchError(f"SLURM_PROCID={rank} is not among this node's SLURM_GTIDS={','.join(tasks)}")
        return len(tasks)
    if not environ.get("SLURM_STEP_TASKS_PER_NODE"):
        raise LaunchError("started by srun, but SLURM_GTIDS and SLURM_STEP_TASKS_PER_NODE are missing")
    try:
        counts = expand_counts(environ["SLURM_STEP_TASKS_PER_NODE"])
        return counts[_number(environ, "SLURM_NODEID")]
    except (ValueError, IndexError):
        raise LaunchError(
            f"SLURM_STEP_TASKS_PER_NODE={environ['SLURM_STEP_TASKS_PER_NODE']} has no node "
            f"SLURM_NODEID={environ.get('SLURM_NODEID')}"
        ) from None


def _from_mpirun(environ: Mapping[str, str]) -> Ranks:
    """Open MPI's variables, or those of MPICH's and Intel's hydra."""
    families = (
        ("OMPI_COMM_WORLD_RANK OMPI_COMM_WORLD_SIZE OMPI_COMM_WORLD_LOCAL_RANK OMPI_COMM_WORLD_LOCAL_SIZE"),
        ("PMI_RANK PMI_SIZE MPI_LOCALRANKID MPI_LOCALNRANKS"),
    )
    names = next(names.split() for names in families if any(name in environ for name in names.split()))
    missing = [name for name in names if not environ.get(name)]
    if missing:
        raise LaunchError(f"started by mpirun, but {', '.join(missing)} missing: let it pass its environment")
    rank, world_size, local_rank, local_world_size = (_number(environ, name) for name in names)
    port = environ.get("MASTER_PORT")
    return Ranks(
        rank,
        local_rank,
        world_size,
        local_world_size,
        0 if local_world_size == world_size else rank // local_world_size,
        socket.gethostname(),
        "",
        "mpi",
        environ.get("MASTER_ADDR") if port else None,
        _number(environ, "MASTER_PORT") if port else None,
    )


def _from_mpi_library(environ: Mapping[str, str]) -> Ranks:
    """A PMIx launcher sets no variable with the world's size: MPI itself reports it."""
    try:
        rank, world_size, local_rank, local_world_size = rendezvous.mpi_world()
    except rendezvous.RendezvousError as error:
        raise LaunchError(str(error)) from None
    if rank != _number(environ, "PMIX_RANK"):
        raise LaunchError(
            f"PMIX_RANK={environ['PMIX_RANK']}, but mpi4py reports rank {rank} of {world_size}: mpi4py is "
            "linked to another MPI than the launcher's"
        )
    host = socket.gethostname()
    return Ranks(rank, local_rank, world_size, local_world_size, rank // local_world_size, host, "", "mpi")


# one name of a Slurm list: text and brackets of numbers, "r[1-2]n[08-09]-ib"
_NAME = r"(?:[^,\[\]]|\[\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*\])+"


def expand_hosts(compact: str) -> list[str]:
    """Names of a Slurm node list in its own order: `r[1-2]n[08-09]` -> r1n08 r1n09 r2n08 r2n09.

    `scontrol show hostnames` does the same, but a container often has no Slurm programs.

    Raises:
        ValueError: the text is no node list.
    """
    if not re.fullmatch(rf"{_NAME}(?:,{_NAME})*", compact):
        raise ValueError(f"{compact!r} is not a Slurm node list")
    hosts = []
    for name in re.findall(_NAME, compact):
        pieces = re.findall(r"([^\[\]]+)|\[([^\]]+)\]", name)
        choices = [[text] if text else _expand_numbers(numbers) for text, numbers in pieces]
        hosts += map("".join, itertools.product(*choices))
    return hosts


def _expand_numbers(items: str) -> list[str]:
    """`08-10,12` -> 08 09 10 12: leading zeros are part of the name."""
    numbers = []
    for item in items.split(","):
        first, _, last = item.partition("-")
        numbers += [str(n).zfill(len(first)) for n in range(int(first), int(last or first) + 1)]
    return numbers


def expand_counts(compact: str) -> list[int]:
    """Tasks of each node from Slurm's short form: `2(x3),1` -> 2 2 2 1.

    Raises:
        ValueError: the text is no list of counts.
    """
    counts = []
    for item in compact.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", item)
        if match is None:
            raise ValueError(f"{compact!r} is not a Slurm list of task counts")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _check(ranks: Ranks) -> None:
    if not 0 <= ranks.rank < ranks.world_size:
        raise LaunchError(f"rank {ranks.rank} is not in 0 to {ranks.world_size - 1}: the world's size is wrong")
    if not 0 <= ranks.local_rank < ranks.local_world_size <= ranks.world_size:
        raise LaunchError(
            f"rank {ranks.rank}: local rank {ranks.local_rank} of {ranks.local_world_size} on this node does "
            f"not fit a world of {ranks.world_size}"
        )
    if ranks.master_port is not None and not 0 < ranks.master_port < 2**16:
        raise LaunchError(f"MASTER_PORT={ranks.master_port} is no port; give 1 to 65535, free on rank 0's node")


def checked_device(name: str | None) -> str | None:
    """A --device that this machine has; None stays None. Raises ValueError for any other."""
    if name is None or name == "cpu":
        return name
    kind, _, number = name.partition(":")
    if kind != "cuda" or (number and not (number.isascii() and number.isdigit() and len(number) < 5)):
        raise ValueError(f"--device {name}: neither cpu, cuda nor cuda:NUMBER")
    import torch

    count = torch.cuda.device_count()
    if int(number or 0) >= count:
        raise ValueError(f"--device {name}: this machine shows {count} CUDA devices; use cpu" if not count else
                         f"--device {name}: this machine shows the CUDA devices 0 to {count - 1}")  # fmt: skip
    return name


def _device(ranks: Ranks, cuda_devices: int | None) -> str:
    if cuda_devices is None:
        import torch

        cuda_devices = torch.cuda.device_count()
    if cuda_devices == 0:
        return "cpu"
    if ranks.local_rank < cuda_devices:
        return f"cuda:{ranks.local_rank}"
    if cuda_devices == 1:  # srun --gpus-per-task=1: each task is shown its own GPU only, as number 0
        return "cuda:0"
    raise LaunchError(
        f"local rank {ranks.local_rank} on {ranks.host} has no GPU: {ranks.local_world_size} ranks but only "
        f"{cuda_devices} GPUs are visible; start at most one rank per GPU"
    )


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "")
    if not text.isdigit():
        raise LaunchError(f"{name}={text!r} is not a whole number")
    return int(text)
