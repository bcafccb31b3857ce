"""A file system turns read-only under a run: one clear line, older checkpoints intact, and the run goes on later."""

import contextlib
import os
import shutil
import subprocess

import pytest

from cca_ds.checkpoints.store import complete_checkpoints, newest_verified, verify
from tests.dist.runs import (
    PATIENCE,
    assert_same_trajectory,
    losses,
    metrics,
    scratch,
    start_training,
    train,
    wait_until,
)

pytestmark = pytest.mark.dist

STEPS = 60
SETTINGS = ("batch.global_size=4", "batch.micro_size=4", f"batch.max_steps={STEPS}", "checkpoint.every_steps=1",
            "checkpoint.keep_last=3")  # fmt: skip


def mount(*arguments: object) -> bool:
    return subprocess.run(["mount", *map(str, arguments)], capture_output=True).returncode == 0


@pytest.fixture
def mounts():
    """Mounts what it is called with, and unmounts the folder at the end."""
    with contextlib.ExitStack() as stack:

        def make(folder, *arguments):
            folder.mkdir()
            if not mount(*arguments, folder):
                pytest.skip("mounting needs root, and loop devices for ext4")
            stack.callback(subprocess.run, ["umount", "-l", str(folder)], capture_output=True)

        yield make


def undisturbed() -> list[float]:
    folder = scratch() / "writable"
    if not folder.is_dir():
        train(1, folder, *SETTINGS, "checkpoint.every_steps=1000")
    return losses(folder)


@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_a_checkpoint_folder_that_turns_read_only_is_one_clear_error(mounts, asynchronous, tmp_path):
    folder, checkpoints = tmp_path / "run", tmp_path / "run/checkpoints"
    settings = (*SETTINGS, f"checkpoint.asynchronous={asynchronous}")
    with start_training(1, folder, *settings) as running:
        wait_until((folder / "config.yaml").is_file, running)
        mounts(checkpoints, "-t", "tmpfs", "-o", "size=8m", "tmpfs")  # long before anything is written there
        wait_until(lambda: len(complete_checkpoints(checkpoints)) >= 2, running)
        wait_until(lambda: mount("-o", "remount,ro", checkpoints), running)  # while no file there is being written
        (output,) = running.wait(PATIENCE)
    assert output.returncode == 1
    (line,) = [line for line in output.stderr.splitlines() if "checkpoint " in line]
    assert line.startswith("rank 0 on ") and f"checkpoint {checkpoints}/step_" in line
    assert "not writable (Read-only file system); make it writable and start again" in line
    assert "older checkpoints are untouched" in line and "Traceback" not in output.stderr
    _, manifest = newest_verified(checkpoints, report=pytest.fail)
    assert all(verify(path) for path in complete_checkpoints(checkpoints)) and manifest.step < STEPS

    (output,) = train(1, folder, *settings, check=False)  # still read-only: message before anything is started
    assert output.returncode == 2 and output.stderr.count("\n") == 1
    assert f"{checkpoints} cannot be written (Read-only file system)" in output.stderr

    assert mount("-o", "remount,rw", checkpoints)
    (output,) = train(1, folder, *settings)
    assert f"continuing after step {manifest.step}" in output.stderr
    assert_same_trajectory(losses(folder), undisturbed())
    assert not list(checkpoints.glob("*.partial"))


def test_a_whole_output_that_turns_read_only_is_one_clear_error(mounts, tmp_path):
    """As a disk does that found an error: with files open for writing, the log's and the metrics' among them."""
    image, disk = tmp_path / "image", tmp_path / "disk"
    with open(image, "wb") as file:
        file.truncate(16 << 20)
    mkfs = shutil.which("mkfs.ext4", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if mkfs is None:
        pytest.skip("no mkfs.ext4 here")
    made = subprocess.run([mkfs, "-q", str(image)], capture_output=True)
    if made.returncode:
        pytest.skip("no mkfs.ext4 here")
    mounts(disk, "-o", "loop", image)
    folder = disk / "run"
    with start_training(1, folder, *SETTINGS) as running:
        wait_until(lambda: len(complete_checkpoints(folder / "checkpoints")) >= 2, running)
        assert mount("-o", "remount,abort", disk)
        (output,) = running.wait(PATIENCE)
    assert output.returncode == 1 and "Traceback" not in output.stderr
    lines = [line for line in output.stderr.splitlines() if line.startswith("rank 0 on ")]
    assert len(lines) == 1 and str(folder) in lines[0] and "start again" in lines[0], output.stderr
    # an fsync of an open file gets the disk's I/O error, a new file gets EROFS
    assert "Input/output error" in lines[0] or "not writable (Read-only file system)" in lines[0]
    subprocess.run(["umount", str(disk)], check=True)
    assert mount("-o", "loop", image, disk)
    _, manifest = newest_verified(folder / "checkpoints", report=pytest.fail)
    (output,) = train(1, folder, *SETTINGS)
    assert f"continuing after step {manifest.step}" in output.stderr
    assert metrics(folder)[-1]["step"] == STEPS


def test_a_full_disk_of_tensorboard_is_one_clear_error(mounts, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    mounts(folder / "tensorboard", "-t", "tmpfs", "-o", "size=8k", "tmpfs")
    settings = (*SETTINGS, "logging.tensorboard=true", "logging.every_steps=1")
    (output,) = train(1, folder, *settings, check=False)
    lines = [line for line in output.stderr.splitlines() if line.startswith("rank 0 on ")]
    assert output.returncode == 1 and "Traceback" not in output.stderr and len(lines) == 1, output.stderr
    assert f"{folder}/tensorboard: no space left" in lines[0]
    subprocess.run(["mount", "-o", "remount,size=8m", folder / "tensorboard"], check=True)
    train(1, folder, *settings)
    assert metrics(folder)[-1]["step"] == STEPS
