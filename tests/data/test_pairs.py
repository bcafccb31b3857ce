"""Pairs depend on seed, epoch and sample, and not on the partition of the batch."""

import numpy as np
import pytest

from cca_ds.data.batches import BatchPlan, Steps
from cca_ds.data.pairs import LAMBDA_STREAM, MASK_STREAM, epoch_order, make_pairs, sample_uniforms
from tests.support.digits_table import digits_table


def pairs_of(indices, labels, **changes):
    settings = {"null_class": 10, "mask_probability": 0.0, "crops": 1, "seed": 0, "epoch": 0} | changes
    return make_pairs(np.asarray(indices), np.asarray(labels), **settings)


def test_negatives_are_the_global_batch_rolled_by_one():
    pairs = pairs_of([7, 8, 9, 5], [3, 1, 1, 2])
    assert pairs.positive_labels_K.tolist() == [3, 1, 1, 2]
    assert pairs.negative_labels_K.tolist() == [1, 1, 2, 3]
    assert pairs.positive_mask_K.tolist() == [False, True, False, False]  # pair 1 and its negative share a label
    assert not pairs.null_mask_K.any()


def test_masked_pairs_have_both_labels_null_and_depend_on_the_sample_alone():
    indices, labels = np.arange(5000), np.arange(5000) % 10
    pairs = pairs_of(indices, labels, mask_probability=0.1)
    masked = pairs.null_mask_K
    assert abs(masked.mean() - 0.1) < 0.015
    assert (pairs.positive_labels_K[masked] == 10).all() and (pairs.negative_labels_K[masked] == 10).all()
    assert pairs.positive_mask_K[masked].all()
    # negatives come from unmasked labels: no unmasked pair has the null class on either side
    assert (pairs.negative_labels_K[~masked] < 10).all()
    shuffled = np.random.default_rng(1).permutation(5000)
    again = pairs_of(indices[shuffled], labels[shuffled], mask_probability=0.1)
    assert (again.null_mask_K == masked[shuffled]).all()
    assert (pairs_of(indices, labels, mask_probability=0.1, epoch=1).null_mask_K != masked).any()
    assert (pairs_of(indices, labels, mask_probability=0.1, seed=1).null_mask_K != masked).any()


def test_the_hash_is_splitmix64():
    def mix(x):  # an independent rewrite on Python's integers
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    expected = mix(mix(mix(mix(0 ^ 3) ^ 5) ^ MASK_STREAM) ^ 1234567)
    assert sample_uniforms(3, 5, np.array([1234567]), MASK_STREAM)[0] == (expected >> 11) / 2**53


def test_streams_are_uniform_and_uncorrelated():
    indices = np.arange(20000)
    mask, lam = (sample_uniforms(0, 0, indices, stream) for stream in (MASK_STREAM, LAMBDA_STREAM))
    for draw in (mask, lam):
        assert abs(draw.mean() - 0.5) < 0.01 and abs(draw.var() - 1 / 12) < 0.002
    assert abs(np.corrcoef(mask, lam)[0, 1]) < 0.02


def test_crops_and_lambda_cover_their_ranges():
    pairs = pairs_of(np.arange(5000), np.arange(5000) % 10, crops=20)
    assert set(pairs.crops_K.tolist()) == set(range(20))
    assert 0 <= pairs.log_lambda_K.min() < 0.1 and 8.9 < pairs.log_lambda_K.max() < 9


def test_a_batch_of_one_label_is_refused_unless_the_loss_needs_no_negatives():
    with pytest.raises(ValueError, match=r"all 4 labels of the batch are 3.*loss\.name=mle"):
        pairs_of([1, 2, 3, 4], [3, 3, 3, 3])
    alone = pairs_of([1, 2, 3], [3, 3, 1], contrastive=False)  # each keeps its label, and only masked pairs are marked
    assert (alone.negative_labels_K == alone.positive_labels_K).all()
    assert (alone.positive_mask_K == alone.null_mask_K).all()


def test_epoch_order_is_a_permutation_of_its_seed_and_epoch():
    order = epoch_order(1000, seed=0, epoch=0)
    assert sorted(order) == list(range(1000))
    assert (order == epoch_order(1000, 0, 0)).all()
    assert (order != epoch_order(1000, 0, 1)).any() and (order != epoch_order(1000, 1, 0)).any()


@pytest.mark.parametrize("sizes_per_rank", [[[32]], [[8] * 4], [[16], [16]], [[5, 6], [11, 10]], [[0, 1], [16, 15]]])
def test_every_partition_of_a_batch_has_the_same_pairs(tmp_path, sizes_per_rank):
    table = digits_table(tmp_path)
    plan = BatchPlan(global_size=32, seed=3, mask_probability=0.1, null_class=10)
    whole = Steps(table, plan, 0, [32])[60][0]  # in the second epoch
    seen, first = [], 0
    for sizes in sizes_per_rank:
        seen += [batch for batch in Steps(table, plan, first, sizes)[60] if batch.weight]
        first += sum(sizes)
    for name in (
        "codes_BL",
        "positive_labels_B",
        "negative_labels_B",
        "positive_mask_B",
        "positions_B",
        "log_lambda_B",
    ):
        joined = np.concatenate([getattr(batch, name).numpy() for batch in seen])
        assert (joined == getattr(whole, name).numpy()).all(), name


def test_a_forward_without_pairs_has_weight_zero(tmp_path):
    plan = BatchPlan(global_size=32, seed=0, mask_probability=0.1, null_class=10)
    dummy, real = Steps(digits_table(tmp_path), plan, 4, [0, 3])[0]
    assert (dummy.weight, len(dummy.codes_BL)) == (0.0, 1)
    assert real.positions_B.tolist() == [4, 5, 6]


def test_fewer_images_than_a_batch_is_an_error(tmp_path):
    plan = BatchPlan(global_size=2000, seed=0, mask_probability=0.1, null_class=10)
    with pytest.raises(ValueError, match=r"1797 images, fewer than batch.global_size=2000"):
        Steps(digits_table(tmp_path), plan, 0, [2000])
