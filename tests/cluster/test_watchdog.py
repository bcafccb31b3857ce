"""A silent rank is named, with its host, within the limit; a run without one is not disturbed."""

import signal
import socket
import time

import pytest

from cca_ds.cluster.watchdog import EXIT_SILENT, Seen, judge
from tests.dist.fork_server import ForkedRanks
from tests.dist.ranks import run_ranks, start_ranks

HOST = socket.gethostname()
LIMIT = 3.0


def seen(**changes):
    return Seen(**{"life": 5, "progress": 40, "where": "training, step 20", "host": "h100", "pid": 7, **changes})


def test_no_verdict_while_every_rank_reports():
    assert judge([seen(), seen(life_silent=9.0, progress_silent=11.0)], 10.0) is None


def test_a_silent_process_is_named_before_those_that_wait_for_it():
    waiting = seen(progress_silent=30.0, progress=41)
    silent = seen(host="a100", life_silent=11.0, progress_silent=11.0)
    assert judge([waiting, silent], 10.0) == (
        "rank 1 on a100 (pid 7) has not answered for 10 s; last heard of in training, step 20"
    )


def test_the_main_thread_that_is_behind_is_named_once_no_rank_makes_progress():
    ahead, behind = (seen(progress_silent=11.0), seen(progress=39, progress_silent=12.0, where="reading data, step 20"))
    assert judge([ahead, behind], 10.0) == (
        "no progress for 10 s; behind the others: rank 1 on h100 in reading data, step 20"
    )
    assert judge([seen(progress_silent=1.0), behind], 10.0) is None
    assert "all are at one place: rank 0 on h100" in judge([ahead, ahead], 10.0)


def test_a_rank_that_closed_its_watchdog_is_not_named():
    assert judge([seen(), seen(gone=True, life_silent=99.0, progress_silent=99.0)], 10.0) is None


@pytest.mark.dist
@pytest.mark.parametrize("stopped", [0, 2])
def test_a_stopped_rank_ends_the_run_within_the_limit(stopped):
    with start_ranks("tests/dist/watched.py", 3, arguments=[str(LIMIT), "-1", "0"], group=ForkedRanks) as ranks:
        for rank in range(3):
            ranks.wait_for("step 5\n", rank=rank, timeout=90)
        start = time.monotonic()
        ranks.signal(stopped, signal.SIGSTOP)
        others = [rank for rank in range(3) if rank != stopped]
        for rank in others:
            ranks.processes[rank].wait(timeout=6 * LIMIT)
        assert time.monotonic() - start < 3 * LIMIT
        for rank in others:
            output = ranks.output(rank)
            # 1: its main thread saw the others leave before its own watchdog ended it
            assert output.returncode in (EXIT_SILENT, 1), ranks.tails()
            assert f"rank {stopped} on {HOST if stopped else '127.0.0.1'}" in output.stderr, ranks.tails()


@pytest.mark.dist
def test_a_main_thread_that_hangs_ends_the_run_with_its_place_named():
    with start_ranks("tests/dist/watched.py", 2, arguments=[str(LIMIT), "1", "0"], group=ForkedRanks) as ranks:
        outputs = ranks.wait(timeout=90)
    assert outputs[1].returncode == EXIT_SILENT
    for output in outputs:
        assert output.returncode in (EXIT_SILENT, 1)
        assert f"behind the others: rank 1 on {HOST} in reading data, step 3" in output.stderr


@pytest.mark.dist
def test_a_run_without_a_silent_rank_ends_normally():
    outputs = run_ranks("tests/dist/watched.py", 2, arguments=["1", "-1", "40"], timeout=90, group=ForkedRanks)
    assert all(output.stdout.endswith("step 40\nclosed\n") for output in outputs)
