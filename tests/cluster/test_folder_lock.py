"""One writer in a folder: who holds it, when it is taken over, and how the loser ends."""

import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cca_ds import folder_lock
from cca_ds.folder_lock import NAME, FolderLock, FolderLost, FolderTaken
from tests.support.small_disk import mounted_disk

QUICK = {"beat_seconds": 0.05, "silence_seconds": 0.4}


def held(folder, **changes) -> dict:
    """The record of another holder: this machine's process 1 unless changed."""
    lock = FolderLock(folder, "--output x")
    record = lock.owner | {"token": "other", "pid": 1, "process_start": None} | changes
    lock.release()
    (folder / NAME).write_text(json.dumps(record))
    return record


def test_the_second_start_says_who_holds_it(tmp_path):
    lock = FolderLock(tmp_path, "--output x", {"SLURM_JOB_ID": "41"})
    with pytest.raises(FolderTaken) as caught:
        FolderLock(tmp_path, "--output x", {})
    line = str(caught.value)
    assert line.startswith("--output x: process ") and "\n" not in line
    for part in (str(os.getpid()), lock.owner["host"], "job 41", lock.owner["started"], "give another folder"):
        assert part in line
    lock.check()
    lock.release()
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_killed_holder_is_replaced_at_once(tmp_path):
    code = "import sys, pathlib\nfrom cca_ds.folder_lock import FolderLock\n"
    code += "FolderLock(pathlib.Path(sys.argv[1]), 'x')\nprint('held', flush=True)\ninput()"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, stdin=subprocess.PIPE,
                          text=True) as holder:  # fmt: skip
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(FolderTaken, match=f"process {holder.pid} on"):
            FolderLock(tmp_path, "x")
        holder.kill()
        holder.wait()
        lines = []
        FolderLock(tmp_path, "x", say=lines.append, silence_seconds=100).release()
        assert len(lines) == 1 and f"taking over from process {holder.pid}" in lines[0] and "has ended" in lines[0]


@pytest.mark.parametrize(
    ("changes", "environment", "gone"),
    [
        ({"pid": os.getpid()}, {}, "has ended"),  # the number was given to another process
        ({"job": "7", "restart": 0, "machine": "elsewhere"},
         {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, "attempt 0 of this job"),
        ({"job": "7_2", "restart": 1, "machine": "elsewhere"},
         {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2", "SLURM_RESTART_COUNT": "2"}, "attempt 1 of this job"),
        ({"machine": "elsewhere"}, {}, "silent for 0 s"),
        ({"machine": None, "pid": "1; rm", "host": None}, {}, "silent for 0 s"),
    ],
)  # fmt: skip
def test_a_holder_that_is_gone_is_replaced(tmp_path, changes, environment, gone):
    held(tmp_path, **changes)
    lines = []
    lock = FolderLock(tmp_path, "x", environment, say=lines.append, **QUICK)
    assert len(lines) == 1 and gone in lines[0]
    lock.check()
    lock.release()


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "\udcff".encode("utf-8", "surrogateescape"), "{}" * 90_000])
def test_a_record_that_is_no_record_is_judged_by_its_heartbeat(tmp_path, content):
    (tmp_path / NAME).write_bytes(content if isinstance(content, bytes) else content.encode())
    FolderLock(tmp_path, "x", **QUICK).release()


def test_a_holder_elsewhere_that_beats_is_left_alone(tmp_path):
    held(tmp_path, machine="elsewhere", host="node7", job="9")
    stop = threading.Event()

    def beat():
        while not stop.wait(0.05):
            os.utime(tmp_path / NAME)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        for environment in ({}, {"SLURM_JOB_ID": "9"}, {"SLURM_JOB_ID": "8", "SLURM_RESTART_COUNT": "3"}):
            with pytest.raises(FolderTaken, match="on node7, job 9"):
                FolderLock(tmp_path, "x", environment, **QUICK)
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP])
def test_a_file_system_without_links(tmp_path, monkeypatch, number):
    def no_link(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", no_link)
    lock = FolderLock(tmp_path, "--output x")
    with pytest.raises(FolderTaken, match=f"process {os.getpid()} on"):
        FolderLock(tmp_path, "--output x")
    lock.release()
    held(tmp_path)
    FolderLock(tmp_path, "--output x").release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("looks", [True, False])
def test_the_older_attempt_learns_that_it_was_replaced(tmp_path, looks):
    old = FolderLock(tmp_path, "--output x", {"SLURM_JOB_ID": "7"}, **QUICK)
    new = FolderLock(tmp_path, "--output x", {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, **QUICK)
    assert_lost(old, looks, "job 7, started .* has taken over")
    old.release()
    new.check()
    assert json.loads((tmp_path / NAME).read_text())["restart"] == 1
    new.release()


@pytest.mark.parametrize("looks", [True, False])
@pytest.mark.parametrize("what", ["the folder", "its lock"])
def test_a_deleted_folder_is_noticed(tmp_path, looks, what):
    folder = tmp_path / "run"
    folder.mkdir()
    lock = FolderLock(folder, "--output x", **QUICK)
    shutil.rmtree(folder) if what == "the folder" else (folder / NAME).unlink()
    assert_lost(lock, looks, f"{what} was deleted while the run was writing there")
    lock.release()


def assert_lost(lock, looks, message):
    end = time.monotonic() + 5
    while not looks and lock._lost is None and time.monotonic() < end:
        time.sleep(0.01)
    with pytest.raises(FolderLost, match=message):
        lock.check(look=looks)


# ends before its k-th call that changes the disk
CRASHING = """
import itertools, os, sys
from pathlib import Path
from cca_ds.folder_lock import FolderLock
calls, crash_at = itertools.count(1), int(sys.argv[2])

def guarded(call):
    def guard(*args, **kwargs):
        if next(calls) == crash_at:
            os._exit(9)
        return call(*args, **kwargs)
    return guard

for name in ("fsync", "link", "replace", "unlink", "utime"):
    setattr(os, name, guarded(getattr(os, name)))
FolderLock(Path(sys.argv[1]), "--output x").release()
"""


@pytest.mark.parametrize("stale", [False, True])
def test_a_kill_at_any_call_leaves_a_folder_to_take(tmp_path, stale):
    codes = []
    for at in range(1, 14):
        folder = tmp_path / str(at)
        folder.mkdir()
        if stale:
            holder = {"host": "a40-7", "pid": 1, "machine": folder_lock._machine(), "process_start": 1, "token": "x"}
            (folder / NAME).write_text(json.dumps(holder))
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
        command = [sys.executable, "-c", CRASHING, str(folder), str(at)]
        codes.append(subprocess.run(command, env=environment).returncode)
        lock = FolderLock(folder, "--output x")
        lock.check()
        lock.release()
        assert not (folder / NAME).exists()
    assert 9 in codes and codes[-1] == 0 and set(codes) == {0, 9}


@pytest.mark.parametrize("environment", [{"PBS_JOBID": "5"}, {"SLURM_JOB_ID": "5", "SLURM_RESTART_COUNT": "$(x)"}])
def test_only_a_later_attempt_of_a_slurm_job_takes_over_from_a_live_process(tmp_path, environment):
    lock = FolderLock(tmp_path, "--output x", environment)
    with pytest.raises(FolderTaken, match="is writing there"):
        FolderLock(tmp_path, "--output x", environment)
    lock.release()


@pytest.mark.parametrize("stale", [False, True])
def test_of_many_that_start_at_once_one_writes(tmp_path, stale):
    if stale:
        holder = {"host": "a40-7", "pid": 1, "machine": folder_lock._machine(), "process_start": 1, "token": "x"}
        (tmp_path / NAME).write_text(json.dumps(holder))
    gate, locks, refused = threading.Barrier(12), [], []

    def start():
        gate.wait()
        try:
            locks.append(FolderLock(tmp_path, "--output x"))
        except FolderTaken as error:
            refused.append(error)

    threads = [threading.Thread(target=start) for _ in range(12)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    (lock,) = locks
    assert json.loads((tmp_path / NAME).read_text())["token"] == lock.owner["token"] and len(refused) == 11
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_an_error_of_the_disk_and_leaves_nothing(tmp_path):
    with mounted_disk(tmp_path, mib=1) as disk:
        with contextlib.suppress(OSError), open(disk / "filler", "wb") as file:
            file.write(b"x" * 2**21)
        with pytest.raises(OSError, match="No space left"):
            FolderLock(disk, "--output x")
        assert [path.name for path in disk.iterdir()] == ["filler"]
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        with pytest.raises(OSError, match="Read-only"):
            FolderLock(disk, "--output x")


def test_a_claim_that_was_cut_short_does_not_keep_a_folder_for_ever(tmp_path):
    """As a kill leaves it on a file system without links."""
    holder = {"host": "a40-7", "pid": 1, "machine": folder_lock._machine(), "process_start": 1, "token": "x"}
    (tmp_path / NAME).write_text(json.dumps(holder))
    (tmp_path / f".{NAME}.{folder_lock._digest(NAME, holder)}").write_text('{"host')
    lock = FolderLock(tmp_path, "--output x", **QUICK)
    lock.check()
    lock.release()
    assert list(tmp_path.iterdir()) == []
