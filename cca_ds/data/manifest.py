"""What a table of codes says about itself: `manifest.json`, the only source of its counts and settings.

Training reads images, classes, crops and sequence length from here, never from a constant or a folder's name.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1
IMAGENET_IMAGES = 1_281_167  # the paper's training set
DIGITS_IMAGES = 1_797


class CodesError(ValueError):
    """A table of codes, or what is to become one, cannot be used: one line with the value and the remedy."""


@dataclass(frozen=True)
class Shard:
    """One Arrow file of a table."""

    file: str
    images: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Counts, tokenizer and crops of a table. `label_histogram[c]` is the number of images of class c."""

    images: int
    classes: int
    crops: int
    sequence_length: int
    vocab_size: int
    family: str
    tokenizer: str
    tokenizer_hash: str
    crop_settings: dict = field(default_factory=dict)
    label_histogram: tuple[int, ...] = ()
    class_names: tuple[str, ...] = ()
    source_hash: str = ""
    skipped_images: int = 0
    converted: dict = field(
        default_factory=dict
    )  # images by the mode they were converted from, e.g. {"CMYK": 3}
    package_version: str = ""
    shards: tuple[Shard, ...] = ()
    format_version: int = FORMAT_VERSION

    @property
    def code_shape(self) -> tuple[int, ...]:
        """Shape of one record's codes as stored: [L], or [crops, L] when there are several crops."""
        return (self.sequence_length,) if self.crops == 1 else (self.crops, self.sequence_length)

    def to_json(self) -> str:
        """The text of `manifest.json`."""
        return json.dumps(asdict(self), indent=1) + "\n"


def read_manifest(folder: str | Path) -> Manifest:
    """Read `manifest.json` of a table. Raises CodesError when it is missing, damaged or inconsistent."""
    path = Path(folder) / MANIFEST_NAME
    if not path.is_file():
        raise CodesError(
            f"{folder} holds no table of codes ({MANIFEST_NAME} is missing): make one with cca_ds/encode.py"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        values["shards"] = tuple(Shard(**shard) for shard in values["shards"])
        for name in ("label_histogram", "class_names"):
            values[name] = tuple(values[name])
        manifest = Manifest(**{f.name: values[f.name] for f in fields(Manifest)})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CodesError(
            f"{path} is not a manifest of this program ({error!r}): encode the images again"
        ) from error
    if manifest.format_version != FORMAT_VERSION:
        raise CodesError(
            f"{path} has format {manifest.format_version}, this program reads {FORMAT_VERSION}: encode again"
        )
    stored = sum(shard.images for shard in manifest.shards)
    if (
        not manifest.images == stored == sum(manifest.label_histogram)
        or len(manifest.label_histogram) != manifest.classes
    ):
        raise CodesError(
            f"{path} contradicts itself: {manifest.images} images, {stored} in its shards, "
            f"{sum(manifest.label_histogram)} labels of {manifest.classes} classes; encode the images again"
        )
    return manifest


def expected_images(codes: str) -> tuple[int, str]:
    """Images of the recipe's `data.codes`, there already or not, and where the number is from. Raises CodesError."""
    if codes == "digits":
        return DIGITS_IMAGES, "scikit-learn's digits"
    folder = Path(codes).expanduser()
    if (folder / MANIFEST_NAME).is_file():
        return read_manifest(folder).images, f"the manifest of {codes}"
    return IMAGENET_IMAGES, f"the paper's ImageNet; {codes} is not there yet"


def package_version() -> str:
    """Version of this package, as the manifest records it."""
    from cca_ds import __version__

    return __version__


def histogram(labels: Sequence[int], classes: int) -> tuple[int, ...]:
    """Images per class, [classes]."""
    import numpy as np

    return tuple(int(count) for count in np.bincount(labels, minlength=classes))
