"""A writer of checkpoints that vanishes at any moment leaves every step that it had announced."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cca_ds.checkpoints.store import complete_checkpoints, newest_verified, verify

# Saves steps 1, 2, 3, ... as three ranks would, one after another, and prints each step once `publish` is
# back. CRASH_AT=k makes the process vanish just before its k-th call that changes the disk.
WRITER = """
import itertools, os, sys
from pathlib import Path
from cca_ds.checkpoints import store

root, crash_at = Path(sys.argv[1]), int(os.environ.get("CRASH_AT", "0"))
calls = itertools.count(1)

def guarded(call):
    def guard(*args, **kwargs):
        if next(calls) == crash_at:
            os._exit(9)
        return call(*args, **kwargs)
    return guard

for name in ("fsync", "replace", "rename", "unlink", "mkdir", "rmdir"):
    setattr(os, name, guarded(getattr(os, name)))

store.clean_partials(root)
found = store.newest_verified(root, report=lambda line: sys.exit("damaged: " + line))
first = found[1].step + 1 if found else 1
for step in range(first, int(sys.argv[2])):
    partial = store.begin(root, step)
    for rank in range(3):
        file = partial / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
        file.write_bytes(b"%d-%d" % (step, rank) * 20000)
        store.publish(partial, [file], rank, 3, metadata={"step": step})
    print(step, flush=True)
    store.retain(root, keep_last=2, keep_every=5)
"""


def start_writer(root, last=10**6, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(root), str(last)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )


def assert_content_is_of(folder, step):
    for rank in range(3):
        content = (folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt").read_bytes()
        assert content == b"%d-%d" % (step, rank) * 20000


@pytest.mark.slow
def test_a_crash_before_any_call_that_changes_the_disk_loses_no_published_step(tmp_path):
    """Steps 1 to 4 with retention, ended before the 1st, 2nd, ... such call, then run on by a second
    process."""
    for crash_at in range(1, 200):
        root = tmp_path / str(crash_at)
        writer = start_writer(root, 4, CRASH_AT=str(crash_at))
        output, errors = writer.communicate(timeout=60)
        acknowledged = [int(line) for line in output.split()]
        found = newest_verified(root, report=pytest.fail)
        if acknowledged:
            assert found[1].step >= acknowledged[-1]
            assert_content_is_of(found[0], found[1].step)
        if writer.returncode == 0:
            break
        assert writer.returncode == 9, errors
        if crash_at % 7 == 0:
            again, errors = start_writer(root, 4).communicate(timeout=60)
            assert [int(line) for line in again.split()] == list(range((found[1].step if found else 0) + 1, 4)), errors
    assert crash_at > 50 and acknowledged == [1, 2, 3]


def seconds_a_save(root):
    """As busy as this machine is now."""
    writer = start_writer(root, 12)
    writer.stdout.readline()
    start = time.perf_counter()
    writer.communicate(timeout=60)
    return (time.perf_counter() - start) / 10


def test_kills_at_random_moments_lose_no_published_step(tmp_path):
    """SIGKILL, thirty times, each time resumed from what is there."""
    draw, step, amid_a_save = random.Random(0), 0, 0
    span = 2.5 * seconds_a_save(tmp_path / "timed")
    for kill in range(30):
        writer = start_writer(tmp_path)
        assert int(writer.stdout.readline()) == step + 1, writer.stderr.read()
        time.sleep(draw.uniform(0.0, span))
        writer.send_signal(signal.SIGKILL)
        output, _ = writer.communicate(timeout=60)
        acknowledged = [step + 1, *(int(line) for line in output.split())]
        folder, manifest = newest_verified(tmp_path, report=pytest.fail)
        # All that was acknowledged is there, and at most the one step being acknowledged beyond it.
        assert acknowledged[-1] <= manifest.step <= acknowledged[-1] + 1, kill
        assert_content_is_of(folder, manifest.step)
        for older in complete_checkpoints(tmp_path):
            assert_content_is_of(older, verify(older).step)
        amid_a_save += any(tmp_path.glob("step_*.partial"))
        step = manifest.step
    assert amid_a_save >= 5
