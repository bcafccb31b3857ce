"""A folder of sampled images: each image appears whole or not at all, so what is there need not be drawn again.

    OUTPUT/sampling.json              what the images were drawn with; evaluate puts it into its report
    OUTPUT/images/0207/000207.png     class / index of the image
    OUTPUT/samples.npz                the ADM evaluator's archive: arr_0 uint8 NHWC; labels in arr_1
    OUTPUT/grid.png

Image i is of class i modulo the number of classes, so that any run of consecutive images is spread over the classes:
the evaluator's inception score is a mean over consecutive 5,000.

Letters: B images of a batch, N of all, H and W pixels, C channels (1 or 3).
"""

from __future__ import annotations

import difflib
import json
import os
import zipfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cca_ds.console import progress
from cca_ds.data.image_grid import encode_png, image_grid
from cca_ds.files import write_atomic, write_streamed
from cca_ds.folder_lock import FolderLock
from cca_ds.untrusted import not_a_file, read_json

SETTINGS = "sampling.json"
PNG_BEGIN, PNG_END = b"\x89PNG\r\n\x1a\n", b"\x00\x00\x00\x00IEND\xaeB`\x82"
WRITERS = 8  # threads: PNG compression leaves Python's lock, and so does waiting for the disk
# What may differ between two starts that fill one folder.
FREE = frozenset({"recipe", "weights", "images_per_class", "classes", "images", "complete", "seconds", "versions"})


class SamplesError(ValueError):
    """A folder of samples that cannot be used as asked: one line with the remedy."""


def image_indices(per_class: int, classes: int, chosen: Sequence[int] | None = None) -> list[int]:
    """Indices of `per_class` images of every class, or of the chosen ones, in order."""
    labels = sorted(set(chosen)) if chosen else range(classes)
    return [round_ * classes + label for round_ in range(per_class) for label in labels]


def chosen_classes(words: Sequence[str], names: Sequence[str], classes: int) -> list[int]:
    """Class numbers from numbers and names, as `--classes` takes them; a name comes first where it is a number too.

    Args:
        names: of the classes, in their order; empty where they are not known.
        classes: of the model.

    Raises:
        SamplesError: neither a name nor a number of a class, with the nearest name.
    """
    found = []
    for word in words:
        if word in names:
            found.append(list(names).index(word))
        elif word.isdecimal() and int(word) < classes:
            found.append(int(word))
        else:
            near = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
            known = f"; did you mean {near[0]}?" if near else f", such as {names[0]}" if names else ""
            raise SamplesError(f"--classes {word}: the model has classes 0 to {classes - 1}{known}")
    return found


class SampleFolder:
    """Images by index under one folder.

    Args:
        folder: OUTPUT.
        classes: of the model; image i is of class i % classes.
    """

    def __init__(self, folder: Path, classes: int):
        self.folder, self.classes = folder, classes
        self._lock: FolderLock | None = None
        self._writers: ThreadPoolExecutor | None = None
        self._pending: list[Future[None]] = []

    def path(self, index: int) -> Path:
        """The file of image `index`."""
        return self.folder / "images" / f"{index % self.classes:04d}" / f"{index:06d}.png"

    def missing(self, indices: Iterable[int]) -> list[int]:
        """Those of the indices whose image is not there yet, or not whole."""
        return [index for index in indices if not _is_whole(self.path(index))]

    def claim(self, settings: dict[str, Any]) -> None:
        """Become the folder's only writer and write the settings; with images of other settings in it, refuse it.

        Raises SamplesError, and FolderTaken where another process writes there.
        """
        path = self.folder / SETTINGS
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = FolderLock(self.folder, f"--output {self.folder}")
        except OSError as error:
            raise SamplesError(f"--output {self.folder}: cannot be written ({error.strerror})") from None
        old = _read_settings(path)
        differing = [key for key in settings if key not in FREE and old and old.get(key) != settings[key]]
        if differing:
            values = ", ".join(f"{key} {old.get(key)} and not {settings[key]}" for key in differing)
            raise SamplesError(f"--output {self.folder}: holds images drawn with {values}; choose another folder")
        if not old and (self.folder / "images").is_dir():
            raise SamplesError(f"--output {self.folder}: holds images without {SETTINGS}; choose another folder")
        try:
            (self.folder / "images").mkdir(parents=True, exist_ok=True)
            for left in [*self.folder.glob("images/*/.*.partial"), *self.folder.glob(".s*.partial")]:
                left.unlink()  # of a process that was killed while it wrote
            write_atomic(path, json.dumps(settings, indent=1) + "\n")
        except OSError as error:
            raise SamplesError(f"--output {self.folder}: cannot be written ({error.strerror})") from None

    def release(self) -> None:
        """Let another process write into the folder; safe to call twice, and on ranks that did not claim it."""
        if self._lock is not None:
            self._lock.release()

    def finish(self, indices: Sequence[int], *, npz: bool, grid: bool, show: bool) -> list[str]:
        """Once all of `indices` are written: record their number, write the archive and the grid where asked.

        Returns a line for the log per file written; `show` draws a progress bar. Raises SamplesError, OSError.
        """
        settings = _read_settings(self.folder / SETTINGS) | {"images": len(indices)}
        write_atomic(self.folder / SETTINGS, json.dumps(settings, indent=1) + "\n")
        lines = []
        if npz:
            archive = self.write_npz(indices, lambda items: progress(items, "npz", len(indices), show))
            lines.append(f"archive: {archive}")
        if grid:
            lines.append(f"grid: {self.write_grid(indices)}")
        return lines

    def write(self, indices: Sequence[int], images_BHWC: np.ndarray) -> None:
        """Write images in the background, after those of the call before are on disk. Raises OSError of either."""
        self.flush()
        self._writers = self._writers or ThreadPoolExecutor(WRITERS)
        pairs = zip(indices, images_BHWC, strict=True)
        self._pending = [self._writers.submit(self._write_one, index, image) for index, image in pairs]

    def flush(self) -> None:
        """Wait until every image given to `write` is on disk."""
        for done in self._pending:
            done.result()
        self._pending = []

    def close(self) -> None:
        """`flush`, and end the threads."""
        try:
            self.flush()
        finally:
            if self._writers is not None:
                self._writers.shutdown()
                self._writers = None

    def read(self, index: int) -> np.ndarray:
        """Image `index`, uint8 [H, W, C]. Raises SamplesError where it cannot be read."""
        try:
            with Image.open(self.path(index)) as image:
                pixels = np.asarray(image)
        except OSError as error:
            raise SamplesError(f"{self.path(index)}: cannot be read ({error}); delete it and start again") from None
        return pixels[..., None] if pixels.ndim == 2 else pixels

    def write_npz(self, indices: Sequence[int], show: Callable[[Iterable[int]], Iterable[int]] = iter) -> Path:
        """`samples.npz` of the images in this order, streamed: 50,000 of 256 x 256 are 10 GB. Returns its path."""
        path, shape = self.folder / "samples.npz", self.read(indices[0]).shape
        labels_N = np.array([index % self.classes for index in indices], dtype=np.int64)
        return write_streamed(path, lambda file: self._write_arrays(file, indices, shape, labels_N, show))

    def write_grid(self, indices: Sequence[int], columns: int = 10, rows: int = 8) -> Path:
        """`grid.png`: a column for each of up to `columns` classes spread over all. Returns its path."""
        labels = sorted({index % self.classes for index in indices})
        shown = [labels[i * len(labels) // min(columns, len(labels))] for i in range(min(columns, len(labels)))]
        per_class = min(rows, len(indices) // len(labels))
        picked = [round_ * self.classes + label for round_ in range(per_class) for label in shown]
        images_NHWC = torch.from_numpy(np.stack([self.read(index) for index in picked]))
        sheet = image_grid(images_NHWC.permute(0, 3, 1, 2).float() / 127.5 - 1.0, columns=len(shown))
        write_atomic(self.folder / "grid.png", encode_png(sheet))
        return self.folder / "grid.png"

    def _write_one(self, index: int, image_HWC: np.ndarray) -> None:
        path = self.path(index)
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, encode_png(image_HWC))

    def _write_arrays(self, file: Any, indices: Sequence[int], shape: tuple[int, ...], labels_N: np.ndarray,
                      show: Callable[[Iterable[int]], Iterable[int]]) -> None:  # fmt: skip
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(indices), *shape)}
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                for index in show(indices):
                    image_HWC = self.read(index)
                    if image_HWC.shape != shape:
                        raise SamplesError(
                            f"{self.path(index)}: is {image_HWC.shape} where the first image is {shape}; "
                            "delete it and start again"
                        )
                    member.write(image_HWC.tobytes())
            with archive.open("arr_1.npy", "w") as member:
                np.lib.format.write_array(member, labels_N)


def to_pixels(images_BCHW: Tensor, shift: float) -> np.ndarray:
    """Images in [-1, 1] as uint8 [B, H, W, C]: 127.5 x + shift, cut off; `shift` is the family's `pixel_shift`."""
    pixels_BCHW = (127.5 * images_BCHW.float() + shift).clamp(0, 255).to(torch.uint8)
    return pixels_BCHW.permute(0, 2, 3, 1).cpu().numpy()


def _is_whole(path: Path) -> bool:
    """Whether a file begins and ends as a PNG does, as one that a full disk or a copy cut short does not."""
    if not_a_file(path):
        return False
    with open(path, "rb") as file:
        begin = file.read(len(PNG_BEGIN))
        file.seek(max(0, os.fstat(file.fileno()).st_size - len(PNG_END)))
        return begin == PNG_BEGIN and file.read() == PNG_END


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path) if path.exists() or path.is_symlink() else {}
    except (OSError, ValueError) as error:
        raise SamplesError(f"{path}: cannot be read ({error}); choose another --output") from None
    return found if isinstance(found, dict) else {}
