"""Importing the codes that LlamaGen's own program stored, one .npy file per image.

Its extract_codes_c2i.py writes `imagenet<S>_codes/<i>.npy`, [1, C, L] or [1, L], and `imagenet<S>_labels/<i>.npy`,
[1]. Several such folders (for its crop ranges 1.1 and 1.05) are joined along the crops.

Letters: N images, C crops, L codes per crop.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from cca_ds.console import progress, say
from cca_ds.data.manifest import CodesError, Manifest
from cca_ds.data.table_builder import ShardContent, TablePlan
from cca_ds.files import expand
from cca_ds.untrusted import decoding, regular_file

LARGEST_NPY = 64 * 2**20  # bytes of one image's codes; twenty crops of 576 codes take 92 kB
LONGEST_PADDING = 4096  # more than the ranks of any run of the original


class NpyFolders:
    """A `Producer` of the codes of N images in one or several folders of .npy files.

    Args:
        show: write progress, and the number of files left out, to the console.

    Attributes:
        files: in each folder; the last `files - images` repeat the first ones and are left out.
        images, crops, sequence_length: N, C over all folders, L.
        names: of the folders.

    Raises:
        CodesError: no such files, missing numbers, files of different shapes, labels that differ between folders.
    """

    def __init__(self, folders: Sequence[str | Path], show: bool = False) -> None:
        self.show = show
        self.names = [Path(folder).name for folder in folders]
        self._pairs = [_codes_and_labels(expand(folder)) for folder in folders]
        counts = {_count(part) for pair in self._pairs for part in pair}
        if len(counts) != 1:
            raise CodesError(f"--import_npy: the folders hold different numbers of files {sorted(counts)}")
        self.files = counts.pop()
        first = [self._codes_of(codes, 0) for codes, _ in self._pairs]
        self.sequence_length = first[0].shape[1]
        self._crops = [codes_CL.shape[0] for codes_CL in first]
        self.crops = sum(self._crops)
        self.images = self.files - self._padding()

    def plan(self, table: Manifest, images_per_shard: int) -> TablePlan:
        """The plan of the table of all N images; reads all labels.

        Args:
            table: from `Manifest.before_encoding`.

        Raises:
            CodesError: a label that cannot be read.
        """
        if self.show and self.images < self.files:
            say(
                f"the last {self.files - self.images} files repeat the first ones (the original's sampler pads to its "
                "number of ranks) and are left out"
            )
        labels_N = self.labels()
        table = replace(
            table,
            classes=int(labels_N.max()) + 1,
            crops=self.crops,
            sequence_length=self.sequence_length,
            crop_settings={"kind": "imported", "folders": self.names},
            source_hash=self.fingerprint(labels_N),
        )
        return TablePlan(table, self.images, images_per_shard, {})

    def __call__(self, rows: range, advance: Callable[[], object]) -> ShardContent:
        """Codes and labels of the images `rows`; `advance` is called after each image.

        Raises:
            CodesError: a damaged file; it is not skipped, since its image cannot be encoded again from here.
        """
        codes_NCL = np.empty((len(rows), self.crops, self.sequence_length), dtype=np.int64)
        labels_N = np.empty(len(rows), dtype=np.int64)
        for place, index in enumerate(rows):
            codes_NCL[place], labels_N[place] = self.record(index)
            advance()
        return ShardContent(codes_NCL, labels_N, [])

    def record(self, index: int) -> tuple[np.ndarray, int]:
        """Codes [C, L] int64 and label of one image. Raises CodesError."""
        parts, labels = [], set()
        for (codes, label), crops in zip(self._pairs, self._crops, strict=True):
            codes_CL = self._codes_of(codes, index)
            if codes_CL.shape != (crops, self.sequence_length):
                expected = [1, crops, self.sequence_length]
                raise CodesError(f"{codes / f'{index}.npy'} is {[1, *codes_CL.shape]}, the first file is {expected}")
            parts.append(codes_CL)
            labels.add(_label(label / f"{index}.npy"))
        if len(labels) != 1:
            raise CodesError(f"--import_npy: image {index} has the labels {sorted(labels)} in the folders")
        return np.concatenate(parts), labels.pop()

    def labels(self) -> np.ndarray:
        """All labels, [N] int64, read from the first folder."""
        numbers = progress(range(self.images), "labels", self.images, self.show)
        return np.array([_label(self._pairs[0][1] / f"{index}.npy") for index in numbers], dtype=np.int64)

    def fingerprint(self, labels_N: np.ndarray) -> str:
        """SHA-256 over the labels and the first and last codes; a table is only continued on the same files."""
        digest = hashlib.sha256(labels_N.tobytes())
        for index in (0, self.images - 1):
            digest.update(self.record(index)[0].tobytes())
        return digest.hexdigest()

    def _padding(self) -> int:
        """Number of files at the end that repeat those at the beginning.

        The original's DistributedSampler pads the images to a multiple of its ranks, and the padding is stored.
        """
        label = _label(self._pairs[0][1] / "0.npy")
        for padding in range(1, min(LONGEST_PADDING, self.files // 2) + 1):
            start = self.files - padding
            if _label(self._pairs[0][1] / f"{start}.npy") != label:  # a label is faster to read than codes
                continue
            if all(self._same(number, start + number) for number in range(padding)):
                return padding
        return 0

    def _same(self, one: int, other: int) -> bool:
        (codes_one, label_one), (codes_other, label_other) = self.record(one), self.record(other)
        return label_one == label_other and np.array_equal(codes_one, codes_other)

    @staticmethod
    def _codes_of(folder: Path, index: int) -> np.ndarray:
        """Codes [C, L] int64 of `<folder>/<index>.npy`. Raises CodesError."""
        codes = _load(folder / f"{index}.npy")
        if codes.ndim not in (2, 3) or codes.shape[0] != 1 or not codes.size:
            raise CodesError(f"{folder / f'{index}.npy'} is {list(codes.shape)}, not [1, crops, L] or [1, L]")
        return codes.reshape(-1, codes.shape[-1])


def import_command(folder: Path, recipe: str) -> str | None:
    """The command that imports a folder of the original's codes; None for a folder that holds none.

    LlamaGen's second folder of crops, of the same name with _105, is part of it where it is there.
    """
    if not all(any(path.is_dir() for path in folder.glob(f"*_{part}")) for part in ("codes", "labels")):
        return None
    second = folder.with_name(f"{folder.name}_105")
    both = [str(folder), *([str(second)] if second.is_dir() else [])]
    return (
        f"python -m cca_ds.encode --recipe {recipe} --import_npy {' '.join(map(shlex.quote, both))} "
        f"--output {shlex.quote(f'{folder}_table')}"
    )


def _codes_and_labels(folder: Path) -> tuple[Path, Path]:
    """The folders `*_codes` and `*_labels` in `folder`. Raises CodesError unless there is one of each."""
    found = [sorted(path for path in folder.glob(f"*_{part}") if path.is_dir()) for part in ("codes", "labels")]
    if [len(paths) for paths in found] != [1, 1]:
        raise CodesError(
            f"--import_npy {folder}: needs one *_codes and one *_labels folder in it (imagenet384_codes, ...), "
            f"found {[path.name for paths in found for path in paths]}"
        )
    return found[0][0], found[1][0]


def _count(folder: Path) -> int:
    """Number of .npy files in `folder`. Raises CodesError unless they are numbered 0, 1, 2, ..."""
    numbers = sorted(int(path.stem) for path in folder.glob("*.npy") if path.stem.isascii() and path.stem.isdigit())
    if not numbers:
        raise CodesError(f"--import_npy {folder}: holds no .npy files")
    if numbers != list(range(len(numbers))):
        missing = next(number for number in range(numbers[-1]) if number not in set(numbers))
        raise CodesError(f"--import_npy {folder}: {missing}.npy is missing of 0 to {numbers[-1]}")
    return len(numbers)


def _label(path: Path) -> int:
    """The label in a .npy file of one integer. Raises CodesError."""
    label = _load(path)
    if label.size != 1:
        raise CodesError(f"{path} is {list(label.shape)}, not [1]")
    return int(label.reshape(()))


def _load(path: Path) -> np.ndarray:
    """The integers of one .npy file, which is never unpickled. Raises CodesError."""
    with decoding(f"{path} is not a readable .npy file", CodesError):
        values = np.load(regular_file(path, CodesError, LARGEST_NPY), allow_pickle=False)
    if not isinstance(values, np.ndarray):
        raise CodesError(f"{path} is an .npz archive under the name of an .npy file")
    if values.dtype.kind not in "iu":
        raise CodesError(f"{path} holds {values.dtype}, not integers")
    return values
