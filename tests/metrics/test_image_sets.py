"""Archives and folders of images that the evaluation reads or refuses."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cca_ds.metrics.image_sets import ImagesError, open_images, read_statistics
from tests.support.evaluate_run import run


def test_archives_are_streamed_from_any_start(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (11, 4, 5, 3), dtype=np.uint8)
    np.savez(tmp_path / "plain.npz", pixels)
    np.savez_compressed(tmp_path / "packed.npz", pixels)
    for name in ("plain", "packed"):
        images = open_images(tmp_path / f"{name}.npz")
        assert (images.count, images.shape) == (11, (4, 5, 3))
        batches = list(images.batches(3, 10, 3))
        assert [len(batch) for batch in batches] == [3, 3, 1]
        np.testing.assert_array_equal(np.concatenate(batches), pixels[3:10])


def test_folder_of_samples_has_the_order_of_its_archive(tmp_path):
    """As sample.py writes it: images by class and index, its settings, and a grid, which is not a sample."""
    (tmp_path / "sampling.json").write_text(json.dumps({"guidance_scale": 0.0, "seed": 3}))
    Image.new("RGB", (50, 50)).save(tmp_path / "grid.png")
    for index in range(6):
        (tmp_path / "images" / f"{index % 2:04d}").mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), index).save(tmp_path / "images" / f"{index % 2:04d}" / f"{index:06d}.png")
    images = open_images(tmp_path)
    assert np.concatenate(list(images.batches(0, 6, 4)))[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert images.labels_N.tolist() == [0, 1, 0, 1, 0, 1]


def test_folder_hash_follows_names_and_pixels(tmp_path):
    for name in ("a.png", "b.png"):
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / name)
    before = open_images(tmp_path).sha256()
    assert open_images(tmp_path).sha256() == before
    (tmp_path / "b.png").rename(tmp_path / "c.png")
    renamed = open_images(tmp_path).sha256()
    Image.fromarray(np.ones((4, 4, 3), np.uint8)).save(tmp_path / "c.png")
    assert len({before, renamed, open_images(tmp_path).sha256()}) == 3


def write_bad_input(kind: str, folder: Path) -> Path:
    folder.mkdir()
    path = folder / "images.npz"
    pixels = np.zeros((3, 8, 8, 3), np.uint8)
    if kind == "missing":
        return folder / "missing"
    if kind == "empty folder":
        return folder
    if kind == "mixed sizes":
        for side in (8, 9):
            Image.fromarray(np.zeros((side, 8, 3), np.uint8)).save(folder / f"{side}.png")
        return folder
    if kind == "transparent":
        Image.fromarray(np.zeros((8, 8, 4), np.uint8)).save(folder / "a.png")
        return folder
    if kind == "not an image":
        (folder / "a.png").write_text("text")
        return folder
    if kind == "cut picture":
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / "a.png")
        shutil.copy(folder / "a.png", folder / "b.png")
        (folder / "a.png").write_bytes((folder / "a.png").read_bytes()[:90])
        return folder
    if kind == "text":
        path.write_text("not an archive")
    arrays = {"dtype": pixels.astype(np.float32), "channels first": pixels.transpose(0, 3, 1, 2), "none": pixels[:0],
              "other digits": np.zeros((3, 9, 9, 3), np.uint8), "one": pixels[:1]}  # fmt: skip
    if kind in arrays:
        np.savez(path, arrays[kind])
    if kind == "other name":
        np.savez(path, images=pixels)
    if kind == "labels":
        np.savez(path, pixels, np.zeros(2))
    if kind == "pickled":
        np.savez(path, np.array([{}], dtype=object))
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "no such file"),
        ("empty folder", "no image in this folder"),
        ("mixed sizes", "mixed sizes, 8.png is 8 x 8 and 9.png is 8 x 9"),
        ("transparent", "mode RGBA"),
        ("not an image", "not an image"),
        ("cut picture", "a.png"),
        ("text", "not an .npz archive"),
        ("dtype", "arr_0 is float32; save images as uint8"),
        ("channels first", "channels last"),
        ("none", "arr_0 holds no image"),
        ("other name", "no arr_0"),
        ("labels", "2,) labels in arr_1 for 3 images"),
        ("pickled", "uint8"),
        ("other digits", "the digits are 8 x 8"),
        ("one", "at least 2"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(kind, message, tmp_path, capsys):
    path = write_bad_input(kind, tmp_path / "input")
    code, out, error = run(capsys, path, "--output", tmp_path / "scores.json")
    assert (code, out) == (2, "")
    lines = [line for line in error.splitlines() if line.startswith("evaluate: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "scores.json").exists()


def test_statistics_of_the_wrong_shape_are_refused(tmp_path):
    np.savez(tmp_path / "bad.npz", mu=np.zeros(4), sigma=np.zeros((3, 3)))
    with pytest.raises(ImagesError, match=r"\(4,\) with a covariance of \(3, 3\)"):
        read_statistics(tmp_path / "bad.npz")
    np.savez(tmp_path / "images.npz", np.zeros((2, 4, 4, 3), np.uint8))
    assert read_statistics(tmp_path / "images.npz") is None
