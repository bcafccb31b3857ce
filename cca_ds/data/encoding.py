"""Images to codes: reading and cropping in threads, the tokenizer on the device, batched across images.

n images of a range, C crops of each, S image size, L codes per crop.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from torch import nn

from cca_ds.data.building import ShardContent
from cca_ds.data.crops import CropSettings, UnreadableImage, allow_large_images, crop_function, decode_image
from cca_ds.data.images import ImageSource


class ImageEncoder:
    """Makes the codes of ranges of a source's images.

    Args:
        batch_size: crops in one forward of the tokenizer, taken across images.
        threads: that read, decode and crop.
        precision: "fp32", "tf32" (as the original programs; fp32 on a CPU) or "bf16".
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
        self.batch_size, self.threads = batch_size, threads
        self.precision, self.max_megapixels = precision, max_megapixels
        self._crop = crop_function(settings)
        allow_large_images()

    def __call__(self, rows: range, advance: Callable[[], object]) -> ShardContent:
        """Codes, labels and skipped images of a range."""
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

        for index, found in self._cropped(rows):
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

    def _cropped(self, rows: range) -> Iterator[tuple[int, tuple[np.ndarray, str] | str]]:
        """Each image's crops and former mode, or the reason why there are none, in order, read ahead."""
        ahead = 2 * self.threads + -(-self.batch_size // self.settings.count)
        queue: deque[tuple[int, Future]] = deque()
        with ThreadPoolExecutor(self.threads) as pool:
            try:
                for index in rows:
                    content = self._read(index) if self.source.in_order else None
                    queue.append((index, pool.submit(self._load, index, content)))
                    if len(queue) > ahead:
                        first, future = queue.popleft()
                        yield first, future.result()
                while queue:
                    first, future = queue.popleft()
                    yield first, future.result()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _read(self, index: int) -> bytes | str:
        try:
            return self.source.read(index)
        except OSError as error:
            return " ".join(str(error).split())

    def _load(self, index: int, content: bytes | str | None) -> tuple[np.ndarray, str] | str:
        content = self._read(index) if content is None else content
        if isinstance(content, str):
            return content
        try:
            image, mode = decode_image(content, self.settings.mode, self.max_megapixels)
        except UnreadableImage as error:
            return str(error)
        return self._crop(image, index), mode

    @torch.inference_mode()
    def _encode(self, crops_NCSSK: np.ndarray) -> np.ndarray:
        """Codes [n, C, L] uint16 of crops [n, C, S, S, channels] uint8."""
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
    """TF32 allowed or not, or bfloat16 autocast, for the time of one batch."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = name != "fp32"
    autocast = torch.autocast(device.type, torch.bfloat16) if name == "bf16" else nullcontext()
    try:
        with autocast:
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
