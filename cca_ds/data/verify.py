"""Looking at a finished table: counts, ranges and histogram, and a grid of decoded images to look at."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from cca_ds.data.codes import CodesError, CodeTable
from cca_ds.files import write_atomic


def verify_table(
    table: CodeTable, tokenizer: nn.Module, device: str, png: str | Path, seed: int = 0
) -> list[str]:
    """Check a whole table and write a grid of 4 x 4 random crops, decoded, to `png`. Returns lines to print.

    Raises:
        CodesError: a difference from the manifest, or a tokenizer that did not make these codes.
    """
    manifest = table.manifest
    if manifest.tokenizer_hash and manifest.tokenizer_hash != tokenizer.hash():
        raise CodesError(
            f"{table.folder} was made by the tokenizer {manifest.tokenizer_hash[:12]}, this one is "
            f"{tokenizer.hash()[:12]}: give the weights that made it (--set tokenizer.weights=FILE)"
        )
    if tokenizer.vocab_size != manifest.vocab_size:
        raise CodesError(
            f"{table.folder} has a vocabulary of {manifest.vocab_size}, the tokenizer of {tokenizer.vocab_size}"
        )
    table.check()
    draw = np.random.default_rng(seed)
    rows = draw.integers(0, len(table), 16)
    codes_BL, labels_B = table.take(rows, draw.integers(0, manifest.crops, 16))
    with torch.inference_mode():
        images_BCHW = tokenizer.to(device).decode(torch.from_numpy(codes_BL).to(device)).float().cpu()
    write_atomic(png, _png_grid(images_BCHW))
    used = table.used_codes()
    counts = np.array(manifest.label_histogram)
    lines = [
        f"{len(table)} images, {manifest.classes} classes, {manifest.crops} crops of {manifest.sequence_length} codes",
        f"labels: {counts.min()} to {counts.max()} images a class, {int((counts == 0).sum())} classes without any",
        f"codes: {used} of {manifest.vocab_size} in use, all inside the vocabulary",
        f"hashes of {len(manifest.shards)} files agree; {manifest.skipped_images} images were skipped",
        f"grid: {png} (labels {', '.join(str(label) for label in labels_B.tolist())})",
    ]
    if not manifest.tokenizer_hash:
        lines.append("the codes were imported without their tokenizer: look at the grid")
    return lines


def _png_grid(images_BCHW: torch.Tensor, columns: int = 4) -> bytes:
    """PNG of images [B, C, H, W] in [-1, 1], B a multiple of `columns`, row by row."""
    pixels_BCHW = images_BCHW.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    count, channels, height, width = pixels_BCHW.shape
    grid = pixels_BCHW.view(count // columns, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    grid = grid.reshape(count // columns * height, columns * width, channels).numpy()
    content = io.BytesIO()
    Image.fromarray(grid[:, :, 0] if channels == 1 else grid).save(content, format="PNG")
    return content.getvalue()
