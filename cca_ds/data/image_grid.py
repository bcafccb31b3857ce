"""PNG files of images, and of a grid of images.

Letters: B images, C channels (1 or 3), H and W pixels.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, pad

SMALLEST_SIDE = 32  # smaller images are enlarged to be seen


def image_grid(images_BCHW: Tensor, columns: int, gap: int = 2) -> np.ndarray:
    """Images side by side on a white background, row by row.

    Args:
        images_BCHW: float, in [-1, 1]; values beyond are clamped. Images below 32 pixels are enlarged.
        gap: white pixels to the right of and below each image.

    Returns:
        uint8 [H', W', C].
    """
    side = images_BCHW.shape[-1]
    if side < SMALLEST_SIDE:
        images_BCHW = interpolate(images_BCHW, scale_factor=-(-SMALLEST_SIDE // side), mode="nearest")
    images_BCHW = pad(images_BCHW.clamp(-1, 1), (0, gap, 0, gap), value=1.0)
    missing = -len(images_BCHW) % columns
    images_BCHW = pad(images_BCHW, (0, 0, 0, 0, 0, 0, 0, missing), value=1.0)
    rows = len(images_BCHW) // columns
    grid = images_BCHW.unflatten(0, (rows, columns)).permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    return ((grid + 1) * 127.5).round().byte().numpy()


def encode_png(image_HWC: np.ndarray) -> bytes:
    """A PNG file of uint8 [H, W, C], at the fastest compression, which makes it a tenth larger than the default."""
    pixels = np.ascontiguousarray(image_HWC[..., 0] if image_HWC.shape[-1] == 1 else image_HWC)
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, format="PNG", compress_level=1)
    return encoded.getvalue()
