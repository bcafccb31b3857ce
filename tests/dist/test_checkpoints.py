"""Killed, moved to another number of ranks, on a full disk: a run continues from its checkpoint.

Another ZeRO stage is refused.
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from cca_ds import export
from cca_ds import train as entry
from cca_ds.checkpoints.deepspeed_state import consolidated_weights, load_own
from cca_ds.checkpoints.store import bytes_per_weight, complete_checkpoints, newest_verified, read_manifest, verify
from cca_ds.data.codes import CodeTable
from cca_ds.data.generated import PLAIN as PLAIN_DRAWING
from cca_ds.models import create_model
from cca_ds.sampling.code_table import draw_code_table
from tests.dist.fork_server import ForkedRanks
from tests.dist.runs import (
    PATIENCE,
    REPOSITORY,
    assert_same_trajectory,
    command,
    generated_table,
    losses,
    metrics,
    of_loss,
    plain_ddp,
    scratch,
    start_training,
    train,
)
from tests.support.digits_table import digits_table
from tests.support.refusals import called
from tests.support.small_disk import mounted_disk

pytestmark = pytest.mark.dist

STEPS = 6
AHEAD = 8  # steps a start may get on before it is killed
# dropout on, a moving average, two forwards a step, checkpoints after 2, 4 and 6 by a thread
SETTINGS = (f"batch.max_steps={STEPS}", "batch.micro_size=8", "model.dropout=true", "model.ema_decay=0.75",
            "checkpoint.every_steps=2", "checkpoint.keep_last=3", "checkpoint.asynchronous=true",
            "optimizer.learning_rate=1e-3", "schedule.name=cosine")  # fmt: skip
# nothing drawn by a rank: the same on any number of them
PLAIN = (*SETTINGS, "model.dropout=false", "batch.micro_size=32", "checkpoint.asynchronous=false")


def whole_run(name: str, ranks: int, settings: tuple[str, ...], ds: Path | None = None) -> Path:
    """A run to its end, made once."""
    folder = scratch() / name
    if not folder.is_dir():
        train(ranks, folder, *settings, ds=ds)
    return folder


def cut_short(run: Path, folder: Path, step: int) -> Path:
    """A copy of a run as if it had been killed after it had saved `step`."""
    shutil.copytree(run, folder)
    for path in complete_checkpoints(folder / "checkpoints"):
        if int(path.name.removeprefix("step_")) > step:
            shutil.rmtree(path)
    (folder / "COMPLETED").unlink()
    return folder


def states(folder: Path) -> dict[str, object]:
    """All that the newest checkpoint holds, by file."""
    found, manifest = newest_verified(folder / "checkpoints", report=pytest.fail)
    own = {name: load_own((found / name).with_suffix("")) for name in manifest.files if name.endswith(".safetensors")}
    return own | {name: torch.load(found / name, weights_only=False) for name in manifest.files if name.endswith(".pt")}


def assert_equal_trees(one, other, where=""):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal_trees(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_equal_trees(a, b, f"{where}/{i}")
    elif isinstance(one, str | int | float | bool | None):
        assert one == other, where


def average(folder: Path) -> dict[str, torch.Tensor]:
    found, manifest = newest_verified(folder / "checkpoints", report=pytest.fail)
    names = sorted(name for name in manifest.files if name.startswith("average_rank_"))
    shards = [load_own((found / name).with_suffix("")) for name in names]
    return {key: torch.cat([shard[key] for shard in shards]) for key in shards[0]}


@pytest.mark.parametrize("loss", ["cca", "gft", "ddo online"])
def test_the_same_ranks_continue_bit_for_bit(loss, tmp_path):
    settings = (*SETTINGS, *of_loss(loss))
    whole = whole_run(f"dropout_{loss}", 2, settings)
    folder = cut_short(whole, tmp_path / "run", 4)
    train(2, folder, *settings)
    assert losses(folder) == losses(whole)
    assert_equal_trees(states(folder), states(whole))
    assert (folder / "COMPLETED").is_file()


@pytest.mark.parametrize(
    ("before", "after", "loss"),
    [
        ((1, 3), (2, 3), "cca"),
        ((2, 3), (1, 3), "cca"),
        ((2, 2), (1, 2), "cca"),
        pytest.param((1, 2), (2, 2), "cca", marks=pytest.mark.slow),
        pytest.param((2, 0), (1, 0), "cca", marks=pytest.mark.slow),
        ((2, 3), (1, 3), "gft"),
        pytest.param((1, 2), (2, 2), "gft", marks=pytest.mark.slow),
        ((1, 3), (2, 3), "ddo"),
        pytest.param((2, 3), (1, 3), "ddo online", marks=pytest.mark.slow),
    ],
    ids=lambda place: place if isinstance(place, str) else f"{place[0]} ranks stage {place[1]}",
)
def test_another_number_of_ranks_continues_the_trajectory(before, after, loss, tmp_path):
    files = {3: None, 2: REPOSITORY / "ds_configs/zero2.json", 0: plain_ddp()}
    settings = (*PLAIN, *of_loss(loss))
    name = f"plain_{before[0]}" + f"_stage_{before[1]}" * (before[1] != 3) + f"_{loss}" * (loss != "cca")
    whole = whole_run(name, before[0], settings, files[before[1]])
    folder = cut_short(whole, tmp_path / "run", 2)
    train(after[0], folder, *settings, ds=files[after[1]])
    assert_same_trajectory(losses(folder), losses(whole))
    assert metrics(folder)[1] == metrics(whole)[1] and metrics(folder)[2] != metrics(whole)[2]  # 3 on are new
    found, expected = average(folder), average(whole)
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-6)
    assert not list((folder / "checkpoints").glob("*.universal*"))  # gone once newer ones were saved


def test_another_stage_is_refused_with_the_remedy(tmp_path):
    folder = cut_short(whole_run("plain_2", 2, PLAIN), tmp_path / "run", 2)
    (output,) = train(1, folder, *PLAIN, ds=REPOSITORY / "ds_configs/zero2.json", check=False)
    assert output.returncode == 2 and "Traceback" not in output.stderr
    assert "was written with zero_optimization.stage=3, this run has 2; set zero_optimization.stage=3" in output.stderr
    assert complete_checkpoints(folder / "checkpoints")[0].name == "step_00000002"


def test_a_run_on_tables_of_real_and_of_drawn_images_continues(tmp_path):
    """And no other table in their place."""
    drawn = Path(shutil.copytree(generated_table(), tmp_path / "drawn"))
    settings = (*PLAIN, "loss.name=ddo", f"data.generated={drawn}", f"data.codes={digits_table(tmp_path / 'd').folder}")
    train(1, tmp_path / "whole", *settings)
    folder = cut_short(tmp_path / "whole", tmp_path / "run", 2)
    train(1, folder, *settings)
    assert losses(folder) == losses(tmp_path / "whole") and len(losses(folder)) == STEPS
    folder = cut_short(tmp_path / "whole", tmp_path / "other", 2)
    torch.manual_seed(1)
    about = {
        **PLAIN_DRAWING,
        "tokenizer_hash": "",
        "weights_sha256": CodeTable.open(drawn).manifest.drawn["weights_sha256"],
    }
    shutil.rmtree(drawn)
    draw_code_table(drawn, create_model("digits").eval(), "digits", range(200), {"seed": 6}, 100, about)
    (output,) = train(1, folder, *settings, check=False)
    assert output.returncode == 2 and "was trained on other data" in output.stderr


def test_a_run_that_leaves_its_accuracy_band_is_finished_there(tmp_path):
    """After a restart from its middle and with fewer lines of metrics at the same step."""
    settings = (*of_loss("ddo"), "batch.max_steps=60", "loss.accuracy_band=[0.45, 0.6]", "optimizer.learning_rate=1e-4",
                "checkpoint.every_steps=8")  # fmt: skip
    outputs = train(2, tmp_path / "run", *settings)
    lines = metrics(tmp_path / "run")
    averages = [line["rewards/accuracies_average"] for line in lines]
    end = len(lines)
    assert STEPS < end < 60 and averages[-1] > 0.6 >= max(averages[:-1])
    assert f"the run ends after step {end}: rewards/accuracies_average is" in outputs[0].stdout + outputs[0].stderr
    assert complete_checkpoints(tmp_path / "run/checkpoints")[0].name == f"step_{end:08d}"
    assert json.loads((tmp_path / "run/summary.json").read_text())["steps"] == end
    (again,) = train(1, tmp_path / "run", *settings)
    assert "this run is finished" in again.stdout
    (tmp_path / "run/COMPLETED").unlink()  # as if it had been killed before
    (again,) = train(1, tmp_path / "run", *settings)
    assert f"the run ends after step {end}" in again.stdout + again.stderr
    assert (tmp_path / "run/COMPLETED").is_file() and len(losses(tmp_path / "run")) == end
    middle = complete_checkpoints(tmp_path / "run/checkpoints")[1]
    folder = cut_short(tmp_path / "run", tmp_path / "again", int(middle.name.removeprefix("step_")))
    train(2, folder, *settings, "logging.every_steps=7")
    assert json.loads((folder / "summary.json").read_text())["steps"] == end


def test_a_run_killed_before_its_mark_of_completion_finishes_when_started_again(tmp_path):
    folder = tmp_path / "run"
    python, _, *arguments = command(folder, *PLAIN)
    script = [python, str(REPOSITORY / "tests/dist/train_killed_at_finish.py"), *arguments]
    with ForkedRanks(script, 1, None, None) as running:
        (output,) = running.wait(PATIENCE)
    assert output.returncode == -signal.SIGKILL
    assert complete_checkpoints(folder / "checkpoints")[0].name == f"step_{STEPS:08d}"
    assert not (folder / "COMPLETED").exists()
    train(1, folder, *PLAIN)
    assert (folder / "COMPLETED").is_file() and len(losses(folder)) == STEPS
    summary, last = json.loads((folder / "summary.json").read_text()), metrics(folder)[-1]
    assert summary["steps"] == STEPS and summary["final"]["loss"] == last["loss"]
    weights = tmp_path / "policy.safetensors"
    assert export.main(["--run", str(folder), "--output", str(weights)]) == 0 and weights.is_file()


def test_corrupted_newest_falls_back_to_the_older(tmp_path):
    whole = whole_run("plain_2", 2, PLAIN)
    folder = cut_short(whole, tmp_path / "run", 4)
    damaged = max((folder / "checkpoints/step_00000004/deepspeed").iterdir(), key=lambda path: path.stat().st_size)
    with open(damaged, "r+b") as file:
        file.seek(damaged.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    outputs = train(2, folder, *PLAIN)
    assert f"{damaged.name} is corrupt" in outputs[0].stdout + outputs[0].stderr
    assert "continuing after step 2" in outputs[0].stderr
    assert losses(folder) == losses(whole)
    assert verify(folder / "checkpoints/step_00000004")


def test_weights_come_out_of_checkpoints_written_in_the_background(tmp_path):
    """Bit for bit those of checkpoints that training waited for."""
    found = []
    for asynchronous in ("true", "false"):
        folder = tmp_path / asynchronous
        train(2, folder, *PLAIN, f"checkpoint.asynchronous={asynchronous}")
        found.append(consolidated_weights(complete_checkpoints(folder / "checkpoints")[0]))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_resume_takes_a_path_and_refuses_what_it_cannot_continue(tmp_path):
    whole = whole_run("plain_2", 2, PLAIN)
    start = whole / "checkpoints/step_00000004"
    train(1, tmp_path / "branch", *PLAIN, flags=["--resume", str(start)])
    assert_same_trajectory([line["loss"] for line in metrics(tmp_path / "branch")], losses(whole)[4:])

    folder = cut_short(whole, tmp_path / "run", 4)
    back = folder / "checkpoints/step_00000002"
    (output,) = train(1, folder, *PLAIN, flags=["--resume", str(back)], check=False)
    assert output.returncode == 2
    assert "step_00000004 is newer" in output.stderr and output.stderr.count("\n") == 1
    (output,) = train(1, tmp_path / "new", *PLAIN, flags=["--resume", str(whole)], check=False)
    assert output.returncode == 2 and "COMPLETE.json is missing" in output.stderr
    assert not (tmp_path / "new").exists()


def kill_one(folder: Path, draw: random.Random, *settings: str, ranks: int = 2) -> list[int]:
    """Start, SIGKILL a random rank at a random moment a few steps on, wait for the others.

    Steps that were complete before.
    """
    before = [int(path.name[5:]) for path in complete_checkpoints(folder / "checkpoints")]
    with start_training(ranks, folder, *settings) as running:
        goal = max(before, default=0) + draw.randint(0, AHEAD)
        began, end = time.time(), time.monotonic() + PATIENCE
        # lines of its own: the killed start before it may have logged more steps than it saved
        while time.monotonic() < end and not any(
            line["step"] > goal and line["time"] > began for line in metrics_so_far(folder)
        ):
            assert any(process.poll() is None for process in running.processes), running.tails()
            time.sleep(0.01)
        time.sleep(draw.uniform(0.0, 0.2))  # inside a step, a save or the pruning after it
        acknowledged = [int(path.name[5:]) for path in complete_checkpoints(folder / "checkpoints")]
        running.signal(draw.randrange(ranks), signal.SIGKILL)
        running.wait(PATIENCE, grace=60)
    return acknowledged


def metrics_so_far(folder: Path) -> list[dict]:
    """The log may end in a torn line."""
    try:
        return metrics(folder)
    except ValueError:
        return []


def killed_again_and_again(folder: Path, kills: int, seed: int) -> None:
    length = ("batch.global_size=4", "batch.micro_size=2", f"batch.max_steps={kills * 25}")
    settings = (*length, "checkpoint.every_steps=1", "checkpoint.keep_last=2",
                f"checkpoint.asynchronous={str(bool(seed % 2)).lower()}", "distributed.timeout_seconds=60")  # fmt: skip
    draw = random.Random(seed)
    for _ in range(kills):
        acknowledged = kill_one(folder, draw, *settings)
        found = newest_verified(folder / "checkpoints", report=pytest.fail)
        for path in complete_checkpoints(folder / "checkpoints"):
            verify(path)  # never one that looks complete and is not
        if acknowledged:
            assert found[1].step >= max(acknowledged)
    assert not (folder / "COMPLETED").exists(), "the run ended before the last kill: give it more steps"
    train(2, folder, *settings)
    expected = whole_run(f"undisturbed_{kills}", 2, length)
    assert losses(folder) == losses(expected)


def test_killed_at_random_moments_and_resumed(tmp_path):
    killed_again_and_again(tmp_path / "run", kills=2, seed=1)


@pytest.mark.slow
def test_killed_at_many_random_moments_and_resumed(tmp_path):
    killed_again_and_again(tmp_path / "run", kills=8, seed=2)


@pytest.fixture
def small_disk(tmp_path):
    with mounted_disk(tmp_path, mib=3) as disk:
        yield disk


def fill(disk: Path) -> None:
    """Another program takes what is left."""
    with contextlib.suppress(OSError), open(disk / "other", "wb", buffering=0) as file:
        while file.write(bytes(4096)) == 4096:
            pass


@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_a_full_disk_is_one_clear_error_and_spares_older_checkpoints(small_disk, asynchronous):
    settings = ("batch.max_steps=5000", "checkpoint.every_steps=1", "checkpoint.keep_last=1",
                "logging.tensorboard=false", f"checkpoint.asynchronous={asynchronous}")  # fmt: skip
    with start_training(1, small_disk / "run", *settings) as running:
        end = time.monotonic() + PATIENCE
        while not complete_checkpoints(small_disk / "run/checkpoints"):
            assert time.monotonic() < end, running.tails()
            time.sleep(0.02)
        while running.processes[0].poll() is None:
            assert time.monotonic() < end, running.tails()
            fill(small_disk)  # again: an older checkpoint may have given up its place in between
            time.sleep(0.02)
        (output,) = running.wait(PATIENCE)
    assert output.returncode == 1
    (line,) = [line for line in output.stderr.splitlines() if line.startswith("rank 0 on ")]
    assert "free some" in line
    intact = complete_checkpoints(small_disk / "run/checkpoints")
    assert intact and all(verify(path) for path in intact)
    assert not list((small_disk / "run/checkpoints").glob("*.partial"))
    assert not (small_disk / "run/COMPLETED").exists()


def test_a_checkpoint_is_saved_when_its_minutes_are_over(tmp_path):
    """Between the steps that are due: here after every step, on all ranks at once; the trajectory is the same."""
    settings = ("batch.max_steps=4", "checkpoint.keep_last=9", "checkpoint.every_steps=3")
    train(2, tmp_path / "often", *settings, "checkpoint.every_minutes=1e-5")
    train(2, tmp_path / "usual", *settings)
    steps = [[path.name[-1] for path in complete_checkpoints(tmp_path / name / "checkpoints")]
             for name in ("often", "usual")]  # fmt: skip
    assert steps == [["4", "3", "2", "1"], ["4", "3"]]
    assert losses(tmp_path / "often") == losses(tmp_path / "usual")


def test_a_run_whose_weights_are_not_wanted_saves_none(tmp_path):
    train(1, tmp_path / "run", "batch.max_steps=2", "checkpoint.final=false")
    assert (tmp_path / "run" / "COMPLETED").exists() and not complete_checkpoints(tmp_path / "run/checkpoints")


@pytest.mark.parametrize("ema", ["null", "0.9"])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_room_that_is_asked_for_is_what_a_checkpoint_takes(stage, ema, tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    shape = "model.overrides={dim: 256, n_layer: 2, n_head: 4, multiple_of: 64}"  # weights outweigh the rest
    settings = (
        "batch.max_steps=1",
        "model.weights=null",
        "model.from_scratch=true",
        shape,
        f"model.ema_decay={ema}",
        "baseline.check=false",
    )
    train(1, tmp_path / "run", *settings, ds=tmp_path / "ds.json")
    (folder,) = complete_checkpoints(tmp_path / "run/checkpoints")
    found = sum(file["size"] for file in read_manifest(folder).files.values())
    weights = sum(tensor.numel() for tensor in consolidated_weights(folder).values())
    assert found == pytest.approx(weights * bytes_per_weight(stage, 4, ema != "null"), rel=0.02)


def test_a_disk_too_small_for_the_checkpoints_is_refused_before_the_first_step(small_disk):
    outputs = train(2, small_disk / "run", *SETTINGS, "checkpoint.keep_last=30", "batch.max_steps=90", check=False)
    assert [output.returncode for output in outputs] == [1, 1]
    assert re.search(r"29 checkpoint\(s\) of about \S+ GB take \S+ GB, and only \S+ GB are free", outputs[0].stderr)
    assert "lower checkpoint.keep_last, or put --output on another disk" in outputs[0].stderr
    assert metrics(small_disk / "run") == []
    words = command(small_disk / "run", *SETTINGS, "checkpoint.keep_last=30", "batch.max_steps=90", flags=["--dry_run"])
    code, _, refused = called(entry.main, words[next(i for i, word in enumerate(words) if word.endswith(".py")) + 1 :])
    assert code == 2 and re.search(r"29 checkpoint\(s\) of about \S+ GB take \S+ GB", refused)
