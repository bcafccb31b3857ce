"""A lossless tokenizer for scikit-learn's handwritten digits: a pixel is a code.

1,797 images of 8 x 8 pixels with 17 grey levels become 64 codes from a vocabulary of 17.

Legend: B images, C channels, H height, W width, L codes per image.
"""

import hashlib
from pathlib import Path

import torch
from torch import nn

from cca_ds.data.manifest import CodesError
from cca_ds.data.table_files import write_codes
from cca_ds.vq.tokenizer import TOKENIZERS, TokenizerSpec, checked_codes

GREY_LEVELS = 17
IMAGE_SIZE = 8


class DigitsTokenizer(nn.Module):
    """Grey level k of 16 <-> pixel k / 8 - 1; the codes go row by row. It has no weights."""

    vocab_size = GREY_LEVELS
    image_size = IMAGE_SIZE

    def sequence_length(self, image_size: int = IMAGE_SIZE) -> int:
        """Codes per image, L: one per pixel."""
        if image_size != IMAGE_SIZE:
            raise ValueError(f"the digits tokenizer takes {IMAGE_SIZE} x {IMAGE_SIZE} images, not {image_size}")
        return image_size * image_size

    def encode(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """Codes [B, 64] int64 of images [B, 1, 8, 8] in [-1, 1]; a pixel between two grey levels takes the
        nearer.
        """
        if images_BCHW.shape[1:] != (1, IMAGE_SIZE, IMAGE_SIZE):
            raise ValueError(
                f"the digits tokenizer takes images of shape [B, 1, {IMAGE_SIZE}, {IMAGE_SIZE}], "
                f"not {list(images_BCHW.shape)}"
            )
        levels_BCHW = (images_BCHW.float() + 1.0) * ((GREY_LEVELS - 1) / 2)
        return levels_BCHW.round().clamp_(0, GREY_LEVELS - 1).long().flatten(1)

    def decode(self, codes_BL: torch.Tensor) -> torch.Tensor:
        """Images [B, 1, 8, 8] float32 in [-1, 1] of codes [B, 64] of any integer dtype."""
        if codes_BL.ndim != 2 or codes_BL.shape[1] != IMAGE_SIZE**2:
            raise ValueError(
                f"the digits tokenizer takes codes of shape [B, {IMAGE_SIZE**2}], not {list(codes_BL.shape)}"
            )
        images_BL = checked_codes(codes_BL, GREY_LEVELS).float() * (2 / (GREY_LEVELS - 1)) - 1.0
        return images_BL.view(-1, 1, IMAGE_SIZE, IMAGE_SIZE)

    def hash(self) -> str:
        """SHA-256 of the tokenizer's definition, in hexadecimal (it has no weights to hash)."""
        return hashlib.sha256(f"digits {IMAGE_SIZE}x{IMAGE_SIZE} levels={GREY_LEVELS} raster".encode()).hexdigest()


def load_digit_images() -> tuple[torch.Tensor, torch.Tensor]:
    """scikit-learn's digits in its order: images [1797, 1, 8, 8] float32 in [-1, 1], labels [1797] int64."""
    from sklearn.datasets import load_digits  # takes half a second to import, and most runs do not need it

    digits = load_digits()
    images_BCHW = torch.from_numpy(digits.images).float()[:, None] * (2 / (GREY_LEVELS - 1)) - 1.0
    return images_BCHW, torch.from_numpy(digits.target).long()


def builtin_codes(cache_folder: Path) -> Path:
    """The folder of the table of scikit-learn's 1,797 digits, written below `cache_folder` at the first call.

    Where another process writes it at the same time, the first table is kept. The tokenizer's hash is in the name, so
    that another definition of it has another table. Raises CodesError where it cannot be written.
    """
    tokenizer = DigitsTokenizer()
    folder = Path(cache_folder) / f"{DIGITS.name}-{tokenizer.hash()[:12]}"
    if folder.exists():
        return folder
    images_BCHW, labels_B = load_digit_images()
    try:
        write_codes(
            folder,
            tokenizer.encode(images_BCHW)[:, None].numpy(),
            labels_B.numpy(),
            vocab_size=tokenizer.vocab_size,
            classes=10,
            family=DIGITS.family,
            tokenizer=DIGITS.name,
            tokenizer_hash=tokenizer.hash(),
            class_names=tuple(str(digit) for digit in range(10)),
        )
    except CodesError:
        if not folder.exists():
            raise
    return folder


DIGITS = TOKENIZERS.register(
    TokenizerSpec(
        name="digits",
        build=DigitsTokenizer,
        needs_weights=False,
        family="llamagen",
        image_mode="L",
        builtin_codes=builtin_codes,
        builtin_images=1797,
    )
)
