"""The job scripts on a real Slurm where something goes wrong: each job ends done, or once and for all with its reason.

Most jobs run a stand-in for the interpreter, which does nothing but end in a certain way: what is tested is the way
from there to the next attempt. tests/slurm/test_requeue.py has the cases that a cluster cannot be brought to.
"""

import os
import signal
import time
from pathlib import Path

import pytest

from tests.slurm.runs import EVERY, ONE_RANK, SETTINGS, STEPS, Run, program

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

FIRST_ATTEMPT = '[ "${SLURM_RESTART_COUNT:-0}" = 0 ]'


def done(run: Run) -> str:
    return f"mkdir -p {run.folder}; touch {run.folder}/COMPLETED"


def restarts(run: Run) -> str:
    return run.cluster.job(run.job)["Restarts"]


def test_a_common_mistake_ends_the_job_and_the_corrected_one_begins_afresh(run):
    wrong = f"{run.folder.parent}/no-such-codes"
    run.submit("--nodes=2", *ONE_RANK, CCA_DATA=wrong)
    assert run.end() == {"FAILED"} and restarts(run) == "0", run.output()
    assert "not requeued, since no further attempt heals this" in run.output() and wrong in run.output()
    assert not run.folder.exists()
    run.submit("--nodes=1", *ONE_RANK, CCA_DATA="digits", CCA_SET="batch.max_steps=1 data.workers=0")
    assert run.end() == {"COMPLETED"} and restarts(run) == "0", run.output()
    assert not Path(f"{run.folder}.job").exists()


def test_one_array_task_is_requeued_alone(run):
    mark = f"own={run.folder}/seed=$((SLURM_ARRAY_TASK_ID + 1)); mkdir -p $own; touch $own/COMPLETED"
    fail = f'[ "$SLURM_ARRAY_TASK_ID" = 0 ] || ! {FIRST_ATTEMPT} || exit 7'
    text = f"{fail}\necho ran >> {run.folder}.$SLURM_ARRAY_TASK_ID\n{mark}"
    interpreter = program(run.folder.parent / "p", text)
    run.submit("--nodes=1", "--array=0-1", *ONE_RANK, CCA_PYTHON=interpreter, CCA_SWEEP="seed=1 seed=2", CCA_SET="")
    assert run.end() == {"COMPLETED"}, run.output()
    lines = run.cluster.run(["scontrol", "show", "job", "-o", str(run.job)]).splitlines()
    found = {line.split("ArrayTaskId=")[1].split()[0]: line.split("Restarts=")[1].split()[0] for line in lines}
    assert found == {"0": "0", "1": "1"}
    assert [Path(f"{run.folder}.{task}").read_text() for task in (0, 1)] == ["ran\n", "ran\n"]


def test_a_save_that_outlasts_the_time_limit(run):
    text = f'trap "" TERM USR1\nif {FIRST_ATTEMPT}; then sleep 300 & wait; fi\n{done(run)}'
    interpreter = program(run.folder.parent / "p", text)
    run.submit("--nodes=1", *ONE_RANK[:-1], "--time=1", "--signal=B:URG@1", CCA_PYTHON=interpreter)
    assert run.end() == {"COMPLETED"} and restarts(run) == "1", run.output()
    assert "the time limit came before the last checkpoint was whole: requeueing" in run.output()


def test_a_time_limit_shorter_than_its_signal(run):
    interpreter = program(run.folder.parent / "p", "trap 'exit 0' USR1; sleep 200 & wait")
    run.submit("--nodes=1", *ONE_RANK[:-1], "--time=4", CCA_PYTHON=interpreter)
    assert run.end() == {"FAILED"} and restarts(run) == "0", run.output()
    assert "the signal ahead of the time limit came at once" in run.output()


def test_preempted_again_and_again(run, undisturbed):
    """More often than failures would be allowed to come, and nothing of the trajectory is lost."""
    run.submit("--nodes=1", *ONE_RANK, "--nodelist=h100", CCA_ATTEMPTS="1")
    for count in (1, 2):
        run.reach(2 * count)
        whole_node = ["--nodelist=h100", "--ntasks=8", "--mem=16000"]
        urgent = run.cluster.run(
            ["sbatch", "--parsable", "-p", "urgent", *whole_node, "--output=/dev/null", "--wrap", "sleep 1"]
        ).strip()
        run.until(lambda: run.cluster.job(run.job).get("PreemptTime", "None") != "None", "the preemption")
        run.go_on()
        run.until(lambda count=count: int(restarts(run)) == count, "the requeue")
        run.cluster.wait(int(urgent), 120)
    assert run.end() == {"COMPLETED"}, run.output()
    assert run.steps() == list(range(1, STEPS + 1))
    assert run.final_loss() == pytest.approx(undisturbed.final_loss(), abs=1e-5)


def test_a_rank_behind_a_cut_network_ends_itself(run, undisturbed):
    """Slurm gives its node up and starts the job elsewhere; the old rank, which lives on, must not write any more."""
    run.submit("--nodes=1", *ONE_RANK)
    run.reach(EVERY + 1)
    node, (old,) = run.cluster.job(run.job)["BatchHost"], run.frozen
    run.cluster.cut_network(node)
    try:
        run.until(lambda: run.output().count("taking over from") == 1, "the second attempt")
        run.go_on()  # the two write at once, if nothing stops the old one
        run.cluster.wait_for(lambda: not alive(old), 120, "the end of the old rank", run.job)
        assert run.end() == {"COMPLETED"}, run.output()
    finally:
        run.cluster.cut_network(node, cut=False)
        run.cluster.wait_for(lambda: run.cluster.states()[node] == "idle", 120, "the node to come back", run.job)
    logs = (run.folder / "logs" / "rank_00000.log").read_text()
    assert "has taken over; this process ends without writing more" in logs, run.output()
    assert run.steps() == list(range(1, STEPS + 1))
    assert run.final_loss() == pytest.approx(undisturbed.final_loss(), abs=1e-5)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return (Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]) != "Z"
    except OSError:
        return False


def test_a_faulty_node_is_left_out(run):
    fail = f'echo "$SLURMD_NODENAME" | tee "$CCA_JOB_STATE/exclude" > {run.folder}.first; exit 1'
    interpreter = program(run.folder.parent / "p", f"if {FIRST_ATTEMPT}; then {fail}; fi\n{done(run)}")
    run.submit("--nodes=1", *ONE_RANK, CCA_PYTHON=interpreter)
    assert run.end() == {"COMPLETED"} and restarts(run) == "1", run.output()
    first = Path(f"{run.folder}.first").read_text().strip()
    job = run.cluster.job(run.job)
    assert job["ExcNodeList"] == first != job["BatchHost"]
    assert f"from now on without {first}" in run.output()


def test_a_controller_that_goes_away(run):
    """While the job fails: it asks until Slurm is back."""
    wait = f"touch {run.folder}.started; while [ ! -e {run.folder}.away ]; do sleep 0.1; done; exit 1"
    text = f"if {FIRST_ATTEMPT}; then {wait}; fi\n{done(run)}"
    run.submit("--nodes=1", *ONE_RANK, CCA_PYTHON=program(run.folder.parent / "p", text), CCA_RETRY_SECONDS="1")
    run.until(Path(f"{run.folder}.started").exists, "the program")
    run.cluster.stop_controller()
    try:
        Path(f"{run.folder}.away").touch()
        end = time.monotonic() + 60
        while not run.output().partition("requeueing")[2].strip():  # what scontrol says
            assert time.monotonic() < end, run.output()
            time.sleep(0.2)
    finally:
        run.cluster.start_controller()
    assert run.end() == {"COMPLETED"} and restarts(run) == "1", run.output()


def test_what_ranks_get_of_an_environment_that_was_picked_and_of_other_flags(run):
    """sbatch --export=LIST, another flag for GPUs, and variables of the shell that called sbatch."""
    text = f"env | grep -E 'NCCL_IB_TIMEOUT|MASTER|OMP_NUM|GPUS_ON_NODE' > {run.folder}.env\n{done(run)}"
    picked = ["CCA_PYTHON", "CCA_OUTPUT", "CCA_RECIPE", "PATH", "SLURM_CONF", "MASTER_ADDR"]
    flags = [flag for flag in ONE_RANK if not flag.startswith("--gpus")]
    run.submit(
        "--nodes=1", *flags, "--gres=gpu:2", f"--export={','.join(picked)}",
        CCA_PYTHON=program(run.folder.parent / "p", text), MASTER_ADDR="login", CCA_SET="",
    )  # fmt: skip
    assert run.end() == {"COMPLETED"}, run.output()
    found = Path(f"{run.folder}.env").read_text().splitlines()
    assert {"NCCL_IB_TIMEOUT=22", "OMP_NUM_THREADS=1", "SLURM_GPUS_ON_NODE=2"} <= set(found)
    assert not any(line.startswith("MASTER") for line in found)


def test_killed_and_stopped_ranks(run, undisturbed):
    """The one that failed first is named, in this attempt's log and in the next one's."""
    job = run.submit("--nodes=2", *ONE_RANK, CCA_SET=f"{SETTINGS} distributed.timeout_seconds=10")
    run.reach(EVERY + 1)
    first = run.frozen[0]
    for rank in run.frozen[1:]:
        os.kill(rank, signal.SIGCONT)  # one stays stopped: the watchdog names it
    run.until(lambda: int(restarts(run)) == 1, "the requeue")
    run.until(lambda: not alive(first), "the end of the stopped rank")  # Slurm counts the restart before it kills
    assert run.end() == {"COMPLETED"}, run.output()
    assert run.output().count("has not answered for 10 s") >= 2, run.output()
    assert f"[{job}]: the attempt before: rank" in run.output()
    assert run.steps() == list(range(1, STEPS + 1))
    assert run.final_loss() == pytest.approx(undisturbed.final_loss(), abs=1e-5)
