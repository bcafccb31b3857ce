"""Images to be evaluated, from an `.npz` of the ADM evaluator's kind or a folder, read batch by batch.

An `.npz` of 50,000 images of 256 x 256 is 10 GB: it is streamed out of the archive and never held whole.

N images, B of them in a batch, H height, W width, C channels (1 or 3).
"""

import contextlib
import hashlib
import json
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from PIL import Image

from cca_ds.files import expand, file_hash
from cca_ds.metrics.frechet import FeatureStatistics
from cca_ds.untrusted import decoding, not_a_file, regular_file

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
NOT_READ = frozenset({".gif", ".tif", ".tiff", ".avif", ".heic", ".jp2", ".jxl", ".ppm", ".pgm", ".tga", ".npy"})
LARGEST_SIDE = 16384  # pixels
REMEDY = "draw or copy it again, or move it away"
LARGEST_ARRAY = 2**30  # bytes of labels or statistics: 2048 features take 32 MiB


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
    if reason := not_a_file(path):
        raise ImagesError(f"{path}: {reason}; give an .npz of images or a folder of them")
    if not zipfile.is_zipfile(path):
        raise ImagesError(f"{path}: not an .npz archive; give uint8 images [N, H, W, 3] saved by numpy.savez")
    return NpzImages(path)


def read_statistics(path: str | Path) -> tuple[FeatureStatistics, FeatureStatistics | None] | None:
    """Stored statistics of pool features (`mu`, `sigma`) and spatial ones (`mu_s`, `sigma_s`), or None."""
    path = expand(path)
    if not_a_file(path) or not zipfile.is_zipfile(path):
        return None
    with decoding(f"{path}: statistics cannot be read", ImagesError):
        arrays = read_arrays(path, ("mu", "sigma", "mu_s", "sigma_s"))
    if "mu" not in arrays or "sigma" not in arrays:
        return None
    pool = _statistics(path, arrays["mu"], arrays["sigma"])
    if "mu_s" not in arrays or "sigma_s" not in arrays:
        return pool, None
    return pool, _statistics(path, arrays["mu_s"], arrays["sigma_s"])


def read_record(path: str | Path) -> dict[str, Any]:
    """What `metrics.real_images.write_reference` noted in an .npz of its own: network, side; else empty."""
    path = expand(path)
    if not_a_file(path) or not zipfile.is_zipfile(path):
        return {}
    with decoding(f"{path}: its record `about` cannot be read", ImagesError, "make it again with --make_reference"):
        about = read_arrays(path, ("about",)).get("about")
        return {} if about is None else dict(json.loads(str(about)))


def read_arrays(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The arrays of these names that an .npz holds, none of objects. Raises whatever a damaged archive makes numpy."""
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.filename.removesuffix(".npy") in names and member.file_size > LARGEST_ARRAY:
                raise ImagesError(f"{path}: {member.filename} holds {member.file_size:,} bytes, more than 1 GiB")
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in names if name in arrays}


def _statistics(path: Path, mean_D: np.ndarray, covariance_DD: np.ndarray) -> FeatureStatistics:
    """Checked; raises ImagesError for shapes, kinds or values that are no mean and covariance."""
    if mean_D.ndim != 1 or not mean_D.size or covariance_DD.shape != (mean_D.size,) * 2:
        raise ImagesError(
            f"{path}: a mean of {mean_D.shape} with a covariance of {covariance_DD.shape}; [D] and [D, D] are needed"
        )
    if mean_D.dtype.kind not in "fiu" or covariance_DD.dtype.kind not in "fiu":
        raise ImagesError(f"{path}: statistics of {mean_D.dtype} and {covariance_DD.dtype}; real numbers are needed")
    found = FeatureStatistics(mean_D.astype(np.float64), covariance_DD.astype(np.float64))
    if not np.isfinite(found.mean_D).all() or not np.isfinite(found.covariance_DD).all():
        raise ImagesError(f"{path}: statistics hold NaN or infinite values; compute them again")
    variances_D = np.diagonal(found.covariance_DD)
    if variances_D.min() < 0 or not np.allclose(
        found.covariance_DD, found.covariance_DD.T, atol=variances_D.max() * 1e-6
    ):
        raise ImagesError(f"{path}: sigma is no covariance (symmetric, no negative variance); compute it again")
    return found


class NpzImages:
    """`arr_0` of an archive, uint8 [N, H, W, C], streamed; labels from `arr_1` where it is there."""

    def __init__(self, path: Path):
        self.path = path
        with self._open() as file:
            shape, fortran_order, dtype = _read_header(file, path)
            self._first_byte, stored = file.tell(), self._stored
        if dtype != np.uint8:
            raise ImagesError(f"{path}: arr_0 is {dtype}; save images as uint8 from 0 to 255, [N, H, W, 3]")
        if len(shape) != 4 or shape[3] not in (1, 3):
            raise ImagesError(f"{path}: arr_0 has shape {shape}; channels last are needed, [N, H, W, 3]")
        if shape[0] == 0:
            raise ImagesError(f"{path}: arr_0 holds no image")
        if not all(0 < side <= LARGEST_SIDE for side in shape[1:3]) or shape[0] < 0:
            raise ImagesError(f"{path}: arr_0 has shape {shape}; sides of 1 to {LARGEST_SIDE} pixels are needed")
        if fortran_order:
            raise ImagesError(f"{path}: arr_0 is in Fortran order; save numpy.ascontiguousarray(images)")
        self.count, self.shape = shape[0], (shape[1], shape[2], shape[3])
        missing = self._first_byte + self.count * self._image_bytes - stored
        if missing > 0:
            whole = (stored - self._first_byte) // self._image_bytes
            raise ImagesError(f"{path}: arr_0 ends inside image {whole} of {self.count}; copy or save it again")
        self.labels_N = self._labels()

    @property
    def _image_bytes(self) -> int:
        return self.shape[0] * self.shape[1] * self.shape[2]

    def batches(self, start: int, stop: int, size: int) -> Iterator[np.ndarray]:
        stride = self._image_bytes
        with self._open() as file:
            file.seek(self._first_byte + stride * start)
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
        with (
            decoding(f"{self.path}: the archive is damaged or not readable", ImagesError),
            zipfile.ZipFile(self.path) as archive,
        ):
            if "arr_0.npy" not in archive.namelist():
                held = ", ".join(archive.namelist()[:6]) or "nothing"
                raise ImagesError(f"{self.path}: holds {held} and no arr_0; save images with numpy.savez(path, images)")
            self._stored = archive.getinfo("arr_0.npy").file_size
            with archive.open("arr_0.npy") as file:
                yield file

    def _labels(self) -> np.ndarray | None:
        with decoding(f"{self.path}: labels in arr_1 cannot be read", ImagesError):
            labels_N = read_arrays(self.path, ("arr_1",)).get("arr_1")
        if labels_N is None:
            return None
        if labels_N.shape != (self.count,):
            raise ImagesError(f"{self.path}: {labels_N.shape} labels in arr_1 for {self.count} images")
        if labels_N.dtype.kind not in "iu" or labels_N.min() < 0:
            raise ImagesError(f"{self.path}: labels in arr_1 are {labels_N.dtype}; classes from 0 on are needed")
        return labels_N


class FolderImages:
    """Image files of a folder and its sub-folders, by file name; sub-folders named by numbers are class labels.

    Of a folder that sample.py filled, its `images/`. Files of all classes are ordered by their own names, since the
    inception score is a mean over consecutive images, which have to be of all classes.
    """

    def __init__(self, path: Path):
        self.path = path
        root = path / "images" if (path / "sampling.json").is_file() else path
        entries = list(root.rglob("*"))
        left_out = next((file for file in sorted(entries) if file.suffix.lower() in NOT_READ), None)
        if left_out is not None:
            raise ImagesError(f"{left_out}: {left_out.suffix} is not read; convert it to .png, or move it away")
        found = (regular_file(file, ImagesError) for file in entries if file.suffix.lower() in SUFFIXES)
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
        numbered = all(parent.isascii() and parent.isdigit() for parent in parents) and root not in {
            file.parent for file in self.files
        }
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
        with decoding(f"{file}: cannot be decoded", ImagesError, REMEDY), Image.open(file) as image:
            return np.asarray(image.convert("RGB"))

    def _size(self, file: Path) -> tuple[int, int]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of many pixels: they are counted here
            with decoding(f"{file}: not an image", ImagesError, REMEDY), Image.open(file) as image:
                if image.mode not in ("RGB", "L", "P", "1"):
                    raise ImagesError(f"{file}: mode {image.mode}; 8-bit RGB or grey is needed, without transparency")
                if max(image.size) > LARGEST_SIDE:
                    raise ImagesError(f"{file}: {_by(image.size)} pixels; at most {LARGEST_SIDE} a side are scored")
                return image.size


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def _read_header(file: IO[bytes], path: Path) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, order and dtype of the array that `file` begins with; the file is then at the first number."""
    with decoding(f"{path}: arr_0 is not an array of numpy's", ImagesError):
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return read(file)
