"""How ranks agree on one address and free port before torch's own rendezvous.

Under srun every rank knows the first node, but a port that is free there only the rank on it can know. Rank 0
listens on the first free one of a few ports that follow from the job's number; the others knock at these, each
knock carrying the job's key, and are told the port of the store. A stranger's service on one of them does not
know the key, and a rank that never comes is named. Under mpirun the same is told through MPI.
"""

from __future__ import annotations

import socket
import time
import zlib
from dataclasses import replace

from cca_ds.cluster.launchers import LaunchError, Ranks

# below Linux's ephemeral range (32768 and up), so that no outgoing connection takes one by chance
_FIRST_PORT, _PORTS = 20000, 12000
_CANDIDATES, _STRIDE = 8, 97
_KNOCK_SECONDS = 2.0


def candidate_ports(meeting_key: str) -> list[int]:
    """Ports of one start, the same on every rank: they follow from the job, step and restart count."""
    start = zlib.crc32(meeting_key.encode())
    return [_FIRST_PORT + (start + i * _STRIDE) % _PORTS for i in range(_CANDIDATES)]


def meet(ranks: Ranks, seconds: float) -> Ranks:
    """Fill in the master's address and port.

    Raises:
        LaunchError: a rank did not come within `seconds`, or none of the ports is free.
    """
    if ranks.master_address is not None and ranks.master_port is not None:
        return ranks
    if ranks.world_size == 1:
        return replace(ranks, master_address="127.0.0.1", master_port=_any_free_port())
    if ranks.launcher == "mpi":
        address, port = _tell_through_mpi(ranks)
        return replace(ranks, master_address=address, master_port=port)
    assert ranks.master_address is not None and ranks.meeting_key
    port = _receive(ranks, seconds) if ranks.rank == 0 else _knock(ranks, seconds)
    return replace(ranks, master_port=port)


def _any_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _listen(port: int) -> socket.socket | None:
    listener = socket.socket()
    # a port whose last connection is still winding down is as good as free
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("", port))
        listener.listen(512)
    except OSError:
        listener.close()
        return None
    return listener


def _receive(ranks: Ranks, seconds: float) -> int:
    """Rank 0: tell every other rank the store's port."""
    free = [listener for listener in map(_listen, candidate_ports(ranks.meeting_key)) if listener]
    for surplus in free[2:]:
        surplus.close()
    if len(free) < 2:
        raise LaunchError(
            f"fewer than two of the ports {candidate_ports(ranks.meeting_key)} are free on {ranks.host}: "
            "set MASTER_PORT to a free one"
        )
    door, store = free[:2]
    absent = set(range(1, ranks.world_size))
    end = time.monotonic() + seconds
    with door, store:
        port = store.getsockname()[1]
        while absent:
            door.settimeout(max(end - time.monotonic(), 0.01))
            try:
                caller, _ = door.accept()
            except TimeoutError:
                raise LaunchError(_absence(ranks, absent, seconds)) from None
            with caller:
                absent.discard(_answer(caller, ranks, port))
    return port


def _absence(ranks: Ranks, absent: set[int], seconds: float) -> str:
    shown = ", ".join(map(str, sorted(absent)[:16])) + (", ..." if len(absent) > 16 else "")
    return (
        f"{len(absent)} of {ranks.world_size} ranks did not reach rank 0 on {ranks.host} within "
        f"{seconds:g} s: {shown}; look at their nodes, or at a firewall between them"
    )


def _answer(caller: socket.socket, ranks: Ranks, port: int) -> int | None:
    """The caller's rank, told the port; None for a stranger."""
    try:
        caller.settimeout(_KNOCK_SECONDS)
        key, rank, world_size = caller.makefile().readline().split()
        if key != ranks.meeting_key or int(world_size) != ranks.world_size:
            return None
        caller.sendall(f"{key} {port}\n".encode())
        return int(rank)
    except (OSError, ValueError):
        return None


def _knock(ranks: Ranks, seconds: float) -> int:
    end = time.monotonic() + seconds
    trouble = "no answer"
    while time.monotonic() < end:
        for candidate in candidate_ports(ranks.meeting_key):
            try:
                port = _ask(ranks, candidate)
            except OSError as error:
                trouble = str(error)
                continue
            if port is not None:
                return port
        time.sleep(0.2)
    raise LaunchError(
        f"rank {ranks.rank} on {ranks.host} did not reach rank 0 on {ranks.master_address} within "
        f"{seconds:g} s ({trouble}): look at that node, or at a firewall between them"
    )


def _ask(ranks: Ranks, candidate: int) -> int | None:
    with socket.create_connection((ranks.master_address, candidate), timeout=_KNOCK_SECONDS) as door:
        door.sendall(f"{ranks.meeting_key} {ranks.rank} {ranks.world_size}\n".encode())
        try:
            key, port = door.makefile().readline().split()
        except (ValueError, UnicodeDecodeError):
            return None
        return int(port) if key == ranks.meeting_key and port.isdigit() else None


def mpi_world() -> tuple[int, int, int, int]:
    """Rank, size, rank on this node and size on this node, from MPI's world."""
    MPI = _mpi()
    node = MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED)
    return MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size, node.rank, node.size


def _tell_through_mpi(ranks: Ranks) -> tuple[str, int]:
    world = _mpi().COMM_WORLD
    if (world.rank, world.size) != (ranks.rank, ranks.world_size):
        raise LaunchError(
            f"mpirun started rank {ranks.rank} of {ranks.world_size}, but mpi4py says rank {world.rank} of "
            f"{world.size}: mpi4py is linked to another MPI than this mpirun's"
        )
    # a lone machine's own name need not resolve
    address = "127.0.0.1" if ranks.local_world_size == ranks.world_size else ranks.host
    return world.bcast((address, _any_free_port()) if ranks.rank == 0 else None)


def _mpi():
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise LaunchError(
            f"started by mpirun, but mpi4py does not work ({reason}): install mpi4py, or pass MASTER_ADDR "
            "and MASTER_PORT to all ranks"
        ) from None
    return MPI
