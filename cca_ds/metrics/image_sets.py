"""Images to be evaluated, from an `.npz` of the ADM evaluator's kind or a folder, read batch by batch.

An `.npz` of 50,000 images of 256 x 256 is 10 GB: it is streamed out of the archive and never held whole.

N images, B of them in a batch, H height, W width, C channels (1 or 3).
"""

import contextlib
import hashlib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from cca_ds.files import expand, file_hash
from cca_ds.metrics.frechet import FeatureStatistics

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})


class ImagesError(ValueError):
    """Images or statistics that cannot be evaluated; one line with the path and the remedy."""


class Images(Protocol):
    """A set of images of one size."""

    path: Path
    count: int
    shape: tuple[int, int, int]  # height, width, channels
    labels_N: np.ndarray | None  # classes; None when the set has no labels

    def batches(self, start: int, stop: int, size: int) -> Iterator[np.ndarray]:
        """Images `start` to `stop` in order, uint8 [B, H, W, C] with B = size but for the last."""

    def sha256(self) -> str:
        """Hash of all the pixels' files, hexadecimal."""


def open_images(path: str | Path) -> Images:
    """The images of an `.npz` (`arr_0`, labels in `arr_1`) or of a folder; ImagesError without any."""
    path = expand(path)
    if path.is_dir():
        return FolderImages(path)
    if not path.is_file():
        raise ImagesError(f"{path}: no such file or folder; give an .npz of images or a folder of them")
    if not zipfile.is_zipfile(path):
        raise ImagesError(f"{path}: not an .npz archive; give uint8 images [N, H, W, 3] saved by numpy.savez")
    return NpzImages(path)


def read_statistics(path: str | Path) -> tuple[FeatureStatistics, FeatureStatistics | None] | None:
    """Stored statistics of pool features (`mu`, `sigma`) and spatial ones (`mu_s`, `sigma_s`), or None."""
    path = expand(path)
    if not path.is_file() or not zipfile.is_zipfile(path):
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if "mu" not in arrays or "sigma" not in arrays:
                return None
            pool = FeatureStatistics(arrays["mu"].astype(np.float64), arrays["sigma"].astype(np.float64))
            spatial = None
            if "mu_s" in arrays and "sigma_s" in arrays:
                spatial = FeatureStatistics(arrays["mu_s"].astype(np.float64), arrays["sigma_s"].astype(np.float64))
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise ImagesError(f"{path}: statistics cannot be read ({error})") from error
    for statistics in (pool, spatial):
        if statistics is not None and statistics.covariance_DD.shape != (len(statistics.mean_D),) * 2:
            raise ImagesError(
                f"{path}: a mean of {statistics.mean_D.shape} with a covariance of "
                f"{statistics.covariance_DD.shape}; [D] and [D, D] are needed"
            )
    return pool, spatial


class NpzImages:
    """`arr_0` of an archive, uint8 [N, H, W, C], streamed; labels from `arr_1` where it is there."""

    def __init__(self, path: Path):
        self.path = path
        with self._open() as file:
            shape, fortran_order, dtype = _read_header(file, path)
        if dtype != np.uint8 or fortran_order:
            raise ImagesError(f"{path}: arr_0 is {dtype}; save images as uint8 from 0 to 255, [N, H, W, 3]")
        if len(shape) != 4 or shape[3] not in (1, 3):
            raise ImagesError(f"{path}: arr_0 has shape {shape}; channels last are needed, [N, H, W, 3]")
        if shape[0] == 0:
            raise ImagesError(f"{path}: arr_0 holds no image")
        self.count, self.shape = shape[0], (shape[1], shape[2], shape[3])
        self.labels_N = self._labels()

    def batches(self, start: int, stop: int, size: int) -> Iterator[np.ndarray]:
        stride = int(np.prod(self.shape))
        with self._open() as file:
            _read_header(file, self.path)
            file.seek(stride * start, 1)
            for first in range(start, stop, size):
                count = min(size, stop - first)
                data = file.read(stride * count)
                if len(data) != stride * count:
                    raise ImagesError(f"{self.path}: ends inside image {first + len(data) // stride}")
                yield np.frombuffer(data, np.uint8).reshape(count, *self.shape)

    def sha256(self) -> str:
        return file_hash(self.path)

    @contextlib.contextmanager
    def _open(self) -> Iterator[IO[bytes]]:
        try:
            with zipfile.ZipFile(self.path) as archive:
                if "arr_0.npy" not in archive.namelist():
                    held = ", ".join(archive.namelist()[:6]) or "nothing"
                    raise ImagesError(
                        f"{self.path}: holds {held} and no arr_0; save images with numpy.savez(path, images)"
                    )
                with archive.open("arr_0.npy") as file:
                    yield file
        except (zipfile.BadZipFile, EOFError) as error:
            raise ImagesError(f"{self.path}: the archive is damaged ({error})") from error

    def _labels(self) -> np.ndarray | None:
        with np.load(self.path, allow_pickle=False) as arrays:
            labels_N = arrays.get("arr_1")
        if labels_N is not None and labels_N.shape != (self.count,):
            raise ImagesError(f"{self.path}: {labels_N.shape} labels in arr_1 for {self.count} images")
        return labels_N


class FolderImages:
    """Image files of a folder and its sub-folders, by file name; sub-folders named by numbers are class labels.

    Of a folder that sample.py filled, its `images/`. Files of all classes are ordered by their own names, since the
    inception score is a mean over consecutive images, which have to be of all classes.
    """

    def __init__(self, path: Path):
        self.path = path
        root = path / "images" if (path / "sampling.json").is_file() else path
        found = (file for file in root.rglob("*") if file.suffix.lower() in SUFFIXES)
        self.files = sorted(found, key=lambda file: (file.name, file))
        if not self.files:
            raise ImagesError(f"{path}: no image in this folder; .png, .jpg, .webp and .bmp are read")
        self.count = len(self.files)
        sizes = [self._size(file) for file in self.files]
        for file, size in zip(self.files, sizes, strict=True):
            if size != sizes[0]:
                raise ImagesError(
                    f"{path}: mixed sizes, {self.files[0].name} is {_by(sizes[0])} and {file.name} is {_by(size)}; "
                    "resize them all in one way first"
                )
        self.shape = (sizes[0][1], sizes[0][0], 3)
        parents = [file.parent.name for file in self.files]
        numbered = all(parent.isdigit() for parent in parents) and root not in {file.parent for file in self.files}
        self.labels_N = np.array([int(parent) for parent in parents]) if numbered else None

    def batches(self, start: int, stop: int, size: int) -> Iterator[np.ndarray]:
        for first in range(start, stop, size):
            yield np.stack([self._pixels(file) for file in self.files[first : min(first + size, stop)]])

    def sha256(self) -> str:
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(file.relative_to(self.path).as_posix().encode() + b"\0")
            digest.update(hashlib.sha256(file.read_bytes()).digest())
        return digest.hexdigest()

    def _pixels(self, file: Path) -> np.ndarray:
        try:
            with Image.open(file) as image:
                return np.asarray(image.convert("RGB"))
        except OSError as error:
            raise ImagesError(f"{file}: cannot be decoded ({error})") from error

    def _size(self, file: Path) -> tuple[int, int]:
        try:
            with Image.open(file) as image:
                if image.mode not in ("RGB", "L", "P", "1"):
                    raise ImagesError(f"{file}: mode {image.mode}; 8-bit RGB or grey is needed, without transparency")
                return image.size
        except UnidentifiedImageError as error:
            raise ImagesError(f"{file}: not an image") from error


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def _read_header(file: IO[bytes], path: Path) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, order and dtype of the array that `file` begins with; the file is then at the first number."""
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return read(file)
    except ValueError as error:
        raise ImagesError(f"{path}: arr_0 is not an array of numpy's ({error})") from error
