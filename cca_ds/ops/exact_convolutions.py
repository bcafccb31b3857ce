"""Convolutions in float32 as they are written: by default cuDNN rounds their inputs to TF32, ten bits of fraction.

Codes and scores that differ from the originals' in one image of a hundred are no codes and scores of theirs.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def exact_convolutions() -> Iterator[None]:
    """Within it, or in a function that it decorates, convolutions on a GPU are not rounded to TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
