"""A run's folder and data: one writer, nothing deleted that could not be read, nothing changed unnoticed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cca_ds.checkpoints import store
from cca_ds.checkpoints.store import complete_checkpoints
from cca_ds.data.codes import CodeTable
from cca_ds.data.table_files import write_codes
from cca_ds.folder_lock import NAME
from tests.dist.ranks import REPOSITORY
from tests.dist.runs import command, losses, metrics, scratch, start_training, tiny_weights, train, wait_until

pytestmark = pytest.mark.dist

SETTINGS = ("batch.max_steps=4", "checkpoint.every_steps=2", "checkpoint.keep_last=9")
LONG = ("batch.global_size=4", "batch.micro_size=4", "batch.max_steps=20000", "batch.epochs=99")


def whole_run() -> Path:
    folder = scratch() / "folders"
    if not folder.is_dir():
        train(1, folder, *SETTINGS)
    return folder


def cut_short(tmp_path: Path, step: int = 2) -> Path:
    """The run as a kill after `step` left it."""
    folder = tmp_path / "run"
    shutil.copytree(whole_run(), folder)
    (folder / "COMPLETED").unlink()
    for checkpoint in complete_checkpoints(folder / "checkpoints"):
        if int(checkpoint.name[5:]) > step:
            shutil.rmtree(checkpoint)
    return folder


def refused(*arguments, flags=(), code=2) -> str:
    """The one line of a run of one rank that fails."""
    (output,) = train(1, *arguments, flags=flags, check=False)
    assert output.returncode == code, output
    lines = [line for line in output.stderr.splitlines() if line.startswith(("rank 0", "config error", "train:"))]
    assert len(lines) == 1 and "Traceback" not in output.stderr, output.stderr
    return lines[0]


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ---- one writer


def test_the_second_start_is_refused_and_the_first_goes_on(tmp_path):
    folder = tmp_path / "run"
    with start_training(1, folder, *LONG) as running:
        wait_until(lambda: len(metrics(folder)) > 3, running)
        line = refused(folder, *LONG)
        assert f"process {running.processes[0].pid} on " in line and "is writing there" in line
        before = len(metrics(folder))
        wait_until(lambda: len(metrics(folder)) > before, running)
        running.kill()
    losses(folder)  # every step once and in order


def test_a_folder_deleted_while_training_is_a_failure(tmp_path):
    folder = tmp_path / "run"
    with start_training(1, folder, *LONG, "checkpoint.every_steps=5") as running:
        wait_until(lambda: len(metrics(folder)) > 3, running)
        while folder.exists():  # the run may write one more file into it meanwhile
            shutil.rmtree(folder, ignore_errors=True)
        (output,) = running.wait(60)
    assert output.returncode == 1 and "was deleted while the run was writing there" in output.stderr, output.stderr
    assert not (folder / "COMPLETED").exists() and not list(folder.glob("checkpoints/step_*"))


def test_a_log_deleted_while_training_is_a_failure(tmp_path):
    folder = tmp_path / "run"
    with start_training(1, folder, *LONG[:2], "batch.max_steps=60") as running:
        wait_until(lambda: (folder / "metrics.jsonl").is_file(), running)
        (folder / "metrics.jsonl").unlink()
        (output,) = running.wait(60)
    assert output.returncode == 1 and "metrics.jsonl was deleted or replaced" in output.stderr, output.stderr
    assert not (folder / "COMPLETED").exists()


def test_a_checkpoint_of_another_run_is_continued_on_more_ranks_and_its_folder_left_alone(tmp_path):
    folder = cut_short(tmp_path)
    before = content(folder)
    start = folder / "checkpoints/step_00000002"
    outputs = train(2, tmp_path / "branch", *SETTINGS, flags=["--resume", str(start)])
    assert "continuing after step 2" in outputs[0].stderr and content(folder) == before
    assert not list((tmp_path / "branch/checkpoints").glob("*.universal*"))


def test_a_run_that_was_taken_over_ends_and_publishes_nothing_more(tmp_path):
    folder = tmp_path / "run"
    with start_training(1, folder, *LONG, "checkpoint.every_steps=50") as running:
        wait_until(lambda: len(metrics(folder)) > 3, running)
        holder = json.loads((folder / NAME).read_text()) | {"token": "later", "host": "node9", "job": "77"}
        (folder / f"{NAME}.new").write_text(json.dumps(holder))
        os.replace(folder / f"{NAME}.new", folder / NAME)
        before = complete_checkpoints(folder / "checkpoints")
        (output,) = running.wait(60)
    assert output.returncode == 1 and "on node9, job 77, started" in output.stderr, output.stderr
    assert complete_checkpoints(folder / "checkpoints")[1:] in (before, before[1:])  # one may have been under way
    assert json.loads((folder / NAME).read_text())["host"] == "node9"


def test_a_start_that_fails_leaves_no_lock(tmp_path):
    assert "no-such-table" in refused(tmp_path / "run", f"data.codes={tmp_path}/no-such-table")
    assert not (tmp_path / "run").exists()
    folder = cut_short(tmp_path)
    (next((folder / "data").rglob("*.arrow"))).unlink()
    (next((folder / "data").rglob("verified.json"))).unlink(missing_ok=True)
    refused(folder, *SETTINGS)
    assert not (folder / NAME).exists()


# ---- checkpoints


@pytest.mark.parametrize(
    "where", ["", "checkpoints", "checkpoints/step_00000002", "checkpoints/step_00000002/deepspeed"]
)
@pytest.mark.parametrize("name", [".DS_Store", "zero_pp_rank_7_mp_rank_00_optim_states.pt", "._COMPLETE.json"])
def test_foreign_files_do_not_matter(tmp_path, where, name):
    folder = cut_short(tmp_path)
    (folder / where / name).write_bytes(b"\0\0\0\1Bud1")
    (output,) = train(1, folder, *SETTINGS)
    assert "continuing after step 2" in output.stderr
    assert losses(folder) == losses(whole_run())
    assert (folder / where / name).exists()


def test_own_state_that_is_not_listed_is_not_read(tmp_path):
    """As an older version's file, left beside by a careless copy."""
    folder = cut_short(tmp_path)
    torch.save({"torch": torch.get_rng_state()}, folder / "checkpoints/step_00000002/random_rank_00000.pt")
    train(1, folder, *SETTINGS)
    assert losses(folder) == losses(whole_run())


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing", "manifest"])
def test_where_every_checkpoint_is_damaged_nothing_is_begun(tmp_path, damage):
    folder = cut_short(tmp_path)
    (checkpoint,) = complete_checkpoints(folder / "checkpoints")
    victim = checkpoint / "COMPLETE.json" if damage == "manifest" else next(checkpoint.rglob("*_optim_states.pt"))
    data = victim.read_bytes()
    if damage == "missing":
        victim.unlink()
    else:
        victim.write_bytes(data[:-9] if damage == "truncated" else data[:50] + bytes([data[50] ^ 4]) + data[51:])
    kept = content(folder / "checkpoints")
    line = refused(folder, *SETTINGS)
    assert "no checkpoint is intact" in line and "step_00000002" in line and "another --output" in line
    assert content(folder / "checkpoints") == kept
    assert len(metrics(folder)) == 4  # not cut back


# ---- resuming with other settings


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("seed=5", "seed=0, not 5"),
        ("loss.name=dpo", "loss.name=cca, not dpo"),
        ("loss.beta=0.25", "loss.beta=0.5, not 0.25"),
        ("optimizer.learning_rate=2e-4", "optimizer.learning_rate=0.0001, not 0.0002"),
        ("batch.global_size=64", "batch.global_size=32, not 64"),
        ("model.overrides={n_layer: 1, n_head: 2, dim: 32, multiple_of: 16}", "model.overrides="),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path, setting, said):
    folder = cut_short(tmp_path)
    before = content(folder)
    assert said in refused(folder, *SETTINGS, setting)
    start = folder / "checkpoints/step_00000002"
    assert said in refused(tmp_path / "branch", *SETTINGS, setting, flags=["--resume", str(start)])
    assert content(folder) == before and not (tmp_path / "branch").exists()


def test_habits_may_change(tmp_path):
    habits = ("logging.every_steps=1", "checkpoint.every_steps=1", "batch.micro_size=8", "reference.placement=zero3",
              "name=other", "data.prefetch=2")  # fmt: skip
    folder = cut_short(tmp_path)
    (output,) = train(1, folder, *SETTINGS, *habits)
    assert "continuing after step 2" in output.stderr and len(losses(folder)) == 4


def other_table(folder: Path) -> Path:
    """160 other images with the codes' shape of the digits."""
    draw = np.random.default_rng(1)
    codes_NCL = draw.integers(0, 17, (160, 1, 64)).astype(np.uint16)
    write_codes(folder, codes_NCL, np.arange(160, dtype=np.int32) % 10, vocab_size=17, family="llamagen",
                tokenizer="digits", tokenizer_hash="", classes=10)  # fmt: skip
    return folder


def test_other_data_is_refused(tmp_path):
    folder = cut_short(tmp_path)
    line = refused(folder, *SETTINGS, f"data.codes={other_table(tmp_path / 'other')}")
    assert "its run was trained on other data than data.codes=" in line
    line = refused(whole_run(), *SETTINGS, f"data.codes={tmp_path / 'other'}")  # a finished run
    assert "its run was trained on other data than data.codes=" in line
    start = folder / "checkpoints/step_00000002"
    line = refused(tmp_path / "branch", *SETTINGS, f"data.codes={tmp_path / 'other'}", flags=["--resume", str(start)])
    assert "was trained on other data" in line and not (tmp_path / "branch").exists()


@pytest.mark.parametrize("how", ["auto", "path"])
def test_other_weights_under_the_same_name_are_refused(tmp_path, how):
    """The policy would go on from its checkpoint, and be compared with another reference."""
    weights, folder = tmp_path / "w.safetensors", tmp_path / "run"
    shutil.copy(tiny_weights(), weights)
    named = (*SETTINGS, f"model.weights={weights}")
    train(1, folder, *named, "batch.max_steps=2")
    (folder / "COMPLETED").unlink()
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("max_steps: 2", "max_steps: 4"))
    checkpoint = folder / "checkpoints/step_00000002"
    body = json.loads((checkpoint / store.COMPLETE).read_text())
    del body["digest"]
    body["metadata"]["recipe"]["batch.max_steps"] = 4
    (checkpoint / store.COMPLETE).write_text(json.dumps(body | {"digest": store._digest(body)}))
    save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights)
    flags = ["--resume", str(checkpoint)] if how == "path" else []
    line = refused(folder if how == "auto" else tmp_path / "branch", *named, flags=flags)
    assert "model.weights was another file when it was written" in line and not (tmp_path / "branch").exists()


# ---- tables and caches


def table_of(tmp_path: Path) -> Path:
    shutil.copytree(next((whole_run() / "data").iterdir()), tmp_path / "table")
    return tmp_path / "table"


@pytest.mark.parametrize("when", ["first use", "later"])
def test_a_flipped_bit_in_a_table_is_noticed(tmp_path, when):
    table = table_of(tmp_path)
    (table / "verified.json").unlink(missing_ok=True)
    if when == "later":
        train(1, tmp_path / "first", *SETTINGS, f"data.codes={table}")
        assert CodeTable.open(table).is_verified()
    shard = table / CodeTable.open(table).manifest.shards[0].file
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    line = refused(tmp_path / "run", *SETTINGS, f"data.codes={table}")
    assert str(shard) in line and "differs from its hash" in line
    assert not (tmp_path / "run").exists()


def test_a_table_that_cannot_be_written_is_checked_each_time(tmp_path):
    table = CodeTable.open(table_of(tmp_path))
    (table.folder / "verified.json").unlink(missing_ok=True)
    (table.folder / "verified.json").mkdir()
    assert not table.mark_verified() and not table.is_verified()


def cached(tmp_path: Path) -> tuple[Path, tuple[str, ...]]:
    folder = scratch() / "folders_cache"
    if not folder.is_dir():
        train(1, None, *SETTINGS, "reference.shard_steps=1", f"reference.cache={folder}", flags=["--cache_reference"])
    shutil.copytree(folder, tmp_path / "cache")
    return tmp_path / "cache", (*SETTINGS, "reference.shard_steps=1", f"reference.cache={tmp_path / 'cache'}")


def spoil(cache: Path, how: str) -> None:
    first, second = cache / "shard_000000.arrow", cache / "shard_000001.arrow"
    if how == "swapped":
        one, two = first.read_bytes(), second.read_bytes()
        first.write_bytes(two), second.write_bytes(one)
    elif how == "missing":
        second.unlink()
    else:
        data = bytearray(second.read_bytes())
        middle = len(data) // 2
        data[middle : middle + 4] = np.float32(-80.5).tobytes()
        second.write_bytes(data if how == "altered" else data[:-30])


@pytest.mark.parametrize("how", ["swapped", "missing", "altered", "truncated"])
def test_a_cache_that_is_damaged_is_noticed_and_repaired(tmp_path, how):
    cache, settings = cached(tmp_path)
    spoil(cache, how)
    line = refused(tmp_path / "run", *settings, "reference.placement=cached")
    assert str(cache) in line and "--cache_reference" in line
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    train(1, None, *settings, flags=["--cache_reference"])
    train(1, tmp_path / "run", *settings, "reference.placement=cached")
    assert losses(tmp_path / "run") == pytest.approx(losses(whole_run()), rel=1e-5)


def test_a_cache_shorter_than_the_run_is_refused_at_the_start(tmp_path):
    _, settings = cached(tmp_path)
    line = refused(tmp_path / "run", *settings, "batch.max_steps=9", "reference.placement=cached")
    assert "holds the first 4 of the run's 9 steps" in line and not (tmp_path / "run").exists()


# ---- workers, in a process of its own, whose exit waits for them


@pytest.mark.parametrize(("table", "tmpdir"), [("good", "long"), ("bad", "short"), ("bad", "long")])
def test_workers_end_with_the_run(tmp_path, tmpdir, table):
    codes = table_of(tmp_path)
    opened = CodeTable.open(codes)
    if table == "bad":  # changed behind the verification's back
        shard = codes / opened.manifest.shards[0].file
        times, data = shard.stat(), bytearray(shard.read_bytes())
        place = len(data) // 3 * 2
        data[place : place + 400] = b"\xff" * 400
        shard.write_bytes(data)
        os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
        opened.mark_verified()
    folder = tmp_path / ("x" * 100 if tmpdir == "long" else "x")
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "TMPDIR": str(folder)}
    steps = ("batch.max_steps=3",) if table == "good" else ()
    done = subprocess.run(
        [sys.executable, *command(tmp_path / "run", f"data.codes={codes}", "data.workers=1", *steps)[1:]],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    if table == "good":
        assert done.returncode == 0, done.stderr
    else:
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("rank 0")]
        assert done.returncode == 2 and "has the code 65535, outside 0..16" in line and "Traceback" not in line
