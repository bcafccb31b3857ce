"""Ranks from whatever started this process: deepspeed, torchrun, srun (also --mpi=pmix), mpirun, or nobody.

    ranks = find_ranks(os.environ)
    initialize(ranks, timeout_seconds=1800)
    ...
    shutdown()

A process without any launcher's variable is a world of one. Variables that are incomplete or contradict each
other are a LaunchError: a world of one by mistake trains the same model on every GPU of a node.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta

from cca_ds.cluster import rendezvous
from cca_ds.cluster.launchers import (
    TORCH_VARIABLES,
    LaunchError,
    Ranks,
    from_mpirun,
    from_slurm,
    from_torch_variables,
    number,
)


def find_ranks(environ: Mapping[str, str], cuda_devices: int | None = None) -> Ranks:
    """Read this process's place from its launcher's variables.

    Args:
        environ: the environment; nothing else is looked at.
        cuda_devices: CUDA devices this process sees; None asks torch.

    Raises:
        LaunchError: variables are missing, malformed or contradict each other.
    """
    if any(name in environ for name in (*TORCH_VARIABLES[:3], "LOCAL_WORLD_SIZE")):
        ranks = from_torch_variables(environ)
    elif any(name.startswith("OMPI_COMM_WORLD_") or name == "MPI_LOCALRANKID" for name in environ):
        ranks = from_mpirun(environ)  # before srun's: mpirun's own helpers are started by srun
    elif "SLURM_JOB_ID" in environ or "SLURM_PROCID" in environ or "SLURM_STEP_ID" in environ:
        ranks = from_slurm(environ)
    elif "PMI_RANK" in environ or "PMI_SIZE" in environ:
        ranks = from_mpirun(environ)
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


def initialize(ranks: Ranks, timeout_seconds: float = 1800.0, meeting_seconds: float = 300.0) -> Ranks:
    """Bring the ranks together and start DeepSpeed's communication: gloo on CPU, NCCL on CUDA.

    Sets RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT for this process.

    Args:
        ranks: from `find_ranks`.
        timeout_seconds: after which a silent rank ends the run. Collectives fail after twice as long: the
            watchdog, which can name the rank, comes first.
        meeting_seconds: limit for all ranks to arrive.

    Returns:
        `ranks` with the master's address and port filled in.

    Raises:
        LaunchError: the ranks did not meet in time; the line names those that did not come.
    """
    ranks = rendezvous.meet(ranks, meeting_seconds)
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
    # DeepSpeed insists that this one, where present, equals LOCAL_RANK
    os.environ.pop("OMPI_COMM_WORLD_LOCAL_RANK", None)

    choose_accelerator()
    import deepspeed
    import torch

    if cuda:
        torch.cuda.set_device(device_index)
    else:
        # its shared-memory collectives are compiled at first use: a minute, and a stale lock hangs it
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="nccl" if cuda else "gloo",
        auto_mpi_discovery=False,
        verbose=False,
        timeout=timedelta(seconds=2 * timeout_seconds),
    )
    return ranks


def shutdown() -> None:
    """Leave the process group; without one, do nothing."""
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _from_mpi_library(environ: Mapping[str, str]) -> Ranks:
    """A PMIx launcher that says nothing of the world's size: ask MPI itself."""
    rank, world_size, local_rank, local_world_size = rendezvous.mpi_world()
    if rank != number(environ, "PMIX_RANK"):
        raise LaunchError(
            f"PMIX_RANK={environ['PMIX_RANK']}, but mpi4py says rank {rank} of {world_size}: mpi4py is "
            "linked to another MPI than the launcher's"
        )
    host = socket.gethostname()
    return Ranks(rank, local_rank, world_size, local_world_size, rank // local_world_size, host, "", "mpi")


def _check(ranks: Ranks) -> None:
    if not 0 <= ranks.rank < ranks.world_size:
        raise LaunchError(
            f"rank {ranks.rank} is not in 0 to {ranks.world_size - 1}: the world's size is wrong"
        )
    if not 0 <= ranks.local_rank < ranks.local_world_size <= ranks.world_size:
        raise LaunchError(
            f"rank {ranks.rank}: local rank {ranks.local_rank} of {ranks.local_world_size} on this node does "
            f"not fit a world of {ranks.world_size}"
        )


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
