"""Images drawn from a model into a table of codes, undecoded: the rejected halves of DDO's pairs.

Letters: B images of a batch, L codes per image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cca_ds.data.manifest import Manifest
from cca_ds.data.table_builder import ShardContent, TablePlan, build_table
from cca_ds.models.registry import family_of_model
from cca_ds.sampling import generate

FREE = ("recipe", "weights", "versions")  # of the settings, what does not change an image
SHARDS, SMALLEST_SHARD, LARGEST_SHARD = 64, 256, 10_000  # images of a shard: what a kill loses at most


def draw_code_table(
    folder: Path,
    model: nn.Module,
    tokenizer: str,
    indices: Sequence[int],
    settings: Mapping[str, Any],
    batch_size: int,
    drawn: Mapping[str, Any],
    class_names: Sequence[str] = (),
    *,
    rank: int = 0,
    world_size: int = 1,
    cuda_graphs: bool = True,
) -> Manifest | None:
    """Draw images into the table `folder`, or continue it; ranks share its shards, and their number may change.

    Args:
        folder: appears when it is whole.
        model: in eval mode.
        tokenizer: name of the one that the codes are for.
        indices: of the images; image i is of class i modulo the number of classes, and depends on the seed and i alone.
        settings: keyword arguments of `generate`, with the seed.
        batch_size: images that the model samples at once; it does not change them.
        drawn: what the manifest records of the draw: hashes of the weights, settings; and the classes, if not all.
        class_names: in their order; empty where they are not known.
        rank, world_size: this process among those that draw.
        cuda_graphs: see `generate`.

    Returns:
        The manifest; None where other ranks are still working.

    Raises:
        CodesError: the folder holds something else; OSError.
    """

    def produce(rows: range, advance: Callable[[], object]) -> ShardContent:
        codes, own = [], indices[rows.start : rows.stop]
        for first in range(0, len(own), batch_size):
            part = own[first : first + batch_size]
            labels_B = torch.tensor([index % model.num_classes for index in part])
            codes_BL = generate(model, labels_B, image_indices_B=part, cuda_graphs=cuda_graphs, **settings)
            codes.append(codes_BL.cpu().numpy()[:, None].astype(np.uint16))
            for _ in part:
                advance()
        return ShardContent(np.concatenate(codes), np.array([index % model.num_classes for index in own]), [])

    labels = sorted({index % model.num_classes for index in indices})
    chosen = {} if len(labels) == model.num_classes else {"classes": labels}
    kept = {name: value for name, value in drawn.items() if name not in FREE} | chosen
    table = replace(
        Manifest.before_encoding(tokenizer, family_of_model(model).name, model.vocab_size, drawn["tokenizer_hash"]),
        classes=model.num_classes,
        crops=1,
        sequence_length=model.sequence_length,
        class_names=tuple(class_names),
        drawn=kept,
    )
    # by the number of images alone, so that any number of ranks continues the table
    each = min(max(len(indices) // SHARDS, SMALLEST_SHARD), LARGEST_SHARD)
    return build_table(folder, TablePlan(table, len(indices), each, {}), produce, 0.0, rank, world_size)
