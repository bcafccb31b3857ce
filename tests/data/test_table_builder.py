"""A build that was killed, or stopped by a full disk, continues: no image is lost, doubled or encoded again."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cca_ds import encode
from cca_ds.data import table_files
from cca_ds.data.codes import CodeTable

ROOT = Path(__file__).parents[2]
RUN = ["--recipe", "digits", "--device", "cpu", "--threads", "2"]

# Kills itself with SIGKILL before or after its n-th operation on the disk, for every n; each time a second process
# continues, and must end with the files of a build that was not killed, without writing a finished shard again.
# Every build is a fork of one process that has imported the slow modules and started no thread.
KILLED_EVERYWHERE = '''
import itertools, os, pathlib, shutil, signal, sys
import datasets, datasets.arrow_writer, pyarrow
import numpy as np
from cca_ds.data import table_builder
from cca_ds.data.manifest import Manifest

base = pathlib.Path(sys.argv[1])
table = Manifest(0, 3, 2, 5, 50, "llamagen", "x", "ab", source_hash="cd")
plan = table_builder.TablePlan(table, 11, 4, {})
OPERATIONS = [(os, "fsync"), (os, "replace"), (os, "rename"), (shutil, "rmtree"), (pathlib.Path, "mkdir"),
              (pathlib.Path, "unlink")]

def produce(rows, advance):
    kept = [i for i in rows if i % 7 != 3]
    codes = np.array([np.random.default_rng(i).integers(0, 50, (2, 5)) for i in kept])
    skipped = [{"index": i, "name": str(i), "reason": "bad"} for i in rows if i % 7 == 3]
    return table_builder.ShardContent(codes, np.array([i % 3 for i in kept]), skipped)

def build(folder):
    builder = table_builder.TableBuilder(folder, plan)
    if builder.begin() is None:
        table_builder.build_shards(builder, produce, 0, 1, 0.5)

def forked(folder, kill_before=None, kill_after=None):
    """Build in a fork; returns its wait status."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    count = itertools.count()
    def wrapped(operation):
        def call(*arguments, **options):
            n = next(count)
            if n == kill_before:
                os.kill(os.getpid(), signal.SIGKILL)
            result = operation(*arguments, **options)
            if n == kill_after:
                os.kill(os.getpid(), signal.SIGKILL)
            return result
        return call
    try:
        for owner, name in OPERATIONS:
            setattr(owner, name, wrapped(getattr(owner, name)))
        build(folder)
    except BaseException:
        import traceback; traceback.print_exc(); sys.stderr.flush()
        os._exit(1)
    os._exit(0)

def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

def finished(folder):
    """Inodes of the Arrow files whose records are there."""
    records = [int(p.stem) for p in (folder / "records").glob("*.json")]
    return {n: (folder / f"data-{n:05d}-of-00003.arrow").stat().st_ino for n in records}

assert forked(base / "whole") == 0
whole, kills = contents(base / "whole"), 0
for n in itertools.count():
    ends = []
    for name, moment in (("before", {"kill_before": n}), ("after", {"kill_after": n})):
        folder = base / f"{name}{n}"
        partial = folder.with_name(folder.name + ".partial")
        status = forked(folder, **moment)
        ends.append(status)
        if status == 0:
            continue
        assert os.WTERMSIG(status) == signal.SIGKILL, (n, status)
        kills += 1
        if folder.exists():  # published: whatever is there must be whole
            assert whole.items() <= contents(folder).items(), n
        done = finished(partial) if partial.exists() else {}
        assert forked(folder) == 0, n
        assert contents(folder) == whole, (n, name)
        for number, inode in done.items():
            assert (folder / f"data-{number:05d}-of-00003.arrow").stat().st_ino == inode, (n, number)
        assert not partial.exists()
    if ends == [0, 0]:
        break
print(kills)
'''


def test_killed_before_and_after_every_operation_on_the_disk(tmp_path):
    command = [sys.executable, "-c", KILLED_EVERYWHERE, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=200)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 40  # moments at which it was killed
    table = CodeTable.open(tmp_path / "whole")
    assert len(table) == 9 and table.manifest.skipped_images == 2
    kept = [index for index in range(11) if index not in (3, 10)]
    for row, index in enumerate(kept):
        np.testing.assert_array_equal(
            table.take([row], [1])[0][0], np.random.default_rng(index).integers(0, 50, (2, 5))[1]
        )


@pytest.fixture
def many_images(tmp_path):
    """400 images in three classes; image i has the digits of i in base 17 as its first codes."""
    for number in range(400):
        folder = tmp_path / "images" / f"c{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        levels = np.array([number // 17**place % 17 for place in range(64)]).reshape(8, 8)
        Image.fromarray(np.round(levels * 255 / 16).astype(np.uint8)).save(folder / f"{number:04d}.png")
    return tmp_path / "images"


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_the_command_killed_while_it_encodes(tmp_path, many_images):
    arguments = ["--source", str(many_images), "--images_per_shard", "8"]
    assert encode.main([*RUN, *arguments, "--output", str(tmp_path / "whole")]) == 0
    command = [sys.executable, "-m", "cca_ds.encode", *RUN, *arguments, "--output", str(tmp_path / "t")]
    records = tmp_path / "t.partial" / "records"
    for shards in (5, 30):
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not records.exists() or len(list(records.glob("*.json"))) < shards:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not (tmp_path / "t").exists()
    assert encode.main([*RUN, *arguments, "--output", str(tmp_path / "t")]) == 0
    assert contents(tmp_path / "t") == contents(tmp_path / "whole")
    table = CodeTable.open(tmp_path / "t")
    table.check()
    codes_BL, labels_B = table.take(np.arange(400))
    numbers = (codes_BL[:, :3] * 17 ** np.arange(3)).sum(1)
    assert sorted(numbers) == list(range(400))
    np.testing.assert_array_equal(numbers % 3, labels_B)


def test_disk_that_fills_up_while_encoding(tmp_path, many_images, monkeypatch, capsys):
    """Writing fails after three shards; the next start has space."""
    arguments = [*RUN, "--source", str(many_images), "--images_per_shard", "50", "--output", str(tmp_path / "t")]
    fsync, records = os.fsync, tmp_path / "t.partial" / "records"

    def full(descriptor):
        if len(list(records.glob("*.json"))) >= 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(table_files.os, "fsync", full)
        assert encode.main(arguments) == 2
    lines = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "encode:" in line]
    assert len(lines) == 1 and "no space left while writing" in lines[0] and "run again" in lines[0]
    assert not (tmp_path / "t").exists()
    assert not list((tmp_path / "t.partial").rglob(".*.partial"))
    assert len(list(records.glob("*.json"))) == 3
    assert encode.main(arguments) == 0
    CodeTable.open(tmp_path / "t").check()


def test_disk_full_from_the_start_leaves_nothing(tmp_path, many_images, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(table_files.os, "fsync", full)
    assert encode.main([*RUN, "--source", str(many_images), "--output", str(tmp_path / "t")]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_a_full_file_system(tmp_path, many_images, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", str(disk)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs root and the right to mount a tmpfs")
    arguments = [*RUN, "--source", str(many_images), "--images_per_shard", "50", "--output", str(disk / "t")]
    try:
        assert encode.main(arguments) == 2
        lines = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "encode:" in line]
        assert len(lines) == 1 and "no space left while writing" in lines[0]
        assert not (disk / "t").exists() and not list(disk.rglob(".*.partial"))
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        assert encode.main(arguments) == 0
        CodeTable.open(disk / "t").check()
        assert len(CodeTable.open(disk / "t")) == 400
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_an_output_that_cannot_be_written(tmp_path, many_images, capsys):
    (tmp_path / "file").write_text("in the way")
    assert encode.main([*RUN, "--source", str(many_images), "--output", str(tmp_path / "file" / "t")]) == 2
    assert "cannot be written" in capsys.readouterr().err
