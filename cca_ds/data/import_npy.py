"""The original program's folders of codes, one .npy file per image, as a source of codes for a table.

LlamaGen's extract_codes_c2i.py writes `imagenet<S>_codes/<i>.npy`, [1, C, L] or [1, L], and
`imagenet<S>_labels/<i>.npy`, [1]. Several such folders (its crop ranges 1.1 and 1.05) are joined along the crops.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from cca_ds.data.building import ShardContent
from cca_ds.data.manifest import CodesError

LONGEST_PADDING = 4096  # more ranks than any run of the original had


class NpyFolders:
    """The codes of N images in one or several folders of .npy files.

    Raises:
        CodesError: no such files, numbers missing, different shapes in the first files, labels that disagree.
    """

    def __init__(self, folders: list[str | Path]) -> None:
        self._pairs = [_codes_and_labels(Path(folder).expanduser()) for folder in folders]
        counts = {_count(part) for pair in self._pairs for part in pair}
        if len(counts) != 1:
            raise CodesError(f"--import_npy: the folders hold different numbers of files {sorted(counts)}")
        self.files = counts.pop()
        first = [self._codes_of(codes, 0) for codes, _ in self._pairs]
        self.sequence_length = first[0].shape[1]
        self._crops = [codes_CL.shape[0] for codes_CL in first]
        self.crops = sum(self._crops)
        self.images = self.files - self._padding()

    def __call__(self, rows: range, advance: Callable[[], object]) -> ShardContent:
        """Codes and labels of a range; a damaged file is an error, for codes cannot be made again from it."""
        codes_NCL = np.empty((len(rows), self.crops, self.sequence_length), dtype=np.int64)
        labels_N = np.empty(len(rows), dtype=np.int64)
        for place, index in enumerate(rows):
            codes_NCL[place], labels_N[place] = self.record(index)
            advance()
        return ShardContent(codes_NCL, labels_N, [])

    def record(self, index: int) -> tuple[np.ndarray, int]:
        """Codes [C, L] int64 and label of one image."""
        parts, labels = [], set()
        for (codes, label), crops in zip(self._pairs, self._crops, strict=True):
            codes_CL = self._codes_of(codes, index)
            if codes_CL.shape != (crops, self.sequence_length):
                expected = [1, crops, self.sequence_length]
                raise CodesError(
                    f"{codes / f'{index}.npy'} is {[1, *codes_CL.shape]}, the first file is {expected}"
                )
            parts.append(codes_CL)
            labels.add(_label(label / f"{index}.npy"))
        if len(labels) != 1:
            raise CodesError(f"--import_npy: image {index} has the labels {sorted(labels)} in the folders")
        return np.concatenate(parts), labels.pop()

    def labels(self, advance: Callable[[], object]) -> np.ndarray:
        """All labels, [N] int64."""
        labels_N = np.empty(self.images, dtype=np.int64)
        for index in range(self.images):
            labels_N[index] = _label(self._pairs[0][1] / f"{index}.npy")
            advance()
        return labels_N

    def fingerprint(self, labels_N: np.ndarray) -> str:
        """Sha256 over the labels and the first and last codes: a run is only resumed on the same files."""
        digest = hashlib.sha256(labels_N.tobytes())
        for index in (0, self.images - 1):
            digest.update(self.record(index)[0].tobytes())
        return digest.hexdigest()

    def _padding(self) -> int:
        """Files at the end that repeat those at the beginning.

        The original's DistributedSampler pads the images to a multiple of its ranks, and the padding is stored.
        """
        label = _label(self._pairs[0][1] / "0.npy")
        for padding in range(1, min(LONGEST_PADDING, self.files // 2) + 1):
            start = self.files - padding
            if _label(self._pairs[0][1] / f"{start}.npy") != label:  # a label is read sooner than codes
                continue
            if all(self._same(number, start + number) for number in range(padding)):
                return padding
        return 0

    def _same(self, one: int, other: int) -> bool:
        (codes_one, label_one), (codes_other, label_other) = self.record(one), self.record(other)
        return label_one == label_other and np.array_equal(codes_one, codes_other)

    @staticmethod
    def _codes_of(folder: Path, index: int) -> np.ndarray:
        """[C, L] int64."""
        codes = _load(folder / f"{index}.npy")
        if codes.ndim not in (2, 3) or codes.shape[0] != 1 or not codes.size:
            raise CodesError(f"{folder / f'{index}.npy'} is {list(codes.shape)}, not [1, crops, L] or [1, L]")
        return codes.reshape(-1, codes.shape[-1])


def _codes_and_labels(folder: Path) -> tuple[Path, Path]:
    """The folders `*_codes` and `*_labels` in a folder."""
    found = [
        sorted(path for path in folder.glob(f"*_{part}") if path.is_dir()) for part in ("codes", "labels")
    ]
    if [len(paths) for paths in found] != [1, 1]:
        raise CodesError(
            f"--import_npy {folder}: needs one *_codes and one *_labels folder in it (imagenet384_codes, ...), "
            f"found {[path.name for paths in found for path in paths]}"
        )
    return found[0][0], found[1][0]


def _count(folder: Path) -> int:
    numbers = sorted(int(path.stem) for path in folder.glob("*.npy") if path.stem.isdigit())
    if not numbers:
        raise CodesError(f"--import_npy {folder}: holds no .npy files")
    if numbers != list(range(len(numbers))):
        missing = next(number for number in range(numbers[-1]) if number not in set(numbers))
        raise CodesError(f"--import_npy {folder}: {missing}.npy is missing of 0 to {numbers[-1]}")
    return len(numbers)


def _label(path: Path) -> int:
    label = _load(path)
    if label.size != 1:
        raise CodesError(f"{path} is {list(label.shape)}, not [1]")
    return int(label.reshape(()))


def _load(path: Path) -> np.ndarray:
    """One .npy file of integers; never a pickle."""
    try:
        values = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise CodesError(f"{path} is not a readable .npy file ({' '.join(str(error).split())})") from error
    if values.dtype.kind not in "iu":
        raise CodesError(f"{path} holds {values.dtype}, not integers")
    return values
