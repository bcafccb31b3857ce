"""Verifying a finished table: hashes, counts and ranges, and a grid of decoded images for a person to look at."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from cca_ds.data.codes import CodeTable
from cca_ds.data.image_grid import encode_png, image_grid
from cca_ds.data.manifest import CodesError
from cca_ds.files import write_atomic

GRID_SIDE = 4  # images in a row and in a column


def verify_table(table: CodeTable, tokenizer: nn.Module, device: str, png: str | Path) -> list[str]:
    """Read a whole table, compare it with its manifest, and write a grid of 4 x 4 random crops, decoded, to `png`.

    Args:
        tokenizer: has `hash`, `vocab_size` and `decode`; is moved to `device`.

    Returns:
        Lines that describe the table and name the grid's labels.

    Raises:
        CodesError: a difference from the manifest, or a tokenizer that did not make these codes. OSError.
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
    draw = np.random.default_rng(0)
    rows = draw.integers(0, len(table), GRID_SIDE**2)
    codes_BL, labels_B = table.take(rows, draw.integers(0, manifest.crops, GRID_SIDE**2))
    with torch.inference_mode():
        images_BCHW = tokenizer.to(device).decode(torch.from_numpy(codes_BL).to(device)).float().cpu()
    write_atomic(png, encode_png(image_grid(images_BCHW, columns=GRID_SIDE)))
    used = table.used_codes()
    counts = np.array(manifest.label_histogram)
    lines = [
        f"{len(table)} images, {manifest.classes} classes, {manifest.crops} crops of {manifest.sequence_length} codes",
        f"labels: {counts.min()} to {counts.max()} images a class, {int((counts == 0).sum())} classes without any",
        f"codes: {used} of {manifest.vocab_size} in use, all inside the vocabulary",
        f"hashes of {len(manifest.shards)} files match; {manifest.skipped_images} images were skipped",
        f"grid: {png} (labels {', '.join(str(label) for label in labels_B.tolist())})",
    ]
    if not manifest.tokenizer_hash:
        lines.append("the codes were imported without their tokenizer: look at the grid")
    return lines
