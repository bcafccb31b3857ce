"""The losses are the same for every placement of the reference: replica, sharded, cached, streamed."""

import dataclasses
import json
import math
import re
import shutil
import signal
import time
from pathlib import Path

import pytest

from cca_ds.checkpoints.store import complete_checkpoints, verify
from cca_ds.reference.cache import ReferenceCache
from tests.dist.runs import (
    PATIENCE,
    assert_same_trajectory,
    losses,
    metrics,
    of_loss,
    scratch,
    start_training,
    train,
    wait_until,
)

pytestmark = pytest.mark.dist

STEPS = 8
SETTINGS = (f"batch.max_steps={STEPS}", "batch.micro_size=8", "optimizer.learning_rate=1e-3",
            "reference.shard_steps=2", "checkpoint.every_steps=2")  # fmt: skip


def usual_losses(*settings: str, name: str = "usual") -> list[float]:
    """Of a run whose reference is a replica on its only rank; made once."""
    folder = scratch() / f"reference_{name}"
    if not folder.is_dir():
        train(1, folder, *SETTINGS, *settings)
    return losses(folder)


def stored() -> Path:
    """A cache of the run, made once by two ranks."""
    folder = scratch() / "cache"
    if not folder.is_dir():
        train(2, None, *SETTINGS, f"reference.cache={folder}", flags=["--cache_reference"])
        assert sorted(path.name for path in folder.glob("shard_*")) == [
            f"shard_{i:06d}.arrow" for i in range(STEPS // 2)
        ]
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        ("reference.placement=zero3",),
        pytest.param(("reference.placement=zero3", "reference.offload=true"), marks=pytest.mark.slow),
    ],
    ids=lambda settings: " ".join(settings),
)
def test_placements_beside_the_policy(settings, tmp_path):
    train(2, tmp_path / "run", *SETTINGS, *settings, "baseline.check=true", "baseline.nll_band=null")
    assert_same_trajectory(losses(tmp_path / "run"), usual_losses())


def test_stored_log_likelihoods_serve_runs_of_another_beta_lambda_loss_and_rate(tmp_path):
    use = ("reference.placement=cached", f"reference.cache={stored()}")
    train(2, tmp_path / "same", *SETTINGS, *use)
    assert_same_trajectory(losses(tmp_path / "same"), usual_losses())
    other = ("loss.beta=0.1", "loss.lambda=30", "optimizer.learning_rate=5e-4", "loss.name=unlearning")
    train(1, tmp_path / "other", *SETTINGS, *use, *other)
    assert_same_trajectory(losses(tmp_path / "other"), usual_losses(*other, name="other"))


@pytest.mark.parametrize("loss", ["ddo", "ddo online"])
def test_generated_images_with_stored_log_likelihoods(loss, tmp_path):
    """A fixed table serves `cached` as CCA's labels do; online, producers draw the images beside the trainers."""
    cache, settings = tmp_path / "cache", (*SETTINGS, *of_loss(loss))
    placement = "cached" if loss == "ddo" else "streamed"
    use = (*settings, f"reference.placement={placement}", f"reference.cache={cache}", "reference.batch_size=12")
    if loss == "ddo":
        train(2, None, *use, flags=["--cache_reference"])
        train(2, tmp_path / "run", *use)
    else:
        with (
            start_training(1, tmp_path / "run", *use) as trainer,
            start_training(2, None, *use, flags=["--produce_reference"]) as producers,
        ):
            outputs = trainer.wait(PATIENCE) + producers.wait(PATIENCE)
        assert [output.returncode for output in outputs] == [0, 0, 0], outputs
        last = metrics(tmp_path / "run")[-1]
        assert last["reference/steps_ahead"] >= 0 and last["reference/age_seconds"] > 0
        assert last["reference/wait_seconds"] >= 0
    assert_same_trajectory(losses(tmp_path / "run"), usual_losses(*of_loss(loss), name=loss.replace(" ", "_")))


def test_a_cache_of_another_run_is_refused_with_what_differs(tmp_path):
    use = ("reference.placement=cached", f"reference.cache={stored()}")
    before = sorted(stored().rglob("*"))
    (output,) = train(1, tmp_path / "run", *SETTINGS, *use, "seed=1", "batch.global_size=16", check=False)
    assert output.returncode == 2 and not (tmp_path / "run").exists()
    line = output.stderr.strip().splitlines()[-1]
    assert "belongs to another run: seed (0 there), global_size (32 there) differ" in line
    assert sorted(stored().rglob("*")) == before


def test_an_incomplete_cache_is_an_error_where_nobody_fills_it(tmp_path):
    shutil.copytree(stored(), tmp_path / "cache")
    (tmp_path / "cache/shard_000001.arrow").unlink()
    use = ("reference.placement=cached", f"reference.cache={tmp_path / 'cache'}")
    (output,) = train(1, tmp_path / "run", *SETTINGS, *use, check=False)
    assert output.returncode == 2
    assert "holds the first 2 of the run's 8 steps (1 of 4 files are missing or too short)" in output.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", [math.nan, 0.0])
def test_one_wrong_number_of_the_reference_ends_the_run_on_all_ranks(value, tmp_path, monkeypatch):
    shutil.copytree(stored(), tmp_path / "cache")
    cache = ReferenceCache(tmp_path / "cache", json.loads((tmp_path / "cache/key.json").read_text()))
    shard = cache.read(0)
    positive = shard.positive.copy()
    positive[31] = value  # the last pair of the first step: the second rank's
    cache.path(0).unlink()
    with monkeypatch.context() as patch:  # a NaN as an older version wrote it
        patch.setattr("cca_ds.reference.cache._not_finite", lambda content: None)
        cache.write(0, dataclasses.replace(shard, positive=positive))
    use = ("reference.placement=cached", f"reference.cache={cache.folder}", "baseline.check=true")
    outputs = train(2, tmp_path / "run", *SETTINGS, *use, "baseline.nll_band=null", check=False)
    assert [output.returncode for output in outputs] == [2, 2]
    wrong = r"differ by up to \S+ nats an image .* delete its cache" if value == 0 else r"sample \d+ is nan\): --cache"
    assert re.search(wrong, outputs[0].stderr)
    assert not (tmp_path / "run").exists()


def streaming(cache: Path, *more: str) -> tuple[str, ...]:
    return (*SETTINGS, "reference.placement=streamed", f"reference.cache={cache}", "reference.ahead_steps=2", *more)


def shards(cache: Path) -> int:
    return len(list(cache.glob("shard_*.arrow")))


def test_streamed_while_either_side_is_killed_and_comes_back(tmp_path):
    """Producers alone stop at their bound; trainers killed, producers killed, both back: the usual trajectory."""
    cache, folder = tmp_path / "cache", tmp_path / "run"
    settings = streaming(cache, "reference.wait_seconds=200")
    with start_training(2, None, *settings, flags=["--produce_reference"]) as producers:
        wait_until(lambda: shards(cache) == 2, producers)  # steps 0 to 3: at most two ahead of step 0
        time.sleep(3.0)
        assert shards(cache) == 2
        with start_training(1, folder, *settings) as trainer:
            wait_until(lambda: len(metrics(folder)) >= 1, trainer)
            trainer.signal(0, signal.SIGKILL)
            trainer.wait(PATIENCE)
        done = len(metrics(folder))
        producers.signal(0, signal.SIGKILL)
        producers.signal(1, signal.SIGKILL)
    bound = json.loads((cache / "trainer.json").read_text())["step"] + 2
    assert done < STEPS and shards(cache) * 2 <= bound + 2
    with (
        start_training(1, folder, *settings) as trainer,
        start_training(2, None, *settings, flags=["--produce_reference"]) as producers,
    ):
        outputs = trainer.wait(PATIENCE) + producers.wait(PATIENCE)
    assert [output.returncode for output in outputs] == [0, 0, 0], outputs
    assert_same_trajectory(losses(folder), usual_losses())
    assert (cache / "COMPLETED").is_file()


def only_first_shards(cache: Path, count: int) -> Path:
    """A cache whose producers are gone after `count` shards."""
    shutil.copytree(stored(), cache)
    for path in sorted(cache.glob("shard_*.arrow"))[count:]:
        path.unlink()
    (cache / "COMPLETED").unlink()
    return cache


def stop_while_waiting(folder: Path, settings: tuple[str, ...], done: int, rank: int, number: int) -> str:
    """Two ranks that wait for the shard after `done` steps; a signal to one ends both soon. Rank 0's console."""
    note = Path(next(s for s in settings if s.startswith("reference.cache="))[16:]) / "trainer.json"
    note.unlink(missing_ok=True)
    with start_training(2, folder, *settings) as running:
        wait_until(lambda: note.is_file() and json.loads(note.read_text())["step"] == done, running)
        time.sleep(1.0)
        started = time.monotonic()
        running.signal(rank, number)
        outputs = running.wait(60)
    assert time.monotonic() - started < 10  # below one on an idle machine; `wait_seconds` is 600
    assert [output.returncode for output in outputs] == [0, 0], outputs
    assert len(losses(folder)) == done
    assert not (folder / "COMPLETED").exists() and not (folder / "summary.json").exists()
    return outputs[0].stderr


def bring(shards_of: Path, cache: Path) -> None:
    for path in shards_of.glob("shard_*.arrow"):
        shutil.copy(path, cache)


@pytest.mark.parametrize(
    ("number", "stopped", "settings"),
    [
        (signal.SIGUSR1, (1, 0), ("checkpoint.every_steps=1000",)),
        (signal.SIGTERM, (0,), ("checkpoint.asynchronous=true",)),  # the checkpoint of step 2 is there before
    ],
    ids=["saved now, then stopped again", "saved before"],
)
def test_a_signal_ends_the_wait_for_a_shard_with_the_last_steps_checkpoint(number, stopped, settings, tmp_path):
    """Nobody produces, so two ranks wait after step 2; later they go on as if nothing had been."""
    cache, folder = only_first_shards(tmp_path / "cache", 1), tmp_path / "run"
    settings = streaming(cache, *settings)
    written = []
    for rank in stopped:
        message = stop_while_waiting(folder, settings, 2, rank, number)
        assert "stopped by a signal after step 2: checkpoint saved, start again to continue" in message
        (saved,) = complete_checkpoints(folder / "checkpoints")
        assert verify(saved).step == 2
        written.append({path: path.stat().st_mtime_ns for path in saved.rglob("*")})
    assert all(times == written[0] for times in written)  # nothing more, where no step came between
    bring(stored(), cache)
    train(2, folder, *settings)
    assert_same_trajectory(losses(folder), usual_losses())


@pytest.mark.parametrize("check", ["true", "false"], ids=["in the baseline", "in the first step"])
def test_a_signal_before_the_first_shard_leaves_a_run_that_starts_again(check, tmp_path):
    cache, folder = only_first_shards(tmp_path / "cache", 0), tmp_path / "run"
    settings = streaming(cache, f"baseline.check={check}", "baseline.nll_band=null")
    message = stop_while_waiting(folder, settings, 0, 1, signal.SIGTERM)
    assert "stopped by a signal before the first step was done: start again to begin" in message
    assert not complete_checkpoints(folder / "checkpoints")
    bring(stored(), cache)
    train(2, folder, *settings)
    assert_same_trajectory(losses(folder), usual_losses())


def test_a_trainer_whose_producers_are_dead_names_them_within_the_limit(tmp_path):
    cache = only_first_shards(tmp_path / "cache", 1)
    started = time.monotonic()
    (output,) = train(1, tmp_path / "run", *streaming(cache, "reference.wait_seconds=4"), check=False)
    assert output.returncode == 1 and time.monotonic() - started < PATIENCE
    (line,) = [line for line in output.stderr.splitlines() if "step 3 needs" in line]
    assert "which is missing after 4 s: producer 0 on " in line and "producer 1 on " in line and "last report " in line
