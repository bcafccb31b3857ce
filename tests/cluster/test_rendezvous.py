"""Ranks meet on a port that they agree on, and name those who do not come."""

import socket
import threading
import time
from dataclasses import replace

from cca_ds.cluster import rendezvous
from cca_ds.cluster.launch import find_ranks
from cca_ds.cluster.launchers import LaunchError
from tests.support.launcher_environments import SRUN


def test_ports_follow_from_job_step_and_restart():
    ports = [
        rendezvous.candidate_ports(key)
        for key in ("slurm:1.0:0", "slurm:1.0:1", "slurm:1.1:0", "slurm:2.0:0")
    ]
    assert rendezvous.candidate_ports("slurm:1.0:0") == ports[0]
    assert len({tuple(p) for p in ports}) == 4
    assert all(20000 <= port < 32000 for p in ports for port in p)
    assert all(len(set(p)) == len(p) for p in ports)


def meet_together(count, key, seconds=10.0, absent=()):
    """Results (Ranks or LaunchError) of `count` ranks that meet from threads of this process."""
    one = replace(find_ranks(SRUN, 0), world_size=count, master_address="127.0.0.1", meeting_key=key)
    results = {}

    def run(rank):
        try:
            results[rank] = rendezvous.meet(replace(one, rank=rank), seconds)
        except LaunchError as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count) if rank not in absent]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


def test_ranks_agree_on_a_free_port_past_strangers():
    key = f"slurm:{time.time_ns()}.0:0"
    strangers = []
    for port in rendezvous.candidate_ports(key)[:3]:  # three services of somebody else; one says nonsense
        listener = socket.socket()
        listener.bind(("", port))
        listener.listen()
        strangers.append(listener)

    def nonsense():
        while True:
            try:
                caller, _ = strangers[0].accept()
            except OSError:
                return
            caller.sendall(b"220 mail ready\n")
            caller.close()

    threading.Thread(target=nonsense, daemon=True).start()
    for listener in strangers[1:]:
        listener.close()
    results = meet_together(3, key)
    strangers[0].close()
    ports = {result.master_port for result in results.values()}
    assert len(ports) == 1
    assert ports <= set(rendezvous.candidate_ports(key)[1:])
    with socket.socket() as probe:  # free for the store
        probe.bind(("", ports.pop()))


def test_another_restart_of_the_job_is_not_answered():
    key = f"slurm:{time.time_ns()}.0:0"
    one = replace(find_ranks(SRUN, 0), world_size=2, master_address="127.0.0.1", meeting_key=key)
    outcome = {}
    main = threading.Thread(
        target=lambda: outcome.update(port=rendezvous.meet(replace(one, rank=0), 10).master_port)
    )
    main.start()
    time.sleep(0.2)
    door = rendezvous.candidate_ports(key)[0]
    with socket.create_connection(("127.0.0.1", door), timeout=5) as stale:
        stale.sendall(f"{key}9 1 2\n".encode())
        assert stale.makefile().readline() == ""
    assert rendezvous.meet(replace(one, rank=1), 10).master_port == rendezvous.candidate_ports(key)[1]
    main.join(10)
    assert outcome["port"] == rendezvous.candidate_ports(key)[1]


def test_a_rank_that_never_comes_is_named_in_time():
    start = time.monotonic()
    results = meet_together(4, f"slurm:{time.time_ns()}.0:0", seconds=1.0, absent=(2,))
    assert time.monotonic() - start < 10
    assert "1 of 4 ranks did not reach rank 0" in str(results[0])
    assert str(results[0]).partition(" s: ")[2].startswith("2;")
    assert results[1].master_port == results[3].master_port


def test_ranks_without_rank_0_name_its_node_in_time():
    results = meet_together(2, f"slurm:{time.time_ns()}.0:0", seconds=1.0, absent=(0,))
    assert "rank 1" in str(results[1])
    assert "did not reach rank 0 on 127.0.0.1 within 1 s" in str(results[1])
