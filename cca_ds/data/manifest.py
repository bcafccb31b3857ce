"""The manifest of a table of codes, `manifest.json`: its counts, its tokenizer, its crops, its files.

Training reads images, classes, crops and sequence length from here, never from a constant or a folder's name.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from cca_ds.files import expand, write_atomic
from cca_ds.untrusted import decoding, read_json, regular_file

MANIFEST_NAME = "manifest.json"
CLASS_NAMES = "classes.txt"  # of a run's folder: one name a line
SKIPPED_NAME = "skipped.jsonl"  # {"index", "name", "reason"} of each image that was left out
FORMAT_VERSION = 1
IMAGENET_IMAGES = 1_281_167  # the paper's training set


class CodesError(ValueError):
    """A table of codes, or a source for one, cannot be used. The message is one line with the value and the remedy."""


@dataclass(frozen=True)
class Shard:
    """One Arrow file of a table."""

    file: str
    images: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Counts, tokenizer and crops of a table.

    Attributes:
        crops: per image, C. sequence_length: codes per crop, L.
        family: of the models that the codes are for.
        tokenizer_hash: of the tokenizer's weights; empty for codes that were imported without their tokenizer.
        crop_settings: `CropSettings.as_dict()`, or {"kind": "imported", "folders": [...]}.
        label_histogram: images per class, [classes].
        source_hash: the source's `fingerprint()`.
        converted: number of images by the mode they were converted from, e.g. {"CMYK": 3}.
        drawn: of images that a model drew: the sha256 of its weights and how it was sampled; empty for encoded images.
        shards: the Arrow files, in the order of their rows.
    """

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
    converted: dict = field(default_factory=dict)
    package_version: str = ""
    drawn: dict = field(default_factory=dict)
    shards: tuple[Shard, ...] = ()
    format_version: int = FORMAT_VERSION

    @classmethod
    def before_encoding(cls, tokenizer: str, family: str, vocab_size: int, tokenizer_hash: str) -> Manifest:
        """The manifest of a table before its images are known: every count is 0."""
        return cls(
            images=0,
            classes=0,
            crops=0,
            sequence_length=0,
            vocab_size=vocab_size,
            family=family,
            tokenizer=tokenizer,
            tokenizer_hash=tokenizer_hash,
            package_version=package_version(),
        )

    def summary(self) -> list[str]:
        """Lines that describe a finished table: its size, the images that were converted and those skipped."""
        size = sum(shard.bytes for shard in self.shards) / 1e6
        lines = [
            f"{self.images} images of {self.classes} classes, {self.crops} crops of {self.sequence_length} codes, "
            f"{size:.1f} MB"
        ]
        if self.converted:
            modes = ", ".join(f"{count} {mode}" for mode, count in sorted(self.converted.items()))
            lines.append(f"converted to {self.crop_settings['mode']}: {modes}")
        if self.skipped_images:
            lines.append(f"{self.skipped_images} images skipped, listed in {SKIPPED_NAME}")
        return lines

    def content_hash(self) -> str:
        """16 hexadecimal digits that identify the rows, whatever wrote or copied the files."""
        rows = [[shard.images, shard.sha256] for shard in self.shards]
        return hashlib.sha256(json.dumps([self.vocab_size, rows]).encode()).hexdigest()[:16]

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
    with decoding(f"{path} is not a manifest of this program", CodesError, "encode the images again"):
        values = read_json(path)
        values["shards"] = tuple(Shard(**shard) for shard in values["shards"])
        for name in ("label_histogram", "class_names"):
            values[name] = tuple(values[name])
        values["drawn"] = dict(values.get("drawn", {}))  # which older versions did not write
        manifest = Manifest(**{f.name: values[f.name] for f in fields(Manifest)})
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


def fits_on_a_line(name: str) -> bool:
    """Whether a class's name has no control character, line separator or byte that is no UTF-8."""
    return not any(unicodedata.category(character) in ("Cc", "Zl", "Zp", "Cs") for character in name)


def check_class_names(names: Sequence[str]) -> None:
    """Raise CodesError for a name that cannot be shown on one line."""
    if odd := [name for name in names if not fits_on_a_line(name)]:
        raise CodesError(
            f"the class {odd[0]!r} has a character in its name that is not printed: rename it, e.g. its folder"
        )


def write_class_names(run_folder: Path, names: Sequence[str]) -> None:
    """Keep the names of the classes in a run's folder, where they outlive the table of codes.

    Names of an older table that do not fit on a line are left in the table alone.
    """
    if names and all(map(fits_on_a_line, names)):
        write_atomic(run_folder / CLASS_NAMES, "".join(f"{name}\n" for name in names))


def class_names_of(codes: str, run_folder: Path | None = None) -> tuple[str, ...]:
    """Names of the classes that a run was trained on, or of a table of codes.

    Args:
        codes: the table, which may not be there.
        run_folder: of a run, which keeps them.

    Returns:
        The names in their order; empty where they are not known.

    Raises:
        CodesError: a damaged table, or names that are none.
    """
    if run_folder is not None and (path := run_folder / CLASS_NAMES).is_file():
        with decoding(path, CodesError, "delete it"):
            names = tuple(regular_file(path).read_text("utf-8").split("\n")[:-1])
        if not all(map(fits_on_a_line, names)):
            raise CodesError(f"{path}: has control characters in its names: delete it, the table of codes has them too")
        return names
    folder = expand(codes)
    return read_manifest(folder).class_names if (folder / MANIFEST_NAME).is_file() else ()


def fewer_classes_note(table: int, model: int) -> list[str]:
    """A line for a table of codes with fewer classes than its model, whose labels are the model's first ones."""
    if table >= model:
        return []
    return [
        f"note: data.codes has {table} classes and the model {model}: the data's class 0 trains the model's class 0, "
        f"and so on; for classes of your own set model.overrides.num_classes={table}, and with published weights "
        "model.reset_classes=true"
    ]


def expected_images(codes: str, builtin_images: int | None = None) -> tuple[int, str]:
    """Number of images of the recipe's `data.codes`, and where the number comes from.

    Args:
        codes: a folder, which may not exist yet, or the name of a table that the package builds itself.
        builtin_images: images of that table, from its tokenizer's record; None: `codes` is a folder.

    Returns:
        The built-in number; else the manifest's; else ImageNet's, for a folder without a manifest.

    Raises:
        CodesError: a damaged manifest.
    """
    if builtin_images is not None:
        return builtin_images, f"the built-in table {codes}"
    folder = expand(codes)
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
