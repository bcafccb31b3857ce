"""Sources of images: an image folder, a Hugging Face dataset on disk, or a tar of either.

A source has a fixed order, a label for every image, and `read(index) -> bytes`. It decodes no image and extracts no
archive: the members of a tar are read in place.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import tarfile
import threading
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from cca_ds.console import say
from cca_ds.data.manifest import CodesError
from cca_ds.files import expand
from cca_ds.untrusted import not_a_file, reason_of

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
NOT_READ_SUFFIXES = (".gif", ".avif", ".heic", ".jp2", ".jxl", ".tga", ".svg")


def _check_suffix(source: Path, name: str) -> None:
    """Raise CodesError for a picture that would be left out of the classes without a word."""
    if name.lower().endswith(NOT_READ_SUFFIXES):
        kinds = ", ".join(IMAGE_SUFFIXES)
        raise CodesError(f"--source {source}: {name} is not read (only {kinds}): convert it, or move it away")


class ImageSource(ABC):
    """N images in a fixed order; `read` may be called from several threads.

    Attributes:
        labels_N: [N] int64.
        class_names: one per class.
        in_order: whether images should be read by increasing index, as in a compressed tar.
        left_out: names of files that are no images by their suffix, or that lie beside the class folders.
    """

    labels_N: np.ndarray
    class_names: tuple[str, ...]
    in_order = False
    left_out: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.labels_N)

    @abstractmethod
    def name(self, index: int) -> str:
        """The image's name in messages and in the list of skipped images."""

    @abstractmethod
    def read(self, index: int) -> bytes:
        """Content of the image file, still encoded. Raises OSError."""

    def fingerprint(self) -> str:
        """SHA-256 over names and labels in order; a table is only continued on the same images."""
        digest = hashlib.sha256(repr((self.class_names, len(self))).encode())
        for index, label in enumerate(self.labels_N.tolist()):
            digest.update(f"{self.name(index)}\0{label}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


def say_left_out(source: ImageSource) -> None:
    """One line where files of a source are not among its images."""
    if source.left_out:
        say(f"note: {len(source.left_out)} files are left out ({', '.join(source.left_out[:3])}): images are files "
            f"in a class folder that end in {', '.join(IMAGE_SUFFIXES)}")  # fmt: skip


def open_images(path: str | Path, split: str = "train") -> ImageSource:
    """Open a folder, a dataset on disk or a tar, whichever `path` is.

    Args:
        split: to open, of a dataset with several.

    Raises:
        CodesError: nothing there, no images, an empty class, a split that does not exist.
    """
    from cca_ds.data import dataset_images  # imports pyarrow, which a folder of images does not need

    path = expand(path)
    if path.is_dir():
        if dataset_images.is_dataset(path):
            return dataset_images.open_dataset(path, split)
        return ImageFolder(path)
    if reason := not_a_file(path):
        raise CodesError(f"--source {path}: {reason}; give a folder of images, a dataset on disk, or a tar")
    try:
        members = index_tar(path)
    except Exception as error:  # tarfile and the decompressors raise half a dozen kinds
        reason = reason_of(error).partition(": - method")[0]  # tarfile adds a line per compression it tried
        raise CodesError(f"--source {path}: neither a folder nor a readable tar ({reason})") from error
    if any(PurePosixPath(member.name).name == "state.json" for member in members):
        return dataset_images.open_dataset_in_tar(path, members, split)
    return TarOfImages(path, members)


def _labels_by_class(source: Path, classes: list[str], found: set[str]) -> dict[str, int]:
    """Class name -> label in sorted order, as torchvision's ImageFolder numbers them.

    Args:
        classes: names of all class folders. found: names of those that hold images.

    Raises:
        CodesError: no class, or one without images.
    """
    empty = sorted(set(classes) - found)
    if not classes:
        raise CodesError(f"--source {source}: no class folders with images (ImageNet's layout is class/image.jpg)")
    if empty:
        names = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
        raise CodesError(f"--source {source}: {len(empty)} class folder(s) without images ({names}): fill or remove")
    return {name: label for label, name in enumerate(sorted(classes))}


def _walk(folder: Path) -> list[tuple[str, list[str]]]:
    """(folder, names of its files) of a folder and those below it, sorted.

    Links are followed, but each real folder is visited once, and none that the search came through.
    """
    found, seen, above = [], set(), Path(os.path.realpath(folder)).parents
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = Path(os.path.realpath(parent))
        if real in seen or real in above:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()  # so that of several ways to a folder the same is taken everywhere
        found.append((parent, files))
    return sorted(found)


class ImageFolder(ImageSource):
    """ImageNet's layout, class/**/image, in torchvision's order of classes and files."""

    def __init__(self, folder: Path) -> None:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        classes = [entry.name for entry in entries if entry.is_dir()]
        self.left_out = [entry.name for entry in entries if not entry.is_dir() and not entry.name.startswith(".")]
        self._paths: list[str] = []
        class_of: list[str] = []
        for name in classes:
            before = len(self._paths)
            for parent, files in _walk(folder / name):
                here = os.path.relpath(parent, folder)
                for file in files:
                    _check_suffix(folder, os.path.join(here, file))
                images = (file for file in sorted(files) if file.lower().endswith(IMAGE_SUFFIXES))
                self._paths += [os.path.join(here, file) for file in images]
                others = (file for file in sorted(files) if not file.lower().endswith(IMAGE_SUFFIXES))
                self.left_out += [os.path.join(here, file) for file in others if not file.startswith(".")]
            class_of += [name] * (len(self._paths) - before)
        label = _labels_by_class(folder, classes, set(class_of))
        self._folder = folder
        self.class_names = tuple(sorted(label))
        self.labels_N = np.array([label[name] for name in class_of], dtype=np.int64)

    def name(self, index: int) -> str:
        return self._paths[index]

    def read(self, index: int) -> bytes:
        path = self._folder / self._paths[index]
        if reason := not_a_file(path):
            raise OSError(reason)
        return path.read_bytes()


@dataclass(frozen=True)
class TarMember:
    """One file inside a tar, or inside a tar within it.

    Attributes:
        offset: of its first byte in the (uncompressed) outer archive.
    """

    name: str
    offset: int
    size: int
    is_folder: bool = False


def index_tar(path: Path) -> list[TarMember]:
    """Names and offsets of a tar's files, in the archive's order; only headers are read.

    A tar inside it counts as a folder of its name (ImageNet's own archive holds one per class). Links, devices and
    hidden files are left out, so that no file outside the archive is opened.

    Raises:
        tarfile.TarError, OSError, EOFError: not a tar, or a truncated one.
    """
    with tarfile.open(path, "r:*") as archive:
        members = _members(archive, 0, "")
        while archive.fileobj.read(2**20):  # a compressed archive's checksum is compared at its very end
            pass
        return members


def _members(archive: tarfile.TarFile, start: int, prefix: str) -> list[TarMember]:
    found: list[TarMember] = []
    for member in archive:
        name = prefix + member.name.removeprefix("./").rstrip("/")
        if member.isdir():
            found.append(TarMember(name, 0, 0, is_folder=True))
        elif member.isfile() and not member.issparse() and not PurePosixPath(name).name.startswith("."):
            offset = start + member.offset_data
            if name.endswith(".tar"):
                with tarfile.open(fileobj=archive.extractfile(member), mode="r:") as inner:
                    found += _members(inner, offset, name.removesuffix(".tar") + "/")
            else:
                found.append(TarMember(name, offset, member.size))
    return found


class TarOfImages(ImageSource):
    """A tar of ImageNet's layout, below any number of leading folders.

    The order is that of the same files in a folder; in a compressed tar, the archive's.

    Raises:
        CodesError: no class folder, or one without images.
    """

    def __init__(self, path: Path, members: list[TarMember]) -> None:
        latest = {m.name: m for m in members}  # a name that was appended again replaces the earlier file
        for name in latest:
            _check_suffix(path, name)
        images = [m for m in latest.values() if m.name.lower().endswith(IMAGE_SUFFIXES)]
        root = os.path.commonpath([PurePosixPath(m.name).parent for m in images]) if images else ""
        named = [(_class_below(root, m.name), m) for m in images]
        if any(name for name, _ in named):
            folders = {_class_below(root, f"{m.name}/") for m in members if m.is_folder} - {""}
        else:  # a single class
            named, folders = [(PurePosixPath(root).name, m) for m in images], set()
        named = [
            (name, m) for name, m in named if name
        ]  # files beside the class folders have no class, as in `ImageFolder`
        label = _labels_by_class(path, sorted(folders | {n for n, _ in named}), {n for n, _ in named})
        self._archive = open_archive(path)
        self.in_order = self._archive.in_order
        if not self.in_order:
            named.sort(key=lambda pair: (pair[0], *os.path.split(pair[1].name)))
        self.class_names = tuple(sorted(label))
        self.labels_N = np.array([label[name] for name, _ in named], dtype=np.int64)
        self._members = [member for _, member in named]

    def name(self, index: int) -> str:
        return self._members[index].name

    def read(self, index: int) -> bytes:
        member = self._members[index]
        return self._archive.read(member.offset, member.size)


def _class_below(root: str, name: str) -> str:
    """The first folder below `root` on the way to a file; "" where there is none."""
    below = name.removeprefix(f"{root}/") if root else name
    return below.partition("/")[0] if "/" in below else ""


class PlainArchive:
    """Reads ranges of an uncompressed archive, from any thread, in any order."""

    in_order = False

    def __init__(self, path: Path) -> None:
        self._file = open(path, "rb")  # noqa: SIM115 - open as long as the source

    def read(self, offset: int, size: int) -> bytes:
        content = os.pread(self._file.fileno(), size, offset)
        if len(content) != size:
            raise OSError(f"the archive ends after {len(content)} of {size} bytes")
        return content


class CompressedArchive:
    """Reads ranges of a compressed archive; decompresses it once if the ranges come in increasing order."""

    in_order = True

    def __init__(self, path: Path) -> None:
        self._file = tarfile.open(path, "r:*").fileobj  # noqa: SIM115 - open as long as the source
        self._lock = threading.Lock()

    def read(self, offset: int, size: int) -> bytes:
        with self._lock:
            try:
                self._file.seek(offset)
                content = self._file.read(size)
            except (EOFError, lzma.LZMAError, zlib.error) as error:
                raise OSError(f"the archive is truncated or damaged ({error})") from error
        if len(content) != size:
            raise OSError(f"the archive ends after {len(content)} of {size} bytes")
        return content


def open_archive(path: Path) -> PlainArchive | CompressedArchive:
    """A reader of byte ranges of a tar, compressed or not."""
    try:
        with tarfile.open(path, "r:"):
            return PlainArchive(path)
    except tarfile.ReadError:
        return CompressedArchive(path)
