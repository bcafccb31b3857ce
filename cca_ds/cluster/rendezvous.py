"""How the ranks of one start meet: at a store that rank 0 serves, or that torchrun serves for it.

Each rank writes its host into torch's TCPStore at the master's address and port. Rank 0 waits for all and writes the
verdict, so that a rank that does not come is named, once and in time, by all that came. The process group then lives
in the same store. Under srun, whose tasks are given no port, every rank derives one from the Slurm job's id, step and
restart count; under mpirun, MPI broadcasts rank 0's address and a free port.
"""

from __future__ import annotations

import socket
import threading
import time
import zlib
from datetime import timedelta

# below Linux's ephemeral range (32768 and up), so that no outgoing connection uses one by chance
_FIRST_PORT, _PORTS = 20000, 12000
_LINGER_SECONDS = 2.0  # rank 0, whose store goes with it, lets the others read that it gave up


class RendezvousError(ValueError):
    """The ranks did not find each other."""


class NotAllArrived(RendezvousError):
    """A rank did not come in time: a failure of the cluster, not of the input."""


def derived_port(key: str) -> int:
    """The port of one start of a job, the same on every rank: 20000 to 31999."""
    return _FIRST_PORT + zlib.crc32(key.encode()) % _PORTS


def free_port() -> int:
    """A TCP port that is free on this host."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def meet(address: str, port: int, key: str, rank: int, world_size: int, seconds: float, serve: bool):
    """Wait until all ranks of the start `key` are there.

    Args:
        address, port: of the store.
        key: the same on all ranks of one start, and on no other's.
        seconds: limit for all ranks to arrive.
        serve: this process serves the store.

    Returns:
        The store (torch.distributed.TCPStore). Who serves it must hold it as long as anything uses it.

    Raises:
        RendezvousError: the port is another program's.
        NotAllArrived: a rank did not arrive in time.
    """
    end = time.monotonic() + seconds
    store = _open_store(address, port, rank, serve, seconds)
    names = [f"{key}/rank {other}" for other in range(world_size)]
    verdict = f"{key}/verdict"
    try:
        store.set(names[rank], socket.gethostname())
        if rank == 0:
            while not store.check(names) and time.monotonic() < end:
                time.sleep(0.05)
            absent = [other for other, name in enumerate(names) if not store.check([name])]
            store.set(verdict, _describe_absent(absent, world_size, address, seconds) if absent else "all here")
            if absent:
                _linger(store, [f"{name} left" for other, name in enumerate(names) if other and other not in absent])
        else:
            while not store.check([verdict]):
                if time.monotonic() > end + _LINGER_SECONDS:  # rank 0's own time may have begun a little later
                    if not store.check(names[:1]):  # torchrun's own store, or another job's
                        raise NotAllArrived(_describe_absent([0], world_size, address, seconds))
                    raise NotAllArrived(f"rank 0 on {address} came, but did not say within {seconds:g} s who is absent")
                time.sleep(0.05)
        outcome = store.get(verdict).decode()
        if outcome != "all here":
            store.set(f"{names[rank]} left", "")
            raise NotAllArrived(outcome)
        return store
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise NotAllArrived(f"rank 0 on {address} ended before all ranks arrived: see its output ({reason})") from None


def _linger(store, names: list[str]) -> None:
    end = time.monotonic() + _LINGER_SECONDS
    while names and not store.check(names) and time.monotonic() < end:
        time.sleep(0.05)


def _open_store(address: str, port: int, rank: int, serve: bool, seconds: float):
    """One process serves the store; the others wait until its port answers, then connect."""
    from torch.distributed import TCPStore

    end = time.monotonic() + seconds
    reason = "" if serve else _wait_for_port(address, port, end)
    # A store answers at once. Half the time that is left: torch takes up to twice its limit, and the thread
    # should end before the process does. It exists because torch waits without end for a service that is silent.
    limit = timedelta(seconds=min(10.0, max((end - time.monotonic()) / 2, 0.1)))
    outcome = []

    def connect() -> None:
        try:
            outcome.append(TCPStore(address, port, None, serve, limit, wait_for_workers=False))
        except RuntimeError as error:
            outcome.append(error)

    if not reason:
        thread = threading.Thread(target=connect, daemon=True)
        thread.start()
        thread.join(max(end - time.monotonic(), 0.1))
        if outcome and isinstance(outcome[0], TCPStore):
            return outcome[0]
        reason = str(outcome[0]).splitlines()[0] if outcome else "no answer"
    if serve:
        cause = _taken(port, address) if "EADDRINUSE" in reason else f"no store on {address}:{port}"
        raise RendezvousError(f"rank {rank}: {cause} ({reason})")
    raise NotAllArrived(
        f"rank {rank} on {socket.gethostname()} did not reach rank 0 on {address}:{port} within {seconds:g} s "
        f"({reason}): look at rank 0's output, at MASTER_ADDR and MASTER_PORT, or at a firewall between the nodes"
    )


def _wait_for_port(address: str, port: int, end: float) -> str:
    """Return "" once the port accepts connections, or the last error at the monotonic time `end`."""
    while True:
        try:
            socket.create_connection((address, port), timeout=max(end - time.monotonic(), 0.1)).close()
            return ""
        except OSError as error:
            if time.monotonic() > end:
                return str(error)
            time.sleep(0.1)


def _taken(port: int, address: str) -> str:
    return f"port {port} on {address} is in use by another program; set MASTER_PORT to a free port for all ranks"


def _describe_absent(absent: list[int], world_size: int, address: str, seconds: float) -> str:
    shown = ", ".join(map(str, absent[:16])) + (", ..." if len(absent) > 16 else "")
    return (
        f"{len(absent)} of {world_size} ranks did not reach rank 0 on {address} within {seconds:g} s: {shown}; "
        "look at their nodes, or at a firewall between them"
    )


def mpi_world() -> tuple[int, int, int, int]:
    """Rank, size, rank on this node and size on this node, from MPI's world."""
    MPI = _mpi()
    node = MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED)
    return MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size, node.rank, node.size


def agree_through_mpi(address: str, rank: int, world_size: int) -> tuple[str, int]:
    """Rank 0's `address` and a free port of its host, broadcast by MPI. A collective.

    Raises:
        RendezvousError: mpi4py is missing, or belongs to another MPI than this mpirun.
    """
    world = _mpi().COMM_WORLD
    if (world.rank, world.size) != (rank, world_size):
        raise RendezvousError(
            f"mpirun started rank {rank} of {world_size}, but mpi4py reports rank {world.rank} of {world.size}: "
            "mpi4py is linked to another MPI than this mpirun's"
        )
    return world.bcast((address, free_port()) if rank == 0 else None)


def _mpi():
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise RendezvousError(
            f"started by mpirun, but mpi4py does not work ({reason}): install mpi4py, or pass MASTER_ADDR "
            "and MASTER_PORT to all ranks"
        ) from None
    return MPI
