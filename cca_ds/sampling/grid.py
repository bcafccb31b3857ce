"""A sheet of images.

Letters: B images, C channels, H and W pixels.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor
from torch.nn.functional import interpolate, pad

SMALLEST_SIDE = 32  # smaller pictures are enlarged to be seen


def image_grid(images_BCHW: Tensor, columns: int, gap: int = 2) -> np.ndarray:
    """Images in [-1, 1] row by row on a white sheet, [H', W', C] uint8 with C of 1 or 3."""
    side = images_BCHW.shape[-1]
    if side < SMALLEST_SIDE:
        images_BCHW = interpolate(images_BCHW, scale_factor=-(-SMALLEST_SIDE // side), mode="nearest")
    images_BCHW = pad(images_BCHW.clamp(-1, 1), (0, gap, 0, gap), value=1.0)
    missing = -len(images_BCHW) % columns
    images_BCHW = pad(images_BCHW, (0, 0, 0, 0, 0, 0, 0, missing), value=1.0)
    rows = len(images_BCHW) // columns
    sheet = images_BCHW.unflatten(0, (rows, columns)).permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    return ((sheet + 1) * 127.5).round().byte().numpy()
