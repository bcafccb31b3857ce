"""The first digits as a folder of images, the command that encodes them, and the expected codes."""

import functools
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from cca_ds import encode
from tests.dist.runs import scratch

ROOT = Path(__file__).parents[2]
IMAGES = 60


@functools.cache
def digits_folder() -> Path:
    """The first digits as PNG files in ImageNet's layout."""
    folder = scratch() / "digits" / "train"
    digits = load_digits()
    for number, (image, label) in enumerate(zip(digits.images[:IMAGES], digits.target, strict=False)):
        (folder / f"class{label}").mkdir(parents=True, exist_ok=True)
        grey = np.round(image * 255 / 16).astype(np.uint8)
        Image.fromarray(grey).save(folder / f"class{label}" / f"{number:04d}.png")
    return folder


def digits_codes() -> tuple[np.ndarray, np.ndarray]:
    """Codes [N, 64] and labels [N] of the digits, in the folder's order: by class, then by number."""
    digits = load_digits()
    order = np.argsort(digits.target[:IMAGES], kind="stable")
    return digits.images[:IMAGES].reshape(IMAGES, 64).astype(int)[order], digits.target[:IMAGES][order]


def run(*arguments, device="cpu"):
    """Run the encode command with the digits recipe; returns its exit code."""
    return encode.main(["--recipe", "digits", "--device", device, "--threads", "2", *map(str, arguments)])


def assert_expected(table, expected):
    """Compare a whole table with (codes, labels)."""
    codes_BL, labels_B = table.take(np.arange(len(table)))
    np.testing.assert_array_equal(codes_BL, expected[0])
    np.testing.assert_array_equal(labels_B, expected[1])
    assert table.manifest.label_histogram == tuple(np.bincount(expected[1], minlength=10))
    table.check()


def contents(folder):
    """Name -> bytes of the files in a folder."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}
