"""The helper that starts ranks: what ranks see, what a failure shows, and that nothing outlives it."""

import os
import signal

import pytest

from tests.dist.ranks import RanksFailed, run_ranks, start_ranks

PROGRAM = """
import os, sys, time
print(os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ.get("SLURM_JOB_ID"), sys.argv[1:])
if sys.argv[1:] == ["sleep"]:
    time.sleep(600)
if sys.argv[1:] == ["fail"] and os.environ["RANK"] == "1":
    sys.exit("rank one is unhappy")
"""


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


def test_outputs_come_by_rank_without_other_launchers_variables(program, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    outputs = run_ranks(program, 2, arguments=["a"])
    assert [output.stdout for output in outputs] == ["0 2 None ['a']\n", "1 2 None ['a']\n"]


def test_a_failing_rank_is_shown(program):
    with pytest.raises(RanksFailed, match="rank one is unhappy"):
        run_ranks(program, 2, arguments=["fail"])
    assert [o.returncode for o in run_ranks(program, 2, arguments=["fail"], check=False)] == [0, 1]


def test_nothing_outlives_the_with_block(program):
    with start_ranks(program, 2, arguments=["sleep"]) as ranks:
        ranks.wait_for("0 2", rank=0)
        ranks.signal(0, signal.SIGTERM)
        assert [output.returncode for output in ranks.wait(timeout=30, grace=0.2)] == [-15, -9]
        pids = [process.pid for process in ranks.processes]
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
