"""From images to codes: threads read and crop, the tokenizer runs on the device in batches across images.

Letters: n images of a range, C crops of each, S image size, K channels, L codes per crop.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from cca_ds.data.crops import CropSettings, UnreadableImage, allow_large_images, crop_function, decode_image
from cca_ds.data.image_sources import ImageSource
from cca_ds.data.manifest import Manifest, check_class_names
from cca_ds.data.table_builder import ShardContent, TablePlan


class CropReader:
    """Crops of a source's images, read and decoded ahead by threads.

    Args:
        settings: how an image is cropped.
        threads: number of threads that read, decode and crop.
        max_megapixels: larger images are skipped.
    """

    def __init__(self, source: ImageSource, settings: CropSettings, threads: int, max_megapixels: float) -> None:
        self.source, self.settings, self.threads = source, settings, threads
        self.max_megapixels = max_megapixels
        self._crop = crop_function(settings)
        allow_large_images()

    def __call__(self, rows: Iterable[int], ahead: int = 0) -> Iterator[tuple[int, tuple[np.ndarray, str] | str]]:
        """(index, (crops [C, S, S, K], mode of the file)), or (index, why it is skipped), in order.

        Args:
            ahead: images that are read ahead beside two for each thread.
        """
        queue: deque[tuple[int, Future]] = deque()
        with ThreadPoolExecutor(self.threads) as pool:
            try:
                for index in rows:
                    content = self._read(index) if self.source.in_order else None
                    queue.append((index, pool.submit(self._load, index, content)))
                    if len(queue) > 2 * self.threads + ahead:
                        first, future = queue.popleft()
                        yield first, future.result()
                while queue:
                    first, future = queue.popleft()
                    yield first, future.result()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _read(self, index: int) -> bytes | str:
        """The image file's content, or why it cannot be read."""
        try:
            return self.source.read(index)
        except OSError as error:
            return " ".join(str(error).split())

    def _load(self, index: int, content: bytes | str | None) -> tuple[np.ndarray, str] | str:
        """An image's crops and mode, or why it is skipped; without `content` it is read first."""
        content = self._read(index) if content is None else content
        if isinstance(content, str):
            return content
        try:
            image, mode = decode_image(content, self.settings.mode, self.max_megapixels, self.settings.upright)
        except UnreadableImage as error:
            return str(error)
        return self._crop(image, index), mode


class ImageEncoder:
    """A `Producer` of the codes of a source's images.

    Args:
        settings: how an image is cropped.
        tokenizer: has `encode`, `sequence_length` and `vocab_size`; is moved to `device`.
        batch_size: crops in one forward of the tokenizer, taken across images.
        threads: number of threads that read, decode and crop.
        precision: of the tokenizer: "fp32", "tf32" (as the original programs; fp32 on a CPU) or "bf16".
        max_megapixels: larger images are skipped.
    """

    def __init__(
        self,
        source: ImageSource,
        settings: CropSettings,
        tokenizer: nn.Module,
        device: str | torch.device,
        batch_size: int = 32,
        threads: int = 4,
        precision: str = "tf32",
        max_megapixels: float = 90.0,
    ) -> None:
        self.source, self.settings = source, settings
        self.tokenizer = tokenizer.to(device)
        self.device = torch.device(device)
        self.batch_size, self.precision = batch_size, precision
        self.max_megapixels = max_megapixels
        self._cropped = CropReader(source, settings, threads, max_megapixels)

    def plan(self, table: Manifest, images_per_shard: int) -> TablePlan:
        """The plan of the table of all the source's images.

        Args:
            table: from `Manifest.before_encoding`.

        Raises:
            ValueError: the tokenizer does not take images of this size.
        """
        check_class_names(self.source.class_names)
        table = replace(
            table,
            classes=len(self.source.class_names),
            class_names=self.source.class_names,
            crops=self.settings.count,
            sequence_length=self.tokenizer.sequence_length(self.settings.image_size),
            crop_settings=self.settings.as_dict(),
            source_hash=self.source.fingerprint(),
        )
        encoding = {"precision": self.precision, "max_megapixels": self.max_megapixels}
        return TablePlan(table, len(self.source), images_per_shard, encoding)

    def __call__(self, rows: range, advance: Callable[[], object]) -> ShardContent:
        """Codes and labels of the images `rows`, and those skipped; `advance` is called after each image."""
        length = self.tokenizer.sequence_length(self.settings.image_size)
        codes_NCL = np.empty((len(rows), self.settings.count, length), dtype=np.uint16)
        kept: list[int] = []
        skipped: list[dict] = []
        modes: Counter[str] = Counter()
        waiting: list[np.ndarray] = []
        done = 0

        def flush() -> None:
            nonlocal done
            if waiting:
                codes_NCL[done : done + len(waiting)] = self._encode(np.stack(waiting))
                done += len(waiting)
                waiting.clear()

        for index, found in self._cropped(rows, ahead=-(-self.batch_size // self.settings.count)):
            if isinstance(found, str):
                skipped.append({"index": index, "name": self.source.name(index), "reason": found})
            else:
                crops_CSSK, mode = found
                kept.append(index)
                modes[mode] += mode != self.settings.mode
                waiting.append(crops_CSSK)
                if len(waiting) * self.settings.count >= self.batch_size:
                    flush()
            advance()
        flush()
        labels_N = self.source.labels_N[np.array(kept, dtype=np.int64)]
        return ShardContent(codes_NCL[:done], labels_N, skipped, {m: n for m, n in modes.items() if n})

    @torch.inference_mode()
    def _encode(self, crops_NCSSK: np.ndarray) -> np.ndarray:
        """Codes [n, C, L] uint16 of crops [n, C, S, S, K] uint8, scaled to [-1, 1]."""
        pixels_BSSK = torch.from_numpy(crops_NCSSK).flatten(0, 1)
        if self.device.type == "cuda":
            pixels_BSSK = pixels_BSSK.pin_memory()
        found = []
        with _precision(self.precision, self.device):
            for part_BSSK in pixels_BSSK.split(self.batch_size):
                images_BCHW = part_BSSK.to(self.device, non_blocking=True).permute(0, 3, 1, 2).float()
                images_BCHW = images_BCHW.div_(255).sub_(0.5).div_(0.5)
                found.append(self.tokenizer.encode(images_BCHW.contiguous()).to(torch.int32))
        codes_BL = torch.cat(found).cpu().numpy()
        return codes_BL.astype(np.uint16).reshape(*crops_NCSSK.shape[:2], -1)


@contextmanager
def _precision(name: str, device: torch.device) -> Iterator[None]:
    """Allow TF32 or not in this block, with bfloat16 autocast for "bf16"; "fp32" allows neither."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = name != "fp32"
    autocast = torch.autocast(device.type, torch.bfloat16) if name == "bf16" else nullcontext()
    try:
        with autocast:
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
