"""The store of the reference's log-likelihoods: whose it is, what it holds, whom it waits for.

Letters: K pairs of a global batch, S steps of a shard.
"""

import dataclasses
import json
import os
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cca_ds.cluster.launch import Ranks
from cca_ds.config.recipes import load_recipe
from cca_ds.data.batches import BatchPlan, Steps
from cca_ds.data.generated import GeneratedCodes
from cca_ds.models.weight_files import state_hash
from cca_ds.reference.cache import (
    CachedReference,
    ReferenceCache,
    ReferenceCacheError,
    Shard,
    _stored_shard_steps,
    cache_key,
)
from cca_ds.reference.producer import fill_cache
from tests.support.digits_table import digits_table

KEY = {"reference": "abc", "seed": 0, "global_size": 4, "shard_steps": 2}


def shard(first: int = 0) -> Shard:
    """S K = 8 rows whose numbers tell them apart."""
    samples = np.arange(first, first + 8)
    return Shard(samples, -samples.astype(np.float32), -100 - samples.astype(np.float32))


def test_a_shard_comes_back_and_names_step_and_sample(tmp_path):
    import pyarrow

    cache = ReferenceCache(tmp_path / "c", KEY)
    cache.write(3, shard(50))
    found = cache.read(3)
    for name in ("samples", "positive", "negative"):
        np.testing.assert_array_equal(getattr(found, name), getattr(shard(50), name))
    table = pyarrow.ipc.open_file(str(cache.path(3))).read_all()
    assert table.column_names == ["step", "sample", "log_p_positive", "log_p_negative"]
    assert table.column("step").to_pylist() == [6] * 4 + [7] * 4
    assert [cache.shard_of(step) for step in (0, 1, 2, 7)] == [0, 0, 1, 3]


def test_a_shard_with_generated_images(tmp_path):
    cache, drawn = ReferenceCache(tmp_path, KEY), np.arange(8 * 5, dtype=np.uint16).reshape(8, 5)
    cache.write(0, dataclasses.replace(shard(), generated=drawn))
    np.testing.assert_array_equal(cache.read(0).generated, drawn)
    whole = cache.path(0).read_bytes()
    place = whole.index(drawn.tobytes()) + 6
    cache.path(0).write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(ReferenceCacheError, match="its numbers differ from its checksum"):
        cache.read(0)
    cache.write(0, shard())
    batch = SimpleNamespace(
        step=0, positions_B=torch.arange(2), sample_indices_B=torch.arange(2), codes_BL=torch.zeros(2, 5)
    )
    with pytest.raises(ReferenceCacheError, match="it holds no generated images"):
        CachedReference(cache).draw(batch)


def test_what_a_streamed_reference_logs(tmp_path):
    """Shards of two steps, of which 0 to 2 and 4 are there: from step 1 on, four more are ready before the gap."""
    cache = ReferenceCache(tmp_path, KEY)
    for number in (0, 1, 2, 4):
        cache.write(number, shard())
    an_hour_ago = time.time() - 3600
    os.utime(cache.path(0), (an_hour_ago, an_hour_ago))
    reference = CachedReference(cache, wait_seconds=9.0, reports=True)
    assert reference.tags() == {}  # before the first step
    batch = SimpleNamespace(
        step=1, positions_B=torch.arange(2), sample_indices_B=torch.arange(4, 6), codes_BL=torch.zeros(2, 5)
    )
    reference(batch, ())
    tags = reference.tags()
    assert tags["reference/steps_ahead"] == 4 and tags["reference/age_seconds"] == pytest.approx(3600, abs=60)
    assert 0 <= tags["reference/wait_seconds"] < 9
    cache.write(3, shard())
    assert reference.tags()["reference/steps_ahead"] == 8 and reference.tags()["reference/wait_seconds"] == 0
    assert CachedReference(cache, wait_seconds=9.0).tags() == {}  # of another rank


def test_a_cache_with_generated_images_is_no_other_runs(tmp_path):
    """Either way: a run that lacks the key sees it in the cache."""
    ReferenceCache(tmp_path / "drawn", KEY | {"generated": "online"})
    ReferenceCache(tmp_path / "usual", KEY)
    for folder, key in (("drawn", KEY), ("drawn", KEY | {"generated": "af"}), ("usual", KEY | {"generated": "af"})):
        with pytest.raises(ReferenceCacheError, match=r"another run: generated \('?(online|None)'? there\) differ"):
            ReferenceCache(tmp_path / folder, key)


def test_another_runs_cache_is_refused_with_what_differs(tmp_path):
    ReferenceCache(tmp_path, KEY)
    ReferenceCache(tmp_path, dict(KEY))
    with pytest.raises(ReferenceCacheError, match=r"another run: reference \('abc' there\), seed \(0 there\) differ"):
        ReferenceCache(tmp_path, KEY | {"reference": "xyz", "seed": 4})
    assert json.loads((tmp_path / "key.json").read_text()) == KEY


def test_a_damaged_shard_is_an_error_with_its_path(tmp_path):
    cache = ReferenceCache(tmp_path, KEY)
    cache.write(0, shard())
    cache.path(0).write_bytes(cache.path(0).read_bytes()[:-40])
    with pytest.raises(
        ReferenceCacheError, match=r"shard_000000\.arrow is damaged .*: --cache_reference computes it again"
    ):
        cache.read(0)


def test_numbers_that_are_none_blame_the_cache(tmp_path, monkeypatch):
    """Not the samples of the step that would use them."""
    cache, content = ReferenceCache(tmp_path, KEY), shard()
    content.negative[3] = np.nan
    said = f"negative log-likelihood of sample {content.samples[3]} is nan"
    with pytest.raises(ReferenceCacheError, match=f"the reference's {said}: look at reference.weights"):
        cache.write(0, content)
    assert not cache.path(0).exists()
    with monkeypatch.context() as patch:  # as an older version did
        patch.setattr("cca_ds.reference.cache._not_finite", lambda content: None)
        cache.write(0, content)
    with pytest.raises(ReferenceCacheError, match=rf"shard_000000\.arrow is damaged \({said}\)"):
        cache.read(0)


def test_notes_that_are_damaged_are_one_line(tmp_path):
    cache = ReferenceCache(tmp_path, KEY)
    cache.note_producer(0, "node", 1)
    (tmp_path / "trainer.json").write_text("[]")
    (tmp_path / "producers" / "rank_00000.json").write_text("{}")
    for read, name in ((cache.trainer, "trainer.json"), (cache.producers, "rank_00000.json")):
        with pytest.raises(ReferenceCacheError, match=name):
            read()


def test_no_flipped_bit_changes_a_number_in_silence(tmp_path):
    """Elsewhere than in the numbers a flip may pass, as nothing reads it."""
    cache = ReferenceCache(tmp_path, KEY)
    cache.write(0, shard())
    path, refused = cache.path(0), 0
    whole = path.read_bytes()
    for position in range(0, len(whole), 3):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :])
        try:
            found = cache.read(0)
        except ReferenceCacheError:
            refused += 1
            continue
        for name, expected in vars(shard()).items():
            np.testing.assert_array_equal(getattr(found, name), expected)
    assert refused > 50


def test_shards_of_another_cache_or_place_are_refused_and_of_an_older_version_read(tmp_path):
    cache, other = ReferenceCache(tmp_path / "a", KEY), ReferenceCache(tmp_path / "b", KEY | {"seed": 1})
    other.write(0, shard())
    cache.path(0).write_bytes(other.path(0).read_bytes())
    with pytest.raises(ReferenceCacheError, match="it was written for another cache"):
        cache.read(0)
    cache.write(1, shard())
    cache.path(1).rename(cache.path(0))
    with pytest.raises(ReferenceCacheError, match="its numbers differ from its checksum"):
        cache.read(0)
    cache.write(2, shard())
    import pyarrow

    table = pyarrow.ipc.open_file(cache.path(2).read_bytes()).read_all().replace_schema_metadata(None)
    with pyarrow.ipc.new_file(str(cache.path(2)), table.schema) as writer:
        writer.write_table(table)
    np.testing.assert_array_equal(cache.read(2).positive, shard().positive)


def test_of_two_runs_that_make_a_cache_at_once_one_gets_it(tmp_path):
    gate, made, refused = threading.Barrier(8), [], []

    def make(seed: int) -> None:
        gate.wait()
        try:
            made.append(ReferenceCache(tmp_path / "c", KEY | {"seed": seed})._key_hash)
        except ReferenceCacheError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=make, args=(seed,)) for seed in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(made) == 1 and len(refused) == 7 and all("another run: seed (" in line for line in refused)


@pytest.mark.parametrize("content", ["", "[1]", "{", "3"])
def test_a_key_that_cannot_be_read(tmp_path, content):
    (tmp_path / "key.json").write_text(content)
    with pytest.raises(ReferenceCacheError, match=r"delete|another run"):
        ReferenceCache(tmp_path, KEY)


def test_what_a_run_requires(tmp_path):
    cache = ReferenceCache(tmp_path, KEY)
    cache.write(0, shard())
    cache.require(2)
    with pytest.raises(ReferenceCacheError, match=r"holds the first 2 of the run's 3 steps \(1 of 2 files are missing"):
        cache.require(3)
    short = [column[:4] for column in vars(shard()).values() if column is not None]
    cache.write(1, Shard(*short))  # an older version's last one
    cache.require(3)
    with pytest.raises(ReferenceCacheError, match="holds the first 3 of the run's 4 steps"):
        cache.require(4)
    cache.path(0).write_bytes(cache.path(0).read_bytes()[:-40])
    with pytest.raises(ReferenceCacheError, match=r"shard_000000\.arrow is damaged"):
        cache.require(2)
    with pytest.raises(ReferenceCacheError, match="holds no cache; make it with --cache_reference"):
        ReferenceCache(tmp_path / "none", KEY, make=False)
    assert not (tmp_path / "none").exists()


def batch_of(step: int, positions: slice):
    """A micro-batch whose samples are those of `shard()`."""
    table = type("Table", (), {"manifest": type("M", (), {"crops": 1}), "labels": np.zeros(8, np.int64)})
    table.__len__ = lambda self: 8
    table.take = lambda self, indices, crops: (np.zeros((len(indices), 1), np.int64), np.zeros(len(indices), np.int64))
    steps = Steps(
        table(), BatchPlan(4, 0, 0.0, 9, contrastive=False), positions.start, [positions.stop - positions.start]
    )
    (batch,) = steps[step]
    batch.sample_indices_B = torch.arange(4 * (step % 2), 4 * (step % 2) + 4)[positions]
    return batch


def test_rows_are_found_by_step_and_place_and_checked_by_sample(tmp_path):
    cache = ReferenceCache(tmp_path, KEY)
    cache.write(0, shard())
    reference = CachedReference(cache)
    found = reference(batch_of(1, slice(1, 3)), ())
    assert found.tolist() == [-5.0, -6.0, -105.0, -106.0]  # [positive, negative]
    strange = batch_of(1, slice(1, 3))
    strange.sample_indices_B = torch.tensor([5, 7])
    with pytest.raises(ReferenceCacheError, match="holds other samples at step 2: delete it"):
        reference(strange, ())


def test_a_shard_that_ends_before_the_run_says_so(tmp_path):
    cache = ReferenceCache(tmp_path, KEY)
    cache.write(0, Shard(*(column[:4] for column in vars(shard()).values() if column is not None)))
    reference = CachedReference(cache)
    assert reference(batch_of(0, slice(1, 3)), ()).tolist() == [-1.0, -2.0, -101.0, -102.0]
    with pytest.raises(ReferenceCacheError, match=r"ends before step 2: delete it and .* --cache_reference"):
        reference(batch_of(1, slice(1, 3)), ())


def test_a_missing_shard_ends_the_wait_at_the_limit_and_names_producers(tmp_path):
    cache = ReferenceCache(tmp_path, KEY)
    asked = []

    def alone(step: int, missing: bool, late: bool) -> tuple[bool, bool]:
        asked.append((step, missing, late))
        return missing, late

    reference = CachedReference(cache, 0.5, reports=True, agree=alone)
    started = time.monotonic()
    with pytest.raises(ReferenceCacheError, match=r"step 3 needs .*shard_000001.* no producer has reported"):
        reference(batch_of(2, slice(0, 4)), ())
    assert 0.5 <= time.monotonic() - started < 5
    assert set(asked[:-1]) == {(2, True, False)} and asked[-1] == (2, True, True)
    assert cache.trainer() == (2, False)  # producers see how far training has come
    cache.note_producer(1, "a40-7", 5)
    with pytest.raises(ReferenceCacheError, match=r"producer 1 on a40-7 at shard 5, last report [01] s ago"):
        reference(batch_of(2, slice(0, 4)), ())
    with pytest.raises(ReferenceCacheError, match="which is missing: compute it with --cache_reference"):
        CachedReference(cache)(batch_of(2, slice(0, 4)), ())


def producer(rank: int, of: int) -> Ranks:
    return Ranks(rank, 0, of, 1, 0, "a40", "cpu", "alone")


@pytest.mark.parametrize("earlier", [False, True])
def test_producers_of_a_run_that_ended_early_end_too(tmp_path, capsys, earlier):
    """A mark that an earlier, shorter run has left does not count, until the trainers have begun."""
    cache = ReferenceCache(tmp_path, KEY)
    if earlier:
        cache.note_finished(0)
    trainer = CachedReference(cache, 1.0, reports=True)
    threading.Timer(0.5, cache.note_trainer, (0,)).start()
    threading.Timer(2.5, trainer.finished, (1,)).start()
    started = time.monotonic()
    fill_cache(cache, None, None, 8, producer(1, 2), ahead_steps=1)
    assert time.monotonic() - started > 2
    assert "the run has ended after step 1; producer 1 ends too" in capsys.readouterr().err


def test_a_producer_that_comes_after_the_end_waits_no_longer_than_for_a_shard(tmp_path, capsys):
    cache = ReferenceCache(tmp_path, KEY)
    cache.note_finished(0)
    fill_cache(cache, None, None, 8, producer(1, 2), ahead_steps=1, wait_seconds=1.5)
    assert "the run has ended after step 0; producer 1 ends too" in capsys.readouterr().err


def test_a_cache_that_is_there_keeps_its_steps_a_file(tmp_path):
    """It was begun by a version with another default, or for a table."""
    assert _stored_shard_steps(tmp_path) is None
    ReferenceCache(tmp_path, KEY)
    assert _stored_shard_steps(tmp_path) == 2
    for odd in ("[]", "{}", '{"shard_steps": "8"}', '{"shard_steps": 0}', "{"):
        (tmp_path / "key.json").write_text(odd)
        assert _stored_shard_steps(tmp_path) is None


def test_producers_that_would_idle_are_told_the_setting(tmp_path, capsys):
    cache = ReferenceCache(tmp_path, KEY)
    fill_cache(cache, None, None, 0, producer(0, 4), ahead_steps=4)
    line = "3 of 4 producers work at a time: reference.ahead_steps=4 holds no more files of 2 steps; set it to 6"
    assert line in capsys.readouterr().err


def test_a_shard_that_comes_while_waiting_is_taken(tmp_path):
    cache = ReferenceCache(tmp_path, KEY)
    writer = threading.Timer(0.4, cache.write, (1, shard()))
    writer.start()
    found = CachedReference(cache, 30.0)(batch_of(2, slice(0, 4)), ())
    writer.join()
    assert found.tolist() == [-0.0, -1.0, -2.0, -3.0, -100.0, -101.0, -102.0, -103.0]


def test_no_rank_goes_on_before_all_see_the_shard(tmp_path):
    """Another rank's file system may show it later; and where another has waited too long, all give up."""
    cache = ReferenceCache(tmp_path, KEY)
    cache.write(1, shard())
    answers = [(True, False), (True, False), (False, False)]
    reference = CachedReference(cache, 30.0, agree=lambda *_: answers.pop(0))
    assert reference(batch_of(2, slice(0, 4)), ()).tolist()[:4] == [-0.0, -1.0, -2.0, -3.0]
    assert answers == []
    with pytest.raises(ReferenceCacheError, match=r"step 3 needs .*shard_000001"):
        CachedReference(cache, 30.0, agree=lambda *_: (True, True))(batch_of(2, slice(0, 4)), ())


def test_the_key_is_blind_to_beta_lambda_loss_and_rate_and_sees_the_rest(tmp_path):
    table = digits_table(tmp_path)
    weights = {"a": torch.ones(2, 3), "b": torch.zeros(1)}

    def key(*overrides, weights=weights, precision="fp32"):
        return cache_key(load_recipe("digits", list(overrides)), table, state_hash(weights), precision)

    usual = key()
    for override in (
        "loss.beta=3",
        "loss.lambda=7",
        "loss.name=dpo",
        "optimizer.learning_rate=1",
        "batch.micro_size=2",
    ):
        assert key(override) == usual
    different = [key("seed=1"), key("batch.global_size=64"), key("loss.condition_mask_probability=0.2"),
                 key("reference.shard_steps=3"), key("model.overrides={n_layer: 1}"), key(precision="bf16"),
                 key(weights={"a": torch.ones(2, 3), "b": torch.ones(1)})]  # fmt: skip
    assert all(other != usual for other in different)
    run = load_recipe("digits", ["loss.name=ddo", "data.generated=drawn"])
    drawn = cache_key(run, table, state_hash(weights), "fp32", GeneratedCodes(table, table.labels))
    online = key("loss.name=ddo", "data.generated=online")
    assert online == usual | {"generated": "online", "shard_steps": 1}
    assert drawn == usual | {"generated": table.manifest.content_hash()}  # wherever the folder is
    for theirs, ours in ((online, usual), (usual, online), (drawn, online)):
        folder = tmp_path / f"{theirs.get('generated')}_{ours.get('generated')}"
        ReferenceCache(folder, theirs)
        with pytest.raises(ReferenceCacheError, match=r"belongs to another run: (generated|shard_steps)"):
            ReferenceCache(folder, ours)
    assert usual["global_size"] == 32


def test_the_hash_of_weights_sees_names_shapes_and_values_not_order_or_dtype():
    state = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2)}
    assert state_hash(dict(reversed(state.items()))) == state_hash(state)
    assert state_hash({name: tensor.half() for name, tensor in state.items()}) == state_hash(state)
    assert state_hash(state | {"a": state["a"].view(3, 2)}) != state_hash(state)
    assert state_hash({"c": state["a"], "b": state["b"]}) != state_hash(state)
    assert state_hash(state | {"b": torch.tensor([1.0, 2.0])}) != state_hash(state)
