"""Metrics against the ADM evaluator's recorded numbers, against independent rewrites, and by hand."""

import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
from scipy import linalg

from cca_ds.metrics import (
    FeatureStatistics,
    class_accuracy,
    digits_classifier,
    feature_statistics,
    frechet_distance,
    inception_score,
    precision_recall,
)
from cca_ds.metrics.frechet import SingularCovarianceWarning, frechet_distance_of_statistics


@pytest.fixture(scope="module")
def recorded(golden):
    with np.load(golden / "metrics.npz") as arrays:
        return dict(arrays)


def gaussian_features(seed: int, count: int, width: int, decades: float = 2.0) -> np.ndarray:
    """Correlated features whose variances span 10 ** (2 * decades)."""
    random = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(random.normal(size=(width, width)))
    return random.normal(size=(count, width)) * np.logspace(0, -decades, width) @ rotation + random.normal(size=width)


def two_overlapping_sets(references: int, samples: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """References, and samples spread 1.3 times as wide around the same mean."""
    pool = gaussian_features(1, references + samples, width, 1)
    return pool[:references], pool.mean(0) + 1.3 * (pool[references:] - pool.mean(0))


def distance_by_sqrtm(a: FeatureStatistics, b: FeatureStatistics) -> float:
    root = linalg.sqrtm(a.covariance_DD @ b.covariance_DD).real
    return float(((a.mean_D - b.mean_D) ** 2).sum() + np.trace(a.covariance_DD + b.covariance_DD - 2 * root))


# Frechet distance


def test_frechet_distance_equals_the_recorded_one(recorded):
    fid = frechet_distance(recorded["ref_features"], recorded["sample_features"])
    assert fid == pytest.approx(float(recorded["fid"]), abs=1e-6)


def test_frechet_distance_by_hand():
    """Diagonal covariances 4, 1 and 9, 4, means 2 apart: 4 + 5 + 13 - 2 (6 + 2) = 6."""
    a = FeatureStatistics(np.array([0.0, 1.0]), np.diag([4.0, 1.0]))
    b = FeatureStatistics(np.array([2.0, 1.0]), np.diag([9.0, 4.0]))
    assert frechet_distance_of_statistics(a, b) == pytest.approx(6.0, abs=1e-12)


@pytest.mark.parametrize("decades", [0.5, 2.0, 3.0])
@pytest.mark.parametrize("width", [1, 7, 200])
def test_frechet_distance_equals_sqrtm(width, decades):
    a = feature_statistics(gaussian_features(1, 3 * width + 5, width, decades))
    b = feature_statistics(gaussian_features(2, 4 * width + 9, width, decades))
    assert frechet_distance_of_statistics(a, b) == pytest.approx(distance_by_sqrtm(a, b), rel=1e-6)


def test_frechet_distance_is_faster_than_sqrtm():
    a, b = (feature_statistics(gaussian_features(seed, 1200, 400)) for seed in (1, 2))
    seconds = {frechet_distance_of_statistics: [], distance_by_sqrtm: []}
    for _ in range(3):
        for function, times in seconds.items():
            start = time.perf_counter()
            function(a, b)
            times.append(time.perf_counter() - start)
    assert min(seconds[frechet_distance_of_statistics]) < min(seconds[distance_by_sqrtm])


def test_frechet_distance_of_a_set_to_itself_is_zero_and_it_is_symmetric():
    a, b = gaussian_features(1, 300, 20), gaussian_features(2, 200, 20)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)


def test_singular_covariance_warns_and_is_exact():
    """Fewer images than features: the root's trace is the nuclear norm of the centred sets' product."""
    a, b = gaussian_features(1, 12, 30), gaussian_features(2, 20, 30)
    with pytest.warns(SingularCovarianceWarning, match="ranks 11 and 19 of 30"):
        distance = frechet_distance(a, b)
    centred_a, centred_b = a - a.mean(0), b - b.mean(0)
    root = np.linalg.svd(centred_a @ centred_b.T, compute_uv=False).sum() / np.sqrt(11 * 19)
    traces = (centred_a**2).sum() / 11 + (centred_b**2).sum() / 19
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + traces - 2 * root
    assert distance == pytest.approx(expected, rel=1e-9)


def test_singular_covariance_by_hand():
    """A unit that never fires: diagonals 4, 0 and 9, 1 give 4 + 10 - 2 * 6 = 2; constant sets, 8."""
    zero = np.zeros(2)
    with pytest.warns(SingularCovarianceWarning):
        one_dead = frechet_distance_of_statistics(
            FeatureStatistics(zero, np.diag([4.0, 0.0])), FeatureStatistics(zero, np.diag([9.0, 1.0]))
        )
    assert one_dead == pytest.approx(2.0, abs=1e-12)
    with pytest.warns(SingularCovarianceWarning):
        assert frechet_distance(np.ones((5, 2)), np.full((4, 2), 3.0)) == pytest.approx(8.0)


def test_full_rank_covariance_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frechet_distance(gaussian_features(1, 60, 30), gaussian_features(2, 60, 30))


@pytest.mark.parametrize(
    ("features", "message"),
    [(np.ones((1, 4)), "at least two"), (np.ones(4), "at least two"), (np.full((4, 4), np.nan), "NaN")],
)
def test_unusable_features_are_refused(features, message):
    with pytest.raises(ValueError, match=message):
        feature_statistics(features)


def test_statistics_of_different_width_are_refused():
    with pytest.raises(ValueError, match="4 and 5 features"):
        frechet_distance(np.random.rand(9, 4), np.random.rand(9, 5))


# inception score


def test_inception_score_equals_the_recorded_one(recorded):
    score = inception_score(recorded["probs"], int(recorded["is_split_size"]))
    assert score == pytest.approx(float(recorded["inception_score"]), abs=1e-6)
    assert inception_score(recorded["probs"]) == score  # splits of 5,000 are the default


def test_inception_score_by_hand():
    """Sure and balanced over C classes gives C, undecided gives 1; zeros are no NaN; splits are averaged."""
    sure = np.eye(4)[np.arange(8) % 4]
    assert inception_score(sure) == pytest.approx(4.0)
    assert inception_score(np.full((8, 4), 0.25)) == pytest.approx(1.0)
    # the first split sees classes 0 to 3, the second, shorter, classes 0 and 1: (4 + 2) / 2
    assert inception_score(np.concatenate([sure[:4], sure[:2]]), split_size=4) == pytest.approx(3.0)
    # p = (0.9, 0.1), (0.5, 0.5): marginal (0.7, 0.3)
    divergence = (0.9 * np.log(0.9 / 0.7) + 0.1 * np.log(0.1 / 0.3) + 0.5 * np.log(0.5 / 0.7 * 0.5 / 0.3)) / 2
    assert inception_score(np.array([[0.9, 0.1], [0.5, 0.5]])) == pytest.approx(np.exp(divergence))


def test_logits_are_refused_as_probabilities():
    with pytest.raises(ValueError, match="softmax"):
        inception_score(np.random.default_rng(0).normal(size=(5, 3)))
    with pytest.raises(ValueError, match="non-empty"):
        inception_score(np.zeros((0, 3)))


# precision and recall


def test_precision_and_recall_equal_the_recorded_ones(recorded, device):
    result = precision_recall(
        recorded["ref_features"], recorded["sample_features"], int(recorded["pr_neighbourhood"]), device=device
    )
    assert result.precision == pytest.approx(float(recorded["precision"]), abs=1e-6)
    assert result.recall == pytest.approx(float(recorded["recall"]), abs=1e-6)


def test_precision_and_recall_by_hand():
    """References 0 1 2 3 reach 3, 2, 2, 3 to their third neighbour; of samples 2.5, 5.5, 40, 41 two are in.

    The samples reach 38.5, 35.5, 37.5, 38.5, which takes in every reference.
    """
    reference, sample = np.array([[0.0], [1], [2], [3]]), np.array([[2.5], [5.5], [40], [41]])
    assert precision_recall(reference, sample) == (0.5, 1.0)


@pytest.mark.parametrize("block", [1, 3, 7, 64, 1000])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_precision_and_recall_equal_all_distances_at_once(block, dtype):
    reference, sample = two_overlapping_sets(90, 80, 6)
    result = precision_recall(reference.astype(dtype), sample.astype(dtype), neighbours=2, block=block)

    def distances(a, b):
        return np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))

    reach_reference = np.sort(distances(reference, reference), axis=1)[:, 2]
    reach_sample = np.sort(distances(sample, sample), axis=1)[:, 2]
    across = distances(reference, sample)
    assert result.precision == (across <= reach_reference[:, None]).any(0).mean()
    assert result.recall == (across <= reach_sample[None]).any(1).mean()
    assert 0.05 < result.precision < 0.999


def test_distances_far_from_the_origin_keep_their_digits():
    """Features with a large common offset give the same numbers in float32 as in float64 without it."""
    reference, sample = two_overlapping_sets(200, 250, 8)
    far = precision_recall((reference + 256).astype(np.float32), (sample + 256).astype(np.float32))
    assert far == precision_recall(reference, sample)
    assert 0.05 < far.precision < 0.999


def test_blocks_bound_the_memory():
    """12,000 against 12,000 would be 576 MB a distance matrix; blocks of 1,500 are 9 MB."""
    program = """
import resource, numpy as np, torch
from cca_ds.metrics import precision_recall
torch.set_num_threads(1)
a, b = (np.random.default_rng(s).normal(size=(12000, 16)).astype("float32") for s in (0, 1))
precision_recall(a[:400], b[:400], block=100)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
precision_recall(a, b, block=1500)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    # ru_maxrss is in KiB on Linux
    assert float(process.stdout) < 100


def test_too_few_vectors_and_different_widths_are_refused():
    with pytest.raises(ValueError, match="more than 3"):
        precision_recall(np.random.rand(3, 4), np.random.rand(9, 4))
    with pytest.raises(ValueError, match=r"\(9, 4\) and \(9, 5\)"):
        precision_recall(np.random.rand(9, 4), np.random.rand(9, 5))


# digits


def test_digits_classifier_is_accurate_and_deterministic():
    classifier = digits_classifier()
    codes, labels = classifier.reference_codes, classifier.reference_labels
    assert codes.shape == (1797, 64)
    probabilities = classifier.probabilities(codes)
    assert class_accuracy(probabilities, labels) > 0.99
    assert digits_classifier() is classifier
    again = type(classifier)()
    np.testing.assert_array_equal(again.features(codes[:50]), classifier.features(codes[:50]))
    np.testing.assert_array_equal(
        classifier.features(codes[:5].reshape(5, 8, 8)), classifier.features(codes[:5].astype(int))
    )


def test_digits_probabilities_are_a_softmax_of_a_linear_layer_over_the_features():
    """Differences of log-probabilities are affine in the features; no feature is dead."""
    classifier = digits_classifier()
    features = classifier.features(classifier.reference_codes)
    logp = np.log(classifier.probabilities(classifier.reference_codes))
    differences = logp[:, 1:] - logp[:, :1]
    inputs = np.column_stack([features, np.ones(len(features))])
    layer = np.linalg.lstsq(inputs, differences)[0]
    np.testing.assert_allclose(inputs @ layer, differences, atol=1e-6)
    assert np.linalg.matrix_rank(np.cov(features.T)) == 64


def test_digits_metrics_separate_digits_from_noise():
    classifier = digits_classifier()
    codes = np.random.default_rng(0).permutation(classifier.reference_codes)
    noise = np.random.default_rng(0).integers(0, 17, size=(900, 64))
    halves = frechet_distance(classifier.features(codes[:900]), classifier.features(codes[897:]))
    other = frechet_distance(classifier.features(codes[:900]), classifier.features(noise))
    assert halves < 0.3 < 5 < other


@pytest.mark.parametrize(
    ("images", "message"),
    [(np.zeros((2, 63), dtype=int), "integers"), (np.zeros((2, 64)), "integers"), (np.full((2, 64), 17), "0 to 16")],
)
def test_other_arrays_than_digits_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        digits_classifier().features(images)


def test_class_accuracy_by_hand():
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])
    assert class_accuracy(probabilities, np.array([0, 1, 1])) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="one row each"):
        class_accuracy(probabilities, np.array([0, 1]))
