"""What goes wrong on one rank ends the run on all, soon, with the rank named; a signal ends it with a checkpoint."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from cca_ds.checkpoints.store import complete_checkpoints, newest_verified
from cca_ds.data.pairs import epoch_order, make_pairs
from tests.dist.fork_server import CPU_ONLY, ForkedRanks
from tests.dist.ranks import REPOSITORY, clean_environment, free_port
from tests.dist.runs import PATIENCE, command, losses, metrics, scratch, start_training
from tests.support.digits_table import digits_table

pytestmark = pytest.mark.dist

LONG = ("batch.max_steps=5000", "batch.epochs=100", "checkpoint.every_steps=1000")


def wait_for_step(running, folder: Path, step: int) -> None:
    """Until the run has logged `step`."""
    end = time.monotonic() + PATIENCE
    while True:
        lines = (folder / "metrics.jsonl").read_text().splitlines() if (folder / "metrics.jsonl").is_file() else []
        if len(lines) >= step:
            return
        assert time.monotonic() < end, running.tails()
        assert all(process.poll() is None for process in running.processes), running.tails()
        time.sleep(0.02)


def ended(running, rank: int):
    """Seconds until one rank has ended, and its output, while others may live on."""
    started = time.monotonic()
    while running.processes[rank].poll() is None and time.monotonic() < started + PATIENCE:
        time.sleep(0.05)
    return time.monotonic() - started, running.output(rank)


def worker_of(pid: int) -> int:
    """A child process."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        if children:
            return int(children[0])
        time.sleep(0.02)
    raise AssertionError("no child")


@pytest.mark.parametrize(
    ("name", "rank", "settings"),
    [
        ("SIGTERM", 1, ("data.workers=1",)),
        pytest.param("SIGINT", 0, (), marks=pytest.mark.slow),  # the launcher's test sends it too
        ("SIGUSR1", 1, ("checkpoint.asynchronous=true",)),
    ],
)
def test_a_signal_to_any_rank_ends_all_with_a_checkpoint(name, rank, settings, tmp_path):
    """It reaches the rank's whole process group, its data-loader worker included, as Slurm sends it."""
    folder = tmp_path / "run"
    with start_training(2, folder, *LONG, *settings) as running:
        wait_for_step(running, folder, 2)
        running.signal(rank, getattr(signal, name))
        outputs = running.wait(PATIENCE)
    assert [output.returncode for output in outputs] == [0, 0], outputs
    found, manifest = newest_verified(folder / "checkpoints", report=pytest.fail)
    assert f"stopped by a signal after step {manifest.step}: checkpoint saved" in outputs[0].stderr
    assert len(losses(folder)) == manifest.step < 5000
    assert complete_checkpoints(folder / "checkpoints") == [found]
    assert not (folder / "COMPLETED").exists() and not (folder / "summary.json").exists()


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    with start_training(1, tmp_path / "run", *LONG, "data.workers=1") as running:
        wait_for_step(running, tmp_path / "run", 1)
        (pid,) = [process.pid for process in running.processes]
        worker = worker_of(pid)
        os.kill(worker, signal.SIGSTOP)  # no step comes any more, so the first signal is never seen
        time.sleep(0.5)
        os.kill(pid, signal.SIGINT)
        time.sleep(1.2)
        assert running.processes[0].poll() is None
        os.kill(pid, signal.SIGINT)
        (output,) = running.wait(PATIENCE)
    assert output.returncode == 128 + signal.SIGINT
    assert "interrupted a second time: ended at once" in output.stderr


def test_ctrl_c_through_the_deepspeed_launcher(tmp_path):
    """As the terminal sends it: to the launcher and to both ranks."""
    folder = tmp_path / "run"
    python, script, *arguments = command(folder, *LONG)
    launcher = [
        str(Path(python).parent / "deepspeed"),
        f"--master_port={free_port()}",
        "--num_gpus",
        "2",
        script,
        *arguments,
    ]
    environment = clean_environment(CPU_ONLY)
    with open(tmp_path / "console", "w") as console:
        process = subprocess.Popen(
            launcher, cwd=REPOSITORY, env=environment, stdout=console, stderr=console, start_new_session=True
        )
    try:
        end = time.monotonic() + PATIENCE
        while len(metrics(folder)) < 1:
            assert time.monotonic() < end and process.poll() is None, (tmp_path / "console").read_text()
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        process.wait(PATIENCE)
        end = time.monotonic() + PATIENCE
        while not complete_checkpoints(folder / "checkpoints"):  # the launcher does not wait for its ranks
            assert time.monotonic() < end, (tmp_path / "console").read_text()
            time.sleep(0.1)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    _, manifest = newest_verified(folder / "checkpoints", report=pytest.fail)
    assert len(losses(folder)) == manifest.step
    assert f"stopped by a signal after step {manifest.step}" in (tmp_path / "console").read_text()
    assert not (folder / "COMPLETED").exists()


def pairs_of_step(step: int, global_size: int = 32):
    table = digits_table(scratch() / "data")
    indices = epoch_order(len(table), 0, 0)[step * global_size : (step + 1) * global_size]
    return make_pairs(indices, table.labels[indices], null_class=10, mask_probability=0.1, crops=1, seed=0, epoch=0)


def train_script(name, ranks, folder, *settings, environment=None, ds=None):
    """Three steps by a script of this folder, to their end."""
    python, _, *arguments = command(folder, "batch.max_steps=3", *settings, ds=ds)
    script = [python, str(REPOSITORY / "tests/dist" / name), *arguments]
    with ForkedRanks(script, ranks, environment, None) as running:
        return running.wait(PATIENCE)


def test_a_loss_that_is_not_finite_stops_before_the_optimizer_step(tmp_path):
    """The embedding of one class is spoilt: exactly the samples that use it are named."""
    first = pairs_of_step(0)
    spoilt = int(first.positive_labels_K[0]) if first.positive_labels_K[0] < 10 else int(first.positive_labels_K[1])
    used = (first.positive_labels_K == spoilt) | (first.negative_labels_K == spoilt)
    folder = tmp_path / "run"
    outputs = train_script("train_spoilt.py", 2, folder, environment={"SPOILT_CLASS": str(spoilt)})
    assert all(output.returncode != 0 for output in outputs)
    line = next(line for line in outputs[0].stderr.splitlines() if "is not finite" in line)
    assert "step 1: the loss is not finite" in line and "the optimizer has not stepped" in line
    for rank, half in ((0, slice(0, 16)), (1, slice(16, 32))):
        samples = first.sample_indices_K[half][used[half]].tolist()
        assert (f"rank {rank} (" in line) == bool(samples)
        assert not samples or f"samples {samples[:8]}" in line
    assert metrics(folder) == [] and not complete_checkpoints(folder / "checkpoints")


@pytest.mark.parametrize("stage", [3, 2])
def test_a_gradient_that_is_not_finite_stops_before_the_optimizer_step(stage, tmp_path):
    """At r = 0 the loss is finite whatever beta is, and its gradient grows with beta."""
    folder = tmp_path / "run"
    ds = REPOSITORY / "ds_configs/zero2.json" if stage == 2 else None
    (output,) = train_script("train_spoilt.py", 1, folder, environment={"SPOILT_BETA": "1e38"}, ds=ds)
    assert output.returncode == 1
    assert "step 1: the gradient is not finite" in output.stderr
    assert "the optimizer has not stepped" in output.stderr
    assert metrics(folder) == [] and not complete_checkpoints(folder / "checkpoints")


def test_a_killed_data_loader_worker_ends_the_run_with_its_rank_named(tmp_path):
    folder = tmp_path / "run"
    with start_training(2, folder, *LONG, "data.workers=1") as running:
        wait_for_step(running, folder, 1)
        worker = worker_of(running.processes[1].pid)
        os.kill(worker, signal.SIGKILL)
        outputs = running.wait(PATIENCE, grace=60)
    assert outputs[1].returncode == 1 and outputs[0].returncode != 0
    message = outputs[1].stderr  # the console; its log has it too
    ended = "(is killed by signal: Killed|exited unexpectedly)"  # whichever torch notices first
    assert re.search(rf"rank 1 on {os.uname().nodename}: data-loader worker {worker} {ended}", message)
    assert "start again to continue from the last checkpoint" in message
    assert message.strip() in (folder / "logs/rank_00001.log").read_text()


@pytest.mark.slow  # waits for the limit; tests/test_watchdog.py has shorter ones
def test_a_rank_that_stops_answering_is_named_within_the_limit(tmp_path):
    folder, limit = tmp_path / "run", 25
    with start_training(2, folder, *LONG, f"distributed.timeout_seconds={limit}") as running:
        wait_for_step(running, folder, 1)
        running.signal(1, signal.SIGSTOP)
        seconds, output = ended(running, 0)
    assert output.returncode == 75
    assert f"rank 1 on {os.uname().nodename}" in output.stderr and "has not answered for 25 s" in output.stderr
    assert seconds < 3 * limit  # the limit, and a busy machine


def test_a_rank_0_that_stops_is_named_on_the_console(tmp_path):
    """It serves the store and has the console; the others end without it."""
    folder, limit = tmp_path / "run", 6
    with start_training(2, folder, *LONG, f"distributed.timeout_seconds={limit}") as running:
        wait_for_step(running, folder, 1)
        running.signal(0, signal.SIGSTOP)
        _, output = ended(running, 1)
        running.signal(0, signal.SIGKILL)
    assert output.returncode == 75
    host = os.uname().nodename
    assert f"rank 1 on {host} ends the run: rank 0 on 127.0.0.1 has not answered for 6 s" in output.stderr


def test_a_killed_rank_is_named_by_the_survivor(tmp_path):
    folder = tmp_path / "run"
    with start_training(2, folder, *LONG) as running:
        wait_for_step(running, folder, 1)
        pid = running.processes[1].pid
        running.signal(1, signal.SIGKILL)
        _, output = ended(running, 0)
    assert output.returncode == 1
    assert f"rank 1 on {os.uname().nodename} (pid {pid}) is gone, last heard of in " in output.stderr
    assert "start again to continue from the last checkpoint" in output.stderr


def test_a_rank_out_of_memory_is_named_with_the_forward_that_would_fit(tmp_path):
    folder = tmp_path / "run"
    outputs = train_script("train_short_of_memory.py", 2, folder, "batch.global_size=1024", "batch.micro_size=512")
    assert outputs[1].returncode == 1 and outputs[0].returncode != 0
    line = outputs[1].stderr.strip().splitlines()[-1]
    assert line.startswith(f"rank 1 on {os.uname().nodename}: out of memory with batch.micro_size=512; ")
    assert "batch.micro_size=256 needs about half" in line
    assert metrics(folder) == []
