"""The training script on a real Slurm of three nodes: time limit, power cut, cancellation and job arrays.

Where a test needs the run at a certain place, it stops the ranks' processes there and lets them go on afterwards, so
that nothing depends on how fast the machine is.
"""

import json

import pytest

from cca_ds.checkpoints import store
from tests.slurm.runs import EVERY, ONE_RANK, SETTINGS, START, STEPS, Run

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def test_two_nodes_to_the_end(undisturbed):
    assert undisturbed.steps() == list(range(1, STEPS + 1))
    assert json.loads((undisturbed.folder / "summary.json").read_text())["ranks"] == 2
    assert "done: " in undisturbed.output()
    assert undisturbed.cluster.job(undisturbed.job)["Restarts"] == "0"


def test_a_finished_run_is_not_run_again(undisturbed):
    before = (undisturbed.folder / "metrics.jsonl").stat().st_mtime_ns
    again = Run(undisturbed.cluster, undisturbed.folder.parent)
    again.submit("--nodes=2", *ONE_RANK)
    assert again.end() == {"COMPLETED"}
    assert "finished before: " in again.output()
    assert (undisturbed.folder / "metrics.jsonl").stat().st_mtime_ns == before


def test_time_limit_requeue_and_continuation(run, undisturbed):
    job = run.submit("--nodes=2", *ONE_RANK, "--signal=B:USR1@120")
    run.reach(EVERY + 1)
    # one to two minutes are left then, less than the signal's 120 seconds: Slurm sends it by itself
    hours, minutes, _ = map(int, run.cluster.job(job)["RunTime"].split(":"))
    run.cluster.run(["scontrol", "update", f"job={job}", f"TimeLimit={60 * hours + minutes + 2}"])
    run.until(lambda: "SIGUSR1: the time limit" in run.output(), "the signal")
    run.cluster.run(["scontrol", "update", f"job={job}", "TimeLimit=60"])
    run.go_on()
    run.until(lambda: "stopped for the time limit: requeueing" in run.output(), "the requeue")
    stopped_after = max(run.steps())
    assert stopped_after < STEPS
    newest, _ = store.newest_verified(run.folder / "checkpoints")
    assert store.read_manifest(newest).step == stopped_after
    assert run.end() == {"COMPLETED"}, run.output()
    assert run.cluster.job(job)["Restarts"] == "1"
    assert run.steps() == list(range(1, STEPS + 1))
    assert run.final_loss() == pytest.approx(undisturbed.final_loss(), abs=1e-5)


def test_power_cut_requeue_on_other_nodes_and_continuation(run, undisturbed):
    job = run.submit("--nodes=2", *ONE_RANK)
    run.reach(EVERY + 1)
    nodes = run.cluster.run(["scontrol", "show", "hostnames", run.cluster.job(job)["NodeList"]]).split()
    lost = next(node for node in nodes if node != run.cluster.job(job)["BatchHost"])
    run.cluster.power_cut(lost)
    try:
        run.until(lambda: int(run.cluster.job(job).get("Restarts", 0)) > 0, "the requeue")
        assert run.end() == {"COMPLETED"}, run.output()
        after = run.cluster.run(["scontrol", "show", "hostnames", run.cluster.job(job)["NodeList"]]).split()
    finally:
        run.cluster.start_node(lost)
    assert len(after) == 2
    assert lost not in after
    assert f"last checkpoint: step_{EVERY:08d}" in run.output()
    assert run.steps() == list(range(1, STEPS + 1))
    assert run.final_loss() == pytest.approx(undisturbed.final_loss(), abs=1e-5)


def test_scancel_ends_the_run_for_good_and_leaves_it_usable(run):
    job = run.submit("--nodes=2", *ONE_RANK)
    run.reach(EVERY + 1)
    run.cluster.run(["scancel", str(job)])
    assert run.end() == {"CANCELLED"}, run.output()
    run.cluster.wait_for(lambda: not run.cluster.ranks_of(job), START, "the end of every rank", job)
    assert run.cluster.job(job)["Restarts"] == "0"
    assert not (run.folder / "COMPLETED").exists()
    newest, _ = store.newest_verified(run.folder / "checkpoints")
    assert store.read_manifest(newest).step >= EVERY


def test_job_array_over_lambda(run):
    sweep = {"CCA_SWEEP": "loss.lambda=1 loss.lambda=100", "CCA_SET": f"{SETTINGS} batch.max_steps=2"}
    run.submit("--nodes=1", "--array=0-1", *ONE_RANK, **sweep)
    assert run.end() == {"COMPLETED"}, run.output()
    losses = []
    for value in ("1", "100"):
        folder = run.folder / f"loss.lambda={value}"
        assert (folder / "COMPLETED").exists(), run.output()
        assert f"lambda: {value}.0" in (folder / "config.yaml").read_text()
        losses.append(json.loads((folder / "summary.json").read_text())["final"]["loss"])
    assert losses[0] != losses[1]
