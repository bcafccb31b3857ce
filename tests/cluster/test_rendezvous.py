"""Ranks that srun started agree on a port through torch's store, and name the ranks that do not start."""

import socket
import threading
import time

import pytest
import torch.distributed as dist

from cca_ds.cluster.rendezvous import RendezvousError, derived_port, meet


def test_the_port_follows_from_job_step_and_restart():
    keys = ["slurm:1.0:0", "slurm:1.0:1", "slurm:1.1:0", "slurm:2.0:0"]
    ports = [derived_port(key) for key in keys]
    assert ports == [derived_port(key) for key in keys]
    assert len(set(ports)) == 4
    assert all(20000 <= port < 32000 for port in ports)


@pytest.fixture
def key():
    return f"slurm:{time.time_ns()}.0:0"


def meet_together(count, key, seconds=10.0, absent=()):
    """By rank, the store's port or the error of `count` ranks that run in threads of this process."""
    results, stores = {}, []

    def run(rank):
        try:
            stores.append(meet("127.0.0.1", derived_port(key), key, rank, count, seconds, serve=rank == 0))
            results[rank] = stores[-1].port
        except RendezvousError as error:
            results[rank] = str(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count) if rank not in absent]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert all("\n" not in str(result) for result in results.values())
    return results


def test_all_ranks_meet_at_one_store(key):
    assert meet_together(3, key) == dict.fromkeys(range(3), derived_port(key))


def test_two_jobs_at_once_do_not_meet(key):
    both = {}
    jobs = [
        threading.Thread(target=lambda name=name: both.update({name: meet_together(2, name)}))
        for name in (key, f"{key}1")
    ]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(30)
    assert [len(set(results.values())) for results in both.values()] == [1, 1]
    assert both[key][0] != both[f"{key}1"][0]


@pytest.mark.parametrize("answer", [None, b"220 mail ready\n"])
def test_another_service_on_the_port_is_an_error_line(key, answer):
    with socket.socket() as listener:
        listener.bind(("", derived_port(key)))
        listener.listen()
        calls = []

        def serve():
            while True:
                try:
                    calls.append(listener.accept()[0])
                except OSError:
                    return
                if answer is not None:
                    calls[-1].sendall(answer)
                    calls[-1].close()

        threading.Thread(target=serve, daemon=True).start()
        start = time.monotonic()
        results = meet_together(2, key, seconds=1.0)
        assert time.monotonic() - start < 5
        listener.shutdown(socket.SHUT_RDWR)
    for call in calls:
        call.close()
    port = derived_port(key)
    assert f"rank 0: port {port} on 127.0.0.1 is in use by another program; set MASTER_PORT" in results[0]
    assert f"did not reach rank 0 on 127.0.0.1:{port} within 1 s" in results[1]


def test_another_jobs_store_on_the_port_is_an_error_line(key):
    store = dist.TCPStore("127.0.0.1", derived_port(key), None, True, wait_for_workers=False)
    store.set("slurm:1.0:0/port", "4711")
    results = meet_together(2, key, seconds=0.5)
    assert "is in use by another program; set MASTER_PORT" in results[0]
    assert results[1].startswith("1 of 2 ranks did not reach rank 0 on 127.0.0.1 within 0.5 s: 0;")


def test_a_rank_that_does_not_start_is_named_in_time(key):
    start = time.monotonic()
    results = meet_together(4, key, seconds=1.0, absent=(2,))
    assert time.monotonic() - start < 5
    named = "1 of 4 ranks did not reach rank 0 on 127.0.0.1 within 1 s: 2;"
    assert len(results) == 3 and all(result.startswith(named) for result in results.values())


def test_ranks_without_rank_0_name_its_host_in_time(key):
    start = time.monotonic()
    results = meet_together(2, key, seconds=1.0, absent=(0,))
    assert time.monotonic() - start < 5
    assert "did not reach rank 0 on 127.0.0.1:" in results[1] and "within 1 s" in results[1]
