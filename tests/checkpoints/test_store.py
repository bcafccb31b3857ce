"""Checkpoints are complete or absent: protocol, damage, retention, crashes at every point, kills at random
ones."""

import errno
import gc
import json
import os
import subprocess
import tempfile
import threading

import pytest
import torch

from cca_ds.checkpoints import store
from cca_ds.checkpoints.errors import StorageError
from cca_ds.checkpoints.store import (
    CheckpointError,
    begin,
    clean_partials,
    clear_errors,
    complete_checkpoints,
    listed_files,
    newest_verified,
    publish,
    published,
    read_manifest,
    retain,
    set_aside_damaged,
    verify,
)
from tests.support.small_disk import mounted_disk


def save(root, step, ranks=2, size=1000, metadata=None):
    """A checkpoint of `ranks` ranks, each with a file of its own; returns the complete folder."""
    published = []
    begin(root, step)
    for rank in range(ranks):
        partial = begin_again(root, step)
        file = partial / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        file.write_bytes(bytes([step % 256, rank]) * size)
        published.append(publish(partial, [file], rank, ranks, metadata))
    assert published[:-1] == [None] * (ranks - 1)
    return published[-1]


def begin_again(root, step):
    return begin(root, step, rank=1)  # any rank but 0 only waits for the folder


def test_published_folder_lists_every_file_of_every_rank(tmp_path):
    folder = save(tmp_path, 1234, ranks=3, metadata={"epoch": 2, "seeds": {10: 1, 9: 2}})
    assert folder == tmp_path / "step_00001234"
    assert (tmp_path / "latest").read_text().strip() == "step_00001234"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00001234"]
    manifest = verify(folder)
    assert manifest.step == 1234 and manifest.world_size == 3
    assert manifest.metadata == {"epoch": 2, "seeds": {"10": 1, "9": 2}}
    assert sorted(manifest.files) == [f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(3)]
    assert all(entry["size"] == 2000 for entry in manifest.files.values())
    assert sorted(path.name for path in folder.iterdir()) == ["COMPLETE.json", *sorted(manifest.files)]


def test_hashes_are_sha256(tmp_path):
    """The sha256 of "abc" as FIPS 180-2 prints it."""
    partial = begin(tmp_path, 1)
    (partial / "abc").write_bytes(b"abc")
    manifest = verify(publish(partial, [partial / "abc"]))
    assert manifest.files["abc"]["sha256"].startswith("ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61")


def test_nothing_is_visible_before_the_last_rank(tmp_path):
    older = save(tmp_path, 1)
    partial = begin(tmp_path, 2)
    for rank in (2, 0):
        file = partial / f"rank_{rank}.pt"
        file.write_bytes(b"x")
        assert publish(partial, [file], rank, 3) is None
        assert complete_checkpoints(tmp_path) == [older]
    (partial / "rank_1.pt").write_bytes(b"x")
    assert publish(partial, [partial / "rank_1.pt"], 1, 3) == tmp_path / "step_00000002"
    assert complete_checkpoints(tmp_path) == [tmp_path / "step_00000002", older]


def test_files_of_other_programs_are_no_part_of_a_checkpoint(tmp_path):
    """A file manager's .DS_Store, from while it was written or later, does not make an intact checkpoint damaged."""
    partial = begin(tmp_path, 1)
    (partial / "deep").mkdir()
    (partial / "deep" / "state.json").write_bytes(b"x")
    (partial / ".DS_Store").write_bytes(b"x")
    folder = publish(partial, [partial / "deep" / "state.json"])
    (folder / "deep" / ".DS_Store").write_bytes(b"x")
    assert list(verify(folder).files) == ["deep/state.json"]
    (folder / ".DS_Store").unlink()
    assert newest_verified(tmp_path, pytest.fail)[0] == folder


@pytest.mark.parametrize("attempt", range(10))
def test_ranks_that_finish_together_publish_once(tmp_path, attempt):
    partial, ranks = begin(tmp_path, 7), 8
    for rank in range(ranks):
        (partial / f"rank_{rank}.pt").write_bytes(b"x" * rank)
    gate, results = threading.Barrier(ranks), []

    def one(rank):
        gate.wait()
        try:
            results.append(publish(partial, [partial / f"rank_{rank}.pt"], rank, ranks))
        except CheckpointError as error:
            results.append(error)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(ranks)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert sorted(map(str, results)) == sorted([str(tmp_path / "step_00000007")] + ["None"] * (ranks - 1))
    assert len(verify(tmp_path / "step_00000007").files) == ranks


def test_begin_clears_an_interrupted_attempt_and_keeps_other_ranks_waiting(tmp_path):
    stale = begin(tmp_path, 3)
    (stale / "rank_0.pt").write_bytes(b"stale")
    publish(stale, [stale / "rank_0.pt"], 0, 2)  # rank 1 was killed
    waited = []
    partial = begin(tmp_path, 3, rank=0, barrier=lambda: waited.append(sorted(stale.iterdir())))
    assert waited == [[]] and list(partial.iterdir()) == []


def test_a_failing_begin_still_meets_the_other_ranks_at_the_barrier(tmp_path):
    save(tmp_path, 5)
    waited = []
    with pytest.raises(CheckpointError, match="already saved and intact"):
        begin(tmp_path, 5, barrier=lambda: waited.append(True))
    assert waited == [True]
    verify(tmp_path / "step_00000005")


def damage(folder, how):
    victim = sorted(folder.glob("*.pt"))[0]
    if how == "flipped":
        content = bytearray(victim.read_bytes())
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    elif how == "truncated":
        victim.write_bytes(victim.read_bytes()[:-1])
    elif how == "missing":
        victim.unlink()
    else:
        victim = folder / "COMPLETE.json"
        text = victim.read_text()
        victim.write_text(text[: len(text) // 2] if how == "manifest cut" else text.replace('"step": 2', '"step": 3'))
    return victim.name


@pytest.mark.parametrize("how", ["flipped", "truncated", "missing", "manifest cut", "manifest edited"])
def test_damage_is_named_and_passed_over(tmp_path, how):
    older, newer, lines = save(tmp_path, 1), save(tmp_path, 2), []
    name = damage(newer, how)
    with pytest.raises(CheckpointError, match=name) as caught:
        verify(newer)
    assert "\n" not in str(caught.value)
    folder, manifest = newest_verified(tmp_path, lines.append)
    assert folder == older and manifest.step == 1
    assert len(lines) == 1 and name in lines[0] and "step_00000002" in lines[0]
    # The run comes to step 2 again: the damaged one makes room, twice, and is never deleted.
    before = {path.name: path.read_bytes() for path in newer.iterdir()}
    assert save(tmp_path, 2) == newer
    assert newest_verified(tmp_path, lines.append)[0] == newer
    damage(newer, "truncated")
    assert save(tmp_path, 2) == newer
    assert clean_partials(tmp_path) == [] and retain(tmp_path, keep_last=1) == [older]
    kept = tmp_path / "step_00000002.damaged"
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == before
    assert (tmp_path / "step_00000002.damaged2").is_dir()


@pytest.mark.parametrize("how", ["flipped", "missing", "manifest cut", "no manifest"])
def test_where_all_are_damaged_nothing_is_begun_and_nothing_changed(tmp_path, how):
    for step in (1, 2):
        folder = save(tmp_path, step)
        (folder / "COMPLETE.json").unlink() if how == "no manifest" else damage(folder, how)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match=r"no checkpoint is intact \(.*step_00000002.*step_00000001") as caught:
        newest_verified(tmp_path, lambda line: None)
    assert "\n" not in str(caught.value) and sorted(tmp_path.rglob("*")) == before
    for step in (1, 2):
        (tmp_path / f"step_0000000{step}").rename(tmp_path / f"step_0000000{step}.damaged")
    with pytest.raises(CheckpointError, match=r"no checkpoint is intact"):
        newest_verified(tmp_path)


def test_those_passed_over_at_a_start_are_out_of_reach_of_retention(tmp_path):
    save(tmp_path, 1), damage(save(tmp_path, 5), "flipped")
    set_aside_damaged(tmp_path, newest_verified(tmp_path, lambda line: None)[0])
    for step in (2, 3, 4, 6):
        save(tmp_path, step)
    retain(tmp_path, keep_last=1)
    assert [path.name for path in published(tmp_path)] == ["step_00000006"]
    assert (tmp_path / "step_00000005.damaged").is_dir()


def test_only_listed_files_are_handed_out(tmp_path):
    folder = save(tmp_path, 1)
    (folder / "rank_9.pt").write_text("put here by someone")
    with listed_files(folder) as view:
        assert {path.name for path in view.iterdir()} == {*read_manifest(folder).files}
    assert not view.exists()


def test_every_single_flipped_byte_of_the_manifest_is_noticed(tmp_path):
    folder = save(tmp_path, 2, ranks=1)
    path = folder / "COMPLETE.json"
    whole = path.read_bytes()
    for position in range(0, len(whole), 3):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(CheckpointError, match=r"COMPLETE\.json is corrupt"):
            verify(folder)
    path.write_bytes(whole)
    verify(folder)


def test_order_is_by_step_not_by_text(tmp_path):
    for step in (99_999_999, 5, 100_000_000):
        save(tmp_path, step, ranks=1)
    assert [verify(folder).step for folder in complete_checkpoints(tmp_path)] == [100_000_000, 99_999_999, 5]


def test_nothing_there(tmp_path):
    assert complete_checkpoints(tmp_path / "absent") == []
    assert newest_verified(tmp_path) is None
    with pytest.raises(CheckpointError, match="never finished"):
        verify(tmp_path)


def test_retention(tmp_path):
    for step in range(1, 11):
        save(tmp_path, step, ranks=1)
    deleted = retain(tmp_path, keep_last=2, keep_every=4)
    assert [int(folder.name[5:]) for folder in complete_checkpoints(tmp_path)] == [10, 9, 8, 4]
    assert [int(folder.name[5:]) for folder in deleted] == [7, 6, 5, 3, 2, 1]
    assert retain(tmp_path, keep_last=1) and complete_checkpoints(tmp_path) == [tmp_path / "step_00000010"]
    assert not any(path.name.endswith(".deleting") for path in tmp_path.iterdir())
    with pytest.raises(CheckpointError, match="keep_last=0"):
        retain(tmp_path, keep_last=0)


def test_what_kills_left_is_deleted(tmp_path):
    save(tmp_path, 1)
    partial = begin(tmp_path, 2)
    (tmp_path / "step_00000000.deleting").mkdir()
    assert clean_partials(tmp_path) == [tmp_path / "step_00000000.deleting", partial]
    assert not partial.exists() and len(complete_checkpoints(tmp_path)) == 1


@pytest.mark.parametrize(
    ("number", "lines"),
    [
        (errno.ENOSPC, "no space left"),
        (errno.EDQUOT, "no space left"),
        (errno.EROFS, "not writable"),
        (errno.EIO, "Input/output"),
    ],
)
def test_failing_disk_is_one_clear_line_and_costs_nothing_older(tmp_path, monkeypatch, number, lines):
    older = save(tmp_path, 1)
    partial = begin(tmp_path, 2)
    (partial / "rank_0.pt").write_bytes(b"x")

    def fail(handle):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(CheckpointError, match=lines) as caught:
        publish(partial, [partial / "rank_0.pt"])
    monkeypatch.undo()
    assert "\n" not in str(caught.value) and "step_00000002" in str(caught.value)
    assert newest_verified(tmp_path)[0] == older
    assert not partial.exists()  # its space is given back
    save(tmp_path, 2)


@pytest.fixture
def small_disk(tmp_path):
    with mounted_disk(tmp_path, mib=1) as disk:
        yield disk


def test_a_disk_that_is_really_full(small_disk):
    older = save(small_disk, 1, size=100_000)
    partial = begin(small_disk, 2)
    with pytest.raises(CheckpointError, match="no space left") as plain, clear_errors(partial):
        (partial / "rank_0.pt").write_bytes(b"x" * 2**21)
    with pytest.raises(CheckpointError, match=r"no space left|free some space") as from_torch, clear_errors(partial):
        torch.save(torch.zeros(2**19), partial / "rank_0.pt")
    assert "\n" not in str(plain.value) + str(from_torch.value)
    assert newest_verified(small_disk)[0] == older
    del plain, from_torch  # their tracebacks hold the deleted file open
    gc.collect()
    clean_partials(small_disk)
    save(small_disk, 2, size=100_000)


def test_a_folder_that_is_really_read_only(small_disk):
    older, partial = save(small_disk, 1), begin(small_disk, 2)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(CheckpointError, match="not writable") as caught:
        begin(small_disk, 3)
    with (
        pytest.raises(CheckpointError, match=r"not writable \(Read-only file system\); make it") as from_torch,
        clear_errors(partial / "rank_0.pt"),  # as where it turns read-only while a thread writes
    ):
        torch.save(torch.zeros(2), partial / "rank_0.pt")
    with pytest.raises(CheckpointError, match="not writable"):
        publish(partial, [])
    assert "\n" not in str(caught.value) + str(from_torch.value)
    assert newest_verified(small_disk)[0] == older
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    assert clean_partials(small_disk) == [partial]
    save(small_disk, 2)


@pytest.mark.parametrize(
    ("number", "remedy"), [(errno.EROFS, "make it writable and start again"), (errno.EIO, "once its disk answers")]
)
def test_what_failed_torch_save_is_asked_of_the_disk(monkeypatch, tmp_path, number, remedy):
    """A file system that is read-only since an error does not say so, and torch.save names no cause."""

    def failing(**where):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(tempfile, "TemporaryFile", failing)
    with pytest.raises(StorageError, match=remedy) as caught, clear_errors(tmp_path / "step"):
        raise RuntimeError("[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing file data/0")
    assert os.strerror(number) in str(caught.value)


def test_errors_that_are_not_the_disks_pass_unchanged(tmp_path):
    with pytest.raises(RuntimeError, match="shape mismatch"), clear_errors(tmp_path):
        raise RuntimeError("shape mismatch")


def test_a_file_changed_after_its_rank_sealed_it_is_refused(tmp_path):
    partial = begin(tmp_path, 1)
    (partial / "rank_0.pt").write_bytes(b"x")
    publish(partial, [partial / "rank_0.pt"], 0, 2)
    (partial / "rank_0.pt").write_bytes(b"longer")
    with pytest.raises(CheckpointError, match=r"rank_0\.pt changed"):
        publish(partial, [], 1, 2)
    assert complete_checkpoints(tmp_path) == []


def test_a_checkpoint_that_cannot_be_read_is_not_passed_over(tmp_path, monkeypatch):
    """It may be intact: the disk, or its permissions, are at fault."""
    save(tmp_path, 1)
    newest, plain = save(tmp_path, 2), store.describe_file

    def failing(path, *, sync):
        if path.parent == newest:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return plain(path, sync=sync)

    monkeypatch.setattr(store, "describe_file", failing)
    with pytest.raises(StorageError, match=r"step_00000002: cannot be read \(Input/output error: .*move it away"):
        newest_verified(tmp_path, pytest.fail)
    with pytest.raises(StorageError, match="cannot be read"):
        begin(tmp_path, 2)
    monkeypatch.undo()
    assert newest_verified(tmp_path, pytest.fail)[0] == newest


def test_what_only_resembles_a_leftover_is_kept(tmp_path):
    (tmp_path / "step_mine.partial").mkdir()
    (tmp_path / "step_00000001.partial").write_text("a file")
    (tmp_path / "step_00000002").write_text("a file")
    for name in ("step_00000003.partial", "step_00000003.deleting", "step_00000003.universal.partial"):
        (tmp_path / name).mkdir()
    assert len(clean_partials(tmp_path)) == 3
    assert newest_verified(tmp_path, pytest.fail) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step_00000001.partial", "step_00000002", "step_mine.partial"
    ]  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [{"files": []}, {"files": {"../x": {}}}, {"files": {"/etc/passwd": {}}}, {"world_size": "2"}, {"step": True},
     {"metadata": None}],
    ids=str,
)  # fmt: skip
def test_a_manifest_with_values_that_no_run_writes_is_damaged(tmp_path, change):
    folder = save(tmp_path, 1)
    body = json.loads((folder / "COMPLETE.json").read_text()) | change
    del body["digest"]
    (folder / "COMPLETE.json").write_text(json.dumps(body | {"digest": store._digest(body)}))
    with pytest.raises(CheckpointError, match=r"COMPLETE\.json is corrupt"):
        verify(folder)


def test_room_is_asked_for_before_anything_is_written(tmp_path):
    with mounted_disk(tmp_path, 4) as disk:
        store.require_space(disk / "run" / "checkpoints", 10**6, 3)
        said = (
            r"checkpoints: 5 checkpoint\(s\) of about 0.001 GB take 0.005 GB, and only 0.00\d+ GB are free: free some"
        )
        with pytest.raises(StorageError, match=said):
            store.require_space(disk / "run" / "checkpoints", 10**6, 5)
        with pytest.raises(StorageError, match=r"1 checkpoint\(s\) of about 0.01 GB"):
            begin(disk / "checkpoints", 1, needed_bytes=10**7)
        assert not (disk / "checkpoints" / "step_00000001.partial").exists()
