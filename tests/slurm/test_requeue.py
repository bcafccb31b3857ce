"""What a job does when its step has ended: stand-ins for srun, scontrol and squeue, which do as the test says."""

import os
import signal
import subprocess
import time

import pytest

from tests.dist.ranks import REPOSITORY

SRUN = """
exec > /dev/null 2>&1
[ -z "$RANKS_SAY" ] || echo "$RANKS_SAY" > "$CCA_JOB_STATE/ended"
[ -z "$SAVED" ] || { mkdir -p "$CCA_OUTPUT/checkpoints"; echo "$SAVED" > "$CCA_OUTPUT/checkpoints/latest"; }
[ -z "$FAULTY" ] || echo "$FAULTY" > "$CCA_JOB_STATE/exclude"
if [ -n "$WAIT" ]; then
    trap 'kill $!; exit 0' USR1 TERM
    touch "$T/waiting"
    /bin/sleep 30 > /dev/null 2>&1 &
    wait
fi
exit "$STATUS"
"""
SCONTROL = """
echo "$*" >> "$T/calls"
case $1 in
    show) echo "JobId=42 JobState=$JOB_STATE Reason=$REASON Restarts=${RESTARTS_NOW:-0} ExcNodeList=$EXCLUDED x=" ;;
    requeue)
        tries=$(grep -c ^requeue "$T/calls")
        [ "$tries" -gt "$REFUSED" ] || { echo "Unable to contact slurm controller" >&2; exit 1; }
        kill -9 "$PPID" ;; # Slurm ends the job
esac
"""


@pytest.fixture
def job(tmp_path):
    """Run the job script once; its output, exit status and calls of scontrol."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("squeue", 'echo "$LEFT"')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)

    def run(signal_number=None, script="cca_3b.sh", **settings):
        (tmp_path / "calls").write_text("")
        defaults = dict.fromkeys(("RANKS_SAY", "SAVED", "FAULTY", "WAIT"), "") | {
            "STATUS": "1", "JOB_STATE": "RUNNING", "REASON": "None", "EXCLUDED": "(null)", "REFUSED": "0",
            "LEFT": "10:00:00", "CCA_RETRY_SECONDS": "0.1", "CCA_REQUEUE_SECONDS": "3", "T": str(tmp_path),
            "PATH": f"{tmp_path}:{os.environ['PATH']}", "CCA_HOME": str(REPOSITORY), "CCA_PYTHON": "true",
            "CCA_OUTPUT": str(tmp_path / "run"), "SLURM_JOB_ID": "42",
        }  # fmt: skip
        process = subprocess.Popen(
            ["bash", str(REPOSITORY / "slurm" / script)], env=defaults | settings, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        if signal_number is not None:
            while not (tmp_path / "waiting").exists():
                time.sleep(0.02)
            process.send_signal(signal_number)
        output, _ = process.communicate(timeout=30)
        (tmp_path / "waiting").unlink(missing_ok=True)
        return output, process.returncode, (tmp_path / "calls").read_text()

    return run


REQUEUED = -signal.SIGKILL


@pytest.mark.parametrize("said", ["2 train: config error", ""])
def test_bad_input_is_not_requeued(job, said):
    output, status, calls = job(STATUS="2" if not said else "137", RANKS_SAY=said)
    assert status == 2 and "requeue" not in calls
    assert "not requeued, since no further attempt heals this: " + (said[2:] or "ended with status 2") in output


def test_the_rank_that_failed_first_is_reported_now_and_in_the_next_attempts_log(job):
    say = {"RANKS_SAY": "1 rank 3 on n7: out of memory", "STATUS": "137"}
    output, status, calls = job(**say)
    assert status == REQUEUED and "requeue 42" in calls.splitlines()
    assert "rank 3 on n7: out of memory: requeueing" in output
    output, status, _ = job(SLURM_RESTART_COUNT="1", **say)
    assert status == REQUEUED and "the attempt before: rank 3 on n7: out of memory" in output
    output, status, calls = job(SLURM_RESTART_COUNT="2", **say)
    assert status == 1 and "requeue" not in calls
    assert "giving up: 3 attempts without a new checkpoint, the last with status 1: rank 3 on n7: out of" in output
    assert job(SLURM_RESTART_COUNT="0", **say)[1] == REQUEUED  # a corrected job counts anew


def test_an_attempt_that_left_no_word(job, tmp_path):
    job()
    (tmp_path / "run.job" / "ended").unlink()
    assert "the attempt before: ended without a word, by a kill or a lost node" in job(SLURM_RESTART_COUNT="1")[0]


def test_a_new_checkpoint_begins_the_count_again(job):
    for restart in range(6):
        assert job(SLURM_RESTART_COUNT=str(restart), SAVED=f"step_{restart // 2}")[1] == REQUEUED


def test_the_count_survives_the_runs_folder(job, tmp_path):
    """A refused start removes the folder that it made."""
    for restart in range(2):
        assert job(SLURM_RESTART_COUNT=str(restart))[1] == REQUEUED
        assert not (tmp_path / "run").exists()
    assert job(SLURM_RESTART_COUNT="2")[1] == 1


@pytest.mark.parametrize("content", ["PPID[$(touch touched)] nothing", "x nothing", "", "-5 nothing", "9999999 no"])
def test_the_count_is_read_as_a_number(job, tmp_path, content):
    job()
    (tmp_path / "run.job" / "failures").write_text(f"{content}\n")
    assert job(SLURM_RESTART_COUNT="1", CCA_ATTEMPTS="2")[1] == REQUEUED
    assert (tmp_path / "run.job" / "failures").read_text() == "1 nothing\n" and not (REPOSITORY / "touched").exists()


def test_a_stop_with_status_0_never_counts(job):
    """As in a preemption that signals the ranks alone. Where they wrote nothing it may be `--help`, which counts."""
    for restart in range(5):
        assert job(SLURM_RESTART_COUNT=str(restart), STATUS="0", RANKS_SAY="0 stopped by a signal")[1] == REQUEUED
    found = [job(SLURM_RESTART_COUNT=str(restart), STATUS="0")[1] for restart in range(3)]
    assert found == [REQUEUED, REQUEUED, 1]


def test_an_array_task_requeues_itself_alone(job):
    array = {"SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": "1", "CCA_SWEEP": "seed=1 seed=2"}
    assert "requeue 40_1" in job(**array)[2].splitlines()


def test_the_time_limit_is_a_stop_and_counts_without_progress(job):
    stop = {"WAIT": "1", "STATUS": "0"}
    for restart in range(2):
        output, status, _ = job(signal.SIGUSR1, SLURM_RESTART_COUNT=str(restart), **stop)
        assert status == REQUEUED and "stopped for the time limit: requeueing" in output
    output, status, _ = job(signal.SIGUSR1, SLURM_RESTART_COUNT="2", **stop)
    assert status == 1 and "giving up: 3 attempts without a new checkpoint" in output
    for restart in range(4):
        assert job(signal.SIGUSR1, SLURM_RESTART_COUNT=str(restart), SAVED=f"step_{restart}", **stop)[1] == REQUEUED


def test_a_limit_that_is_shorter_than_its_warning_is_refused(job):
    output, status, calls = job(signal.SIGUSR1, WAIT="1", STATUS="0", LEFT="4:31")
    assert status == 2 and "requeue" not in calls
    assert "the signal ahead of the time limit came at once, with 4:31 left: give a longer --time" in output
    assert job(signal.SIGUSR1, WAIT="1", STATUS="0", LEFT="1:04:31")[1] == REQUEUED  # a preemption


def test_a_save_that_outlasts_the_time_limit_is_requeued(job):
    output, status, _ = job(signal.SIGTERM, WAIT="1", JOB_STATE="COMPLETING", REASON="TimeLimit")
    assert status == REQUEUED and "the time limit came before the last checkpoint was whole: requeueing" in output
    late = {"WAIT": "1", "JOB_STATE": "COMPLETING", "REASON": "TimeLimit"}  # and nothing was ever saved
    found = [job(signal.SIGTERM, SLURM_RESTART_COUNT=str(restart), **late)[1] for restart in (1, 2)]
    assert found == [REQUEUED, 1]


def test_a_cancelled_job_is_not_requeued(job):
    _, status, calls = job(signal.SIGTERM, WAIT="1", STATUS="0", JOB_STATE="COMPLETING")
    assert status == 143 and "requeue" not in calls


def test_a_preemption_with_a_grace_time_is_requeued(job):
    for restart in range(4):
        assert job(signal.SIGTERM, SLURM_RESTART_COUNT=str(restart), WAIT="1", STATUS="0")[1] == REQUEUED


def test_a_controller_that_is_away_is_asked_again(job):
    output, status, calls = job(REFUSED="3")
    assert status == REQUEUED and [line.split()[0] for line in calls.splitlines()].count("requeue") == 4
    output, status, _ = job(REFUSED="99")
    assert status == 1 and "scontrol requeue keeps failing" in output and "submit again with CCA_OUTPUT=" in output


def test_a_requeue_by_slurm_itself_is_enough(job, tmp_path):
    """After a node failure. No second writer is asked for."""
    (tmp_path / "sleep").symlink_to("/bin/true")
    output, status, _ = job(REFUSED="99", RESTARTS_NOW="1")
    assert status == 0 and "submit again" not in output


def test_faulty_nodes_are_left_out(job, tmp_path):
    (tmp_path / "scontrol").write_text((tmp_path / "scontrol").read_text().replace('kill -9 "$PPID" ;;', "true ;;"))
    (tmp_path / "sleep").symlink_to("/bin/true")
    output, status, calls = job(FAULTY="n7", EXCLUDED="n1")
    assert status == 0 and "update job=42 ExcNodeList=n1,n7" in calls and "from now on without n1,n7" in output


def test_a_finished_job_leaves_nothing(job, tmp_path):
    job()
    (tmp_path / "run").mkdir()
    (tmp_path / "srun").write_text(f"#!/bin/bash\ntouch {tmp_path}/run/COMPLETED; exit 1\n")
    output, status, _ = job(SLURM_RESTART_COUNT="1")
    assert status == 0 and "done: " in output and not (tmp_path / "run.job").exists()


def test_only_finished_parts_of_a_table_are_progress_of_encoding(job, tmp_path):
    """Not what else lies in the parent folder, such as the job's own log."""
    for restart in range(2):
        (tmp_path / f"other-{restart}").touch()
        assert job(script="encode.sh", SLURM_RESTART_COUNT=str(restart))[1] == REQUEUED
    assert job(script="encode.sh", SLURM_RESTART_COUNT="2")[1] == 1
    records = tmp_path / "run.partial" / "records"
    records.mkdir(parents=True)
    (tmp_path / "srun").write_text(f"#!/bin/bash\ntouch {records}/$SLURM_RESTART_COUNT; exit 1\n")
    for restart in range(5):
        assert job(script="encode.sh", SLURM_RESTART_COUNT=str(restart))[1] == REQUEUED
