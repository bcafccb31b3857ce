"""What each launcher tells a process of its place: the deepspeed launcher, torchrun, srun and mpirun.

Every function reads a mapping and nothing else, and raises LaunchError where variables are missing, malformed
or contradict each other.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass

from cca_ds.cluster.hostlist import expand_counts, expand_hosts

TORCH_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_OWN_LAUNCHER_MARKS = {"TORCHELASTIC_RUN_ID": "torchrun", "CROSS_SIZE": "deepspeed"}
# srun's steps are numbered from 0; the batch script, an interactive shell and a prolog have numbers up here
_FIRST_SPECIAL_STEP = 0xFFFFFFF0


class LaunchError(ValueError):
    """The ranks cannot be told from the environment, or did not meet."""


@dataclass(frozen=True)
class Ranks:
    """Who this process is among those that run together."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    node_rank: int
    host: str
    device: str  # "cuda:3" or "cpu"
    launcher: str  # "deepspeed", "torchrun", "slurm", "mpi", "environment" or "alone"
    master_address: str | None = None  # None: told by rank 0 when the ranks meet
    master_port: int | None = None
    meeting_key: str = ""  # the same on all ranks of one start, and on no other's


def from_torch_variables(environ: Mapping[str, str]) -> Ranks:
    missing = [name for name in TORCH_VARIABLES if not environ.get(name)]
    if missing:
        present = [name for name in (*TORCH_VARIABLES, "LOCAL_WORLD_SIZE") if environ.get(name)]
        raise LaunchError(
            f"{', '.join(present)} set but {', '.join(missing)} missing: a launcher sets all of them; "
            f"start with deepspeed, torchrun, srun or mpirun, or unset them to run a single process"
        )
    launcher = next((name for mark, name in _OWN_LAUNCHER_MARKS.items() if mark in environ), "environment")
    rank, world_size = number(environ, "RANK"), number(environ, "WORLD_SIZE")
    if launcher == "environment":
        _check_against_outer(environ, "SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_ID", rank, world_size)
        _check_against_outer(
            environ, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", rank, world_size
        )
    local_size = next((name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if name in environ), None)
    local_rank = number(environ, "LOCAL_RANK")
    local_world_size = number(environ, local_size) if local_size else (world_size if world_size == 1 else 0)
    node_rank = next((number(environ, n) for n in ("GROUP_RANK", "CROSS_RANK") if n in environ), 0)
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
        number(environ, "MASTER_PORT"),
    )


def _check_against_outer(environ, rank_name, size_name, mark, rank, world_size) -> None:
    """RANK exported once for all tasks makes every task rank 0 of a world of its own: refuse it."""
    if mark not in environ or rank_name not in environ or size_name not in environ:
        return
    outer = number(environ, rank_name), number(environ, size_name)
    if outer[1] > 1 and outer != (rank, world_size):
        raise LaunchError(
            f"RANK={rank} and WORLD_SIZE={world_size} contradict {rank_name}={outer[0]} and "
            f"{size_name}={outer[1]}: unset RANK, LOCAL_RANK and WORLD_SIZE and let the launcher set them"
        )


def from_slurm(environ: Mapping[str, str]) -> Ranks:
    if "SLURM_STEP_ID" not in environ or number(environ, "SLURM_STEP_ID") >= _FIRST_SPECIAL_STEP:
        job = environ.get("SLURM_JOB_ID", "?")
        raise LaunchError(f"inside Slurm job {job} but not started by srun: put `srun` before the command")
    required = [
        "SLURM_JOB_ID",
        "SLURM_PROCID",
        "SLURM_LOCALID",
        "SLURM_NTASKS",
        "SLURM_NODEID",
        "SLURM_STEP_NODELIST",
    ]
    missing = [name for name in required if not environ.get(name)]
    if missing:
        raise LaunchError(f"started by srun, but {', '.join(missing)} missing: let srun pass its environment")
    rank, world_size = number(environ, "SLURM_PROCID"), number(environ, "SLURM_NTASKS")
    for name, value in (("SLURM_STEP_NUM_TASKS", world_size), ("PMIX_RANK", rank), ("PMI_RANK", rank)):
        if name in environ and number(environ, name) != value:
            raise LaunchError(
                f"{name}={environ[name]} contradicts srun's SLURM_PROCID={rank} of SLURM_NTASKS={world_size}"
            )
    master, node = environ.get("MASTER_ADDR") or slurm_master(environ), environ.get("SLURMD_NODENAME")
    if rank == 0 and node and "MASTER_ADDR" not in environ and node != master:
        raise LaunchError(
            f"rank 0 runs on {node}, not on the step's first node {master}: set MASTER_ADDR={node}"
        )
    step, restart = environ["SLURM_STEP_ID"], environ.get("SLURM_RESTART_COUNT", "0")
    return Ranks(
        rank,
        number(environ, "SLURM_LOCALID"),
        world_size,
        _slurm_local_world_size(environ, rank),
        number(environ, "SLURM_NODEID"),
        node or socket.gethostname(),
        "",
        "slurm",
        master,
        number(environ, "MASTER_PORT") if environ.get("MASTER_PORT") else None,
        f"slurm:{environ['SLURM_JOB_ID']}.{step}:{restart}",
    )


def slurm_master(environ: Mapping[str, str]) -> str:
    """The node of the step's task 0.

    A heterogeneous job's step has the union of its components' nodes, sorted by name, as its list, while its
    tasks are numbered component by component: task 0 is on the first component's first node.
    """
    try:
        step_hosts = expand_hosts(environ["SLURM_STEP_NODELIST"])
        for component in range(number(environ, "SLURM_HET_SIZE") if "SLURM_HET_SIZE" in environ else 0):
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
        return counts[number(environ, "SLURM_NODEID")]
    except (ValueError, IndexError):
        raise LaunchError(
            f"SLURM_STEP_TASKS_PER_NODE={environ['SLURM_STEP_TASKS_PER_NODE']} has no node "
            f"SLURM_NODEID={environ.get('SLURM_NODEID')}"
        ) from None


def from_mpirun(environ: Mapping[str, str]) -> Ranks:
    """Open MPI's variables, or those of MPICH's and Intel's hydra."""
    families = (
        ("OMPI_COMM_WORLD_RANK OMPI_COMM_WORLD_SIZE OMPI_COMM_WORLD_LOCAL_RANK OMPI_COMM_WORLD_LOCAL_SIZE"),
        ("PMI_RANK PMI_SIZE MPI_LOCALRANKID MPI_LOCALNRANKS"),
    )
    names = next(names.split() for names in families if any(name in environ for name in names.split()))
    missing = [name for name in names if not environ.get(name)]
    if missing:
        raise LaunchError(f"started by mpirun, but {', '.join(missing)} missing: let it pass its environment")
    rank, world_size, local_rank, local_world_size = (number(environ, name) for name in names)
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
        number(environ, "MASTER_PORT") if port else None,
    )


def number(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "")
    if not text.isdigit():
        raise LaunchError(f"{name}={text!r} is not a whole number")
    return int(text)
