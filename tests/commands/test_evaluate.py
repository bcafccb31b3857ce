"""The evaluate command: numbers, cache, ranks, reports and errors."""

import json
import os
import subprocess
import sys
from importlib import metadata

import numpy as np
import pytest
import torch
from PIL import Image

from cca_ds.metrics import digits_classifier, evaluation, frechet_distance, inception_score, precision_recall
from cca_ds.metrics.evaluation import FeatureSource, RankGroup, find_reference
from cca_ds.metrics.extraction import INCEPTION, DigitsExtractor, Features, extract, join
from cca_ds.metrics.feature_cache import load_cached, store_cached
from cca_ds.metrics.frechet import feature_statistics
from cca_ds.metrics.image_sets import open_images
from cca_ds.metrics.inception import InceptionFID
from cca_ds.metrics.scores import Reference, order_note, reference_of, score
from tests.support.evaluate_run import run
from tests.support.two_ranks import torchrun


def digit_pixels(codes: np.ndarray) -> np.ndarray:
    """Grey levels [N, 64] as images [N, 8, 8, 3] uint8."""
    pixels = np.rint(codes.reshape(-1, 8, 8, 1) * 255 / 16).astype(np.uint8)
    return pixels.repeat(3, axis=-1)


@pytest.fixture(scope="module")
def digits():
    """600 digits in random order, with labels of which a tenth is wrong."""
    classifier, random = digits_classifier(), np.random.default_rng(0)
    order = random.permutation(1797)[:600]
    labels = classifier.reference_labels[order].copy()
    labels[:60] = (labels[:60] + 1) % 10
    return classifier.reference_codes[order], labels


@pytest.fixture
def samples(digits, tmp_path):
    codes, labels = digits
    np.savez(tmp_path / "samples.npz", digit_pixels(codes), labels)
    return tmp_path / "samples.npz"


# the numbers


def test_report_equals_the_metrics_of_the_features(samples, digits, capsys):
    codes, labels = digits
    code, out, _ = run(capsys, samples, "--recipe", "digits", "--format", "json")
    assert code == 0
    report = json.loads(out)
    classifier = digits_classifier()
    real, drawn = classifier.features(classifier.reference_codes), classifier.features(codes)
    probabilities = classifier.probabilities(codes)
    expected = precision_recall(real, drawn)
    metrics = report["metrics"]
    assert metrics["fid"] == pytest.approx(frechet_distance(real, drawn), abs=1e-5)
    assert metrics["inception_score"] == pytest.approx(inception_score(probabilities), abs=1e-5)
    assert metrics["precision"] == pytest.approx(expected.precision, abs=2e-3)
    assert metrics["recall"] == pytest.approx(expected.recall, abs=2e-3)
    assert metrics["class_accuracy"] == pytest.approx((probabilities.argmax(1) == labels).mean())
    assert 0.85 < metrics["class_accuracy"] < 0.92
    assert report["samples"]["images"] == 600
    assert report["notes"] == []


def test_report_states_protocol_sampler_and_seed(samples, capsys):
    code, out, _ = run(capsys, samples, "--format", "json", "--set", "sampling.top_k=5", "sampling.seed=7")
    report = json.loads(out)
    assert code == 0
    assert report["sampler"]["top_k"] == 5
    assert report["seed"] == 7
    assert report["sampler_origin"] == "assumed from recipe digits"
    assert report["protocol"]["neighbours"] == 3
    assert report["protocol"]["inception_score_splits_of"] == 5000
    assert "ADM" in report["protocol"]["evaluator"]
    assert report["versions"]["torch"] == metadata.version("torch")
    samples.with_suffix(".json").write_text(json.dumps({"guidance_scale": 1.5, "seed": 11}))
    report = json.loads(run(capsys, samples, "--format", "json")[1])
    assert (report["sampler"]["guidance_scale"], report["seed"]) == (1.5, 11)
    assert report["sampler_origin"] == "samples.json"


def test_line_markdown_and_files(samples, tmp_path, capsys):
    code, line, _ = run(capsys, samples, "--output", tmp_path / "out" / "scores.json")
    assert code == 0
    assert line.startswith("FID ")
    assert len(line.splitlines()) == 1
    report = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert f"FID {report['metrics']['fid']:.3f}" in line
    table = (tmp_path / "out" / "scores.md").read_text().splitlines()
    assert table[0] == "|  | FID | IS | precision | recall | class accuracy | sampled with |"
    assert table[2].startswith(f"| digits | {report['metrics']['fid']:.3f} |")
    assert {row.count("|") for row in table[:3]} == {8}
    assert table[2].endswith("| s = 0, top-k 0, top-p 1, temperature 1 |") and "top-p 1, temperature 1, against" in line
    assert not [name for name in os.listdir(tmp_path / "out") if "partial" in name]


def test_a_folder_scores_as_the_archive_does(samples, digits, tmp_path, capsys):
    codes, labels = digits
    for index, (pixels, label) in enumerate(zip(digit_pixels(codes), labels, strict=True)):
        folder = tmp_path / "folder" / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{index:04d}.png")
    of_folder = json.loads(run(capsys, tmp_path / "folder", "--format", "json")[1])["metrics"]
    of_archive = json.loads(run(capsys, samples, "--format", "json")[1])["metrics"]
    assert of_folder == pytest.approx(of_archive, abs=1e-5)


def test_scores_against_stored_statistics_equal_those_against_images():
    """Random features as the Inception network's: sFID from the spatial ones, no precision without images."""
    random = np.random.default_rng(0)

    def features(count: int, shift: float) -> Features:
        probabilities = random.dirichlet(np.ones(5), count)
        return Features(random.normal(shift, 1, (count, 12)), random.normal(2 * shift, 1, (count, 9)), probabilities)

    real, drawn = features(300, 0.0), features(200, 0.5)
    against_images = score(drawn, reference_of(real))
    stored = Reference(feature_statistics(real.pool_ND), feature_statistics(real.spatial_NS), None)
    against_statistics = score(drawn, stored)
    assert against_images.values["sfid"] == pytest.approx(frechet_distance(real.spatial_NS, drawn.spatial_NS))
    assert against_statistics.values["sfid"] == against_images.values["sfid"]
    assert against_statistics.values["fid"] == against_images.values["fid"]
    assert against_images.values["precision"] > 0
    assert against_statistics.values["precision"] is None
    assert "no precision and recall" in against_statistics.notes[0]


def test_images_in_the_order_of_classes_get_a_note():
    """Splits of 5,000 then hold few classes each, and the inception score is lower."""
    by_class, mixed = np.repeat(np.arange(100), 60), np.tile(np.arange(100), 60)
    assert "order of their classes" in order_note(by_class)[0]
    sure = np.eye(100)
    assert inception_score(sure[by_class]) < inception_score(sure[mixed]) == pytest.approx(100, rel=1e-2)
    for fine in (mixed, by_class[:5000], np.zeros(6000), None):
        assert order_note(fine) == []


def test_fewer_images_than_features_get_a_note(digits, tmp_path, capsys):
    np.savez(tmp_path / "few.npz", digit_pixels(digits[0][:40]))
    code, out, _ = run(capsys, tmp_path / "few.npz")
    assert code == 0
    assert "40 images are no more than the 64 features" in out
    assert "ranks 39 and 64 of 64" in out


# Inception recipes


def test_inception_recipe_scores_an_archive_against_a_reference_with_statistics(tmp_path, capsys):
    """A random network and a reference like ADM's: images, for precision and recall, and statistics.

    Stored are mean 0 and covariance 1, so that FID is |m|^2 + tr S + D - 2 tr S^(1/2) of the drawn features.
    """
    torch.manual_seed(0)
    torch.save(InceptionFID().state_dict(), tmp_path / "weights.pth")
    random = np.random.default_rng(0)
    np.savez(tmp_path / "drawn.npz", random.integers(0, 256, (5, 16, 16, 3), dtype=np.uint8))
    stored = {"mu": np.zeros(2048), "sigma": np.eye(2048), "mu_s": np.zeros(2023), "sigma_s": np.eye(2023)}
    real = random.integers(0, 256, (4, 16, 16, 1), dtype=np.uint8)
    np.savez(tmp_path / "real.npz", real, **stored)
    options = ["--recipe", "llamagen-l", "--inception_weights", tmp_path / "weights.pth", "--format", "json"]
    code, out, error = run(capsys, tmp_path / "drawn.npz", "--reference", tmp_path / "real.npz", *options)
    assert code == 0, error
    report = json.loads(out)
    assert report["metrics"]["sfid"] > 0
    assert report["protocol"]["published_weights"] is False
    assert report["protocol"]["pool_features"] == 2048
    assert "class_accuracy" not in report["metrics"]
    assert report["paper"]["cca"]["fid"] == 3.43
    assert report["metrics"]["precision"] is not None
    with np.load(tmp_path / "drawn.features.npz") as cached:
        assert cached["spatial"].shape == (5, 2023)
        for name, part in (("fid", "pool"), ("sfid", "spatial")):
            mean, deviations = cached[part].mean(0, dtype=np.float64), cached[part] - cached[part].mean(0)
            roots = np.linalg.svd(deviations.astype(np.float64), compute_uv=False) / 2  # of S, over n - 1 = 4
            expected = mean @ mean + (roots**2).sum() + len(mean) - 2 * roots.sum()
            assert report["metrics"][name] == pytest.approx(expected, rel=1e-5)


def test_statistics_alone_are_a_reference(tmp_path):
    np.savez(tmp_path / "stored.npz", mu=np.arange(3), sigma=np.eye(3), mu_s=np.arange(2), sigma_s=np.eye(2))
    source = FeatureSource(RankGroup(), DigitsExtractor(), batch_size=8)
    reference = find_reference(str(tmp_path / "stored.npz"), INCEPTION, source)
    assert reference.features_ND is None
    assert reference.pool.mean_D.tolist() == [0, 1, 2]
    assert reference.spatial.mean_D.tolist() == [0, 1]


def test_missing_inception_weights_and_reference_are_one_line_each(samples, tmp_path, capsys):
    code, out, error = run(capsys, samples, "--recipe", "llamagen-3b", "--reference", samples)
    assert (code, out) == (2, "")
    assert error.count("\n") == 1
    assert "https://github.com/toshas/torch-fidelity/releases" in error
    assert "sha256" in error
    torch.save(InceptionFID().state_dict(), tmp_path / "weights.pth")
    code, _, error = run(capsys, samples, "--recipe", "var-d16", "--inception_weights", tmp_path / "weights.pth")
    assert code == 2
    assert "--reference is missing" in error


# cache


def test_features_are_read_from_beside_the_images_until_these_change(samples, digits, capsys, monkeypatch):
    first = run(capsys, samples)[1]
    assert (samples.parent / "samples.features.npz").is_file()

    def forbidden(*arguments):
        raise AssertionError("computed again")

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "extract", forbidden)
        assert run(capsys, samples)[1] == first
        code, _, error = run(capsys, samples, "--no_cache")
        assert code == 1
        assert "computed again" in error
    codes, labels = digits
    np.savez(samples, digit_pixels(np.random.default_rng(1).permuted(codes, axis=1)), labels)
    assert run(capsys, samples)[1] != first


def test_a_damaged_or_foreign_cache_is_ignored(tmp_path):
    features = Features(np.ones((2, 3), np.float32), None, np.ones((2, 4), np.float32))
    store_cached(tmp_path / "cache.npz", "key", features)
    found = load_cached(tmp_path / "cache.npz", "key")
    np.testing.assert_array_equal(found.pool_ND, features.pool_ND)
    assert found.spatial_NS is None
    assert load_cached(tmp_path / "cache.npz", "other key") is None
    assert load_cached(tmp_path / "missing.npz", "key") is None
    for cut in (10, 200, 500):
        (tmp_path / "cut.npz").write_bytes((tmp_path / "cache.npz").read_bytes()[:cut])
        assert load_cached(tmp_path / "cut.npz", "key") is None
    assert sorted(os.listdir(tmp_path)) == ["cache.npz", "cut.npz"]


# images


def test_parts_of_ranks_join_to_the_whole(samples):
    """Also with more ranks than images, and a batch size that does not divide."""
    images = open_images(samples)
    extractor = DigitsExtractor()

    def part(rank: int, ranks: int, size: int) -> Features | None:
        return extract(images, extractor, size, lambda batches, total: batches, rank, ranks)

    whole = part(0, 1, 1000)
    for ranks in (2, 7, 613):
        joined = join([part(rank, ranks, 37) for rank in range(ranks)])
        np.testing.assert_array_equal(joined.pool_ND, whole.pool_ND)
        np.testing.assert_array_equal(joined.probabilities_NK, whole.probabilities_NK)


def test_unknown_recipe_keys_are_reported_together(samples, capsys):
    code, _, error = run(capsys, samples, "--set", "sampling.topk=3", "evaluation.batchsize=2")
    assert code == 2
    assert len(error.splitlines()) == 2


# command line


def test_help_answers_without_torch():
    process = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "cca_ds.evaluate", "--help"], capture_output=True, text=True
    )
    assert process.returncode == 0
    assert "--inception_weights" in process.stdout
    imported = {line.split("|")[-1].strip() for line in process.stderr.splitlines()}
    assert not imported & {"torch", "deepspeed", "numpy", "sklearn", "PIL"}


@pytest.mark.dist
def test_two_ranks_score_as_one(samples, capsys):
    alone = run(capsys, samples, "--no_cache")[1]
    printed = torchrun("-m", "cca_ds.evaluate", samples, "--no_cache", "--batch_size", 64, "--device", "cpu")
    assert alone.strip() in printed
    assert printed.count("FID ") == 1
