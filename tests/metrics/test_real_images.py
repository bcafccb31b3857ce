"""`evaluate --make_reference`: one's own real images, read and cropped as encode does."""

import json

import numpy as np
import pytest
from PIL import Image

from cca_ds import evaluate
from cca_ds.data.crops import CropSettings, crop_function
from cca_ds.metrics.extraction import digits_features
from cca_ds.metrics.frechet import feature_statistics


@pytest.fixture
def photos(tmp_path):
    """Forty grey pictures of larger sides in two classes, one of them damaged."""
    draw = np.random.default_rng(0)
    for number in range(40):
        path = tmp_path / "photos" / "ab"[number % 2] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (20, 24 + number), dtype=np.uint8)).save(path)
    (tmp_path / "photos" / "a" / "00.png").write_bytes(b"no picture")
    return tmp_path / "photos"


def call(capsys, *arguments):
    code = evaluate.main([str(argument) for argument in arguments])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_statistics_of_all_and_the_images_themselves(photos, tmp_path, capsys):
    output = tmp_path / "real.npz"
    code, line, _ = call(capsys, "--make_reference", photos, "--recipe", "digits", "--output", output)
    assert (
        code == 0
        and "statistics of 39 images of 8 pixels, 39 of them kept; 1 left out, which cannot be read (a/00" in line
    )
    assert "; 39 images are no more than the 64 features" in line
    found = np.load(output)
    crop = crop_function(CropSettings("none", 8, mode="L"))
    files = [path for path in sorted(photos.rglob("*.png"), key=lambda p: (p.parent.name, p.name))][1:]
    expected = np.stack([crop(Image.open(path), 0)[0] for path in files])
    assert np.array_equal(found["arr_0"], expected)
    assert found["arr_1"].tolist() == [0] * 19 + [1] * 20
    levels = np.rint(expected[..., 0].astype(float) * 16 / 255).astype(int)
    statistics = feature_statistics(digits_features(levels).pool_ND)
    assert np.allclose(found["mu"], statistics.mean_D) and np.allclose(found["sigma"], statistics.covariance_DD)
    about = json.loads(str(found["about"]))
    assert about["images"] == 39 and about["side"] == 8 and "00.png" in about["skipped"][0]
    assert about["source"] == "photos" and str(tmp_path) not in str(found["about"])


def test_scored_against_itself_it_is_at_distance_zero(photos, tmp_path, capsys):
    output = tmp_path / "real.npz"
    assert call(capsys, "--make_reference", photos, "--recipe", "digits", "--output", output)[0] == 0
    code, line, _ = call(capsys, output, "--reference", output, "--recipe", "digits", "--format", "json")
    metrics = json.loads(line)["metrics"]
    assert code == 0 and abs(metrics["fid"]) < 1e-6 and metrics["precision"] == metrics["recall"] == 1.0


def test_a_reference_of_another_network_is_refused_and_of_another_side_noted(photos, tmp_path, capsys):
    output = tmp_path / "real.npz"
    assert call(capsys, "--make_reference", photos, "--recipe", "digits", "--output", output)[0] == 0
    arrays = dict(np.load(output))
    about = json.loads(str(arrays.pop("about")))

    def scored(about):
        np.savez(tmp_path / "other.npz", about=np.array(json.dumps(about)), **arrays)
        return call(capsys, output, "--reference", tmp_path / "other.npz", "--recipe", "digits", "--format", "json")

    code, _, error = scored(about | {"protocol": {"network_identity": "another"}})
    assert code == 2 and "its statistics are of another FID network (another)" in error
    code, line, _ = scored(about | {"side": 16})
    assert code == 0 and "the reference has images of 16 pixels, the samples of 8" in str(json.loads(line)["notes"])
    assert "pixels" not in str(json.loads(scored(about)[1])["notes"])
    for odd in ([5], "text", {"protocol": 5}):
        code, _, error = scored(odd)
        assert code == 2 and "its record `about` cannot be read" in error


def test_images_of_which_none_can_be_read(tmp_path, capsys):
    for name in "abc":
        (tmp_path / "photos" / "x").mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / "x" / f"{name}.png").write_bytes(b"no picture")
    flags = ("--recipe", "digits", "--output", tmp_path / "x.npz")
    code, _, error = call(capsys, "--make_reference", tmp_path / "photos", *flags)
    assert code == 2 and "none of the 3 images can be read" in error.splitlines()[-1]


def test_scores_of_samples_in_a_run_go_into_its_folder(photos, tmp_path, capsys):
    output = tmp_path / "real.npz"
    assert call(capsys, "--make_reference", photos, "--recipe", "digits", "--output", output)[0] == 0
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("name: mine\n")
    (run / "samples.npz").write_bytes(output.read_bytes())
    assert call(capsys, run / "samples.npz", "--recipe", "digits")[0] == 0
    assert json.loads((run / "scores.json").read_text())["metrics"]["fid"] is not None
    assert call(capsys, "--report", run)[0] == 0 and "scores" in (run / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--make_reference", "none", "--output", "x.npz"], "none"),
        (["--make_reference", "photos"], "--make_reference needs --output FILE.npz"),
        (["--make_reference", "photos", "s.npz", "--output", "x.npz"], "give the samples to score, or"),
        (["--make_reference", "photos", "--output", "x.npz", "--resize", "0"], "--resize"),
        (["--make_reference", "photos", "--recipe", "digits", "--output", "x.json"], "give a name that ends in .npz"),
        (
            ["--make_reference", "photos", "--recipe", "digits", "--output", "photos/a/00.png/x.npz"],
            "--output photos/a",
        ),
        (
            ["--make_reference", "photos", "--output", "x.npz", "--reference", "r.npz"],
            "--reference has no meaning with",
        ),
        (["samples.npz", "--resize", "9"], "--resize has no meaning with samples to score"),
        (["--report", "run", "--output", "x.json"], "--output has no meaning with --report"),
        (["--make_reference", "photos", "--recipe", "llamagen-b", "--output", "x.npz"], "inception_weights"),
    ],
)
def test_bad_input(arguments, message, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        code, _, error = call(capsys, *arguments)
    except SystemExit as stopped:
        code, error = stopped.code, capsys.readouterr().err
    assert code == 2 and message in error.strip().splitlines()[-1]
    assert not (tmp_path / "x.npz").exists()
