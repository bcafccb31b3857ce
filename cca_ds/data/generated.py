"""Images that the reference drew, as the rejected half of a training pair (DDO, arXiv 2503.01103).

Letters: N images of the data set, G drawn images, B pairs, L codes per image.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cca_ds.data.codes import CodeTable
from cca_ds.data.manifest import MANIFEST_NAME, CodesError

ONLINE = "online"  # as `data.generated`: each step's images are drawn when they are needed
# How the images have to be drawn: from the model's own distribution, which the loss compares with the data's.
PLAIN = {"guidance_scale": 0.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0}


class GeneratedCodes:
    """A drawn image of the same class for each image of the data, another one in each epoch.

    The j-th of a class's n images takes, in epoch e, drawn image (j + e n) modulo the number drawn of that class: each
    is used once before any is used again, and which one it is depends on the image and the epoch alone.

    Args:
        table: the drawn images.
        labels_N: labels of the data.

    Raises:
        CodesError: a class of the data of which no image was drawn.
    """

    def __init__(self, table: CodeTable, labels_N: np.ndarray):
        self.table, self.labels_N = table, np.asarray(labels_N, np.int64)
        classes = int(self.labels_N.max()) + 1
        self._of_class = _Grouped(table.labels, classes)
        self._data = _Grouped(self.labels_N, classes)
        lacking = np.flatnonzero((self._data.counts > 0) & (self._of_class.counts == 0))
        if len(lacking):
            raise CodesError(
                f"{table.folder}: has no image of class {lacking[0]} ({len(lacking)} classes of the data are missing): "
                "draw all classes with cca-sample --codes"
            )

    def rows(self, indices_B: np.ndarray, epoch: int) -> np.ndarray:
        """Rows [B] of `table` for the images [B] of the data, in epoch `epoch`."""
        labels_B = self.labels_N[indices_B]
        passed = self._data.counts[labels_B] * epoch
        places_B = (self._data.place_N[indices_B] + passed) % self._of_class.counts[labels_B]
        return self._of_class.order[self._of_class.starts[labels_B] + places_B]

    def take(self, indices_B: np.ndarray, epoch: int) -> np.ndarray:
        """Codes [B, L] int64 for the images [B] of the data, in epoch `epoch`. Raises what `CodeTable.take` raises."""
        return self.table.take(self.rows(indices_B, epoch))[0]


class _Grouped:
    """Rows by class: `order` holds those of class 0, then of class 1, ...; `place_N` is a row's place in its class."""

    def __init__(self, labels_N: np.ndarray, classes: int):
        kept = np.flatnonzero(labels_N < classes)
        self.order = kept[np.argsort(labels_N[kept], kind="stable")]
        self.counts = np.bincount(labels_N[kept], minlength=classes)
        self.starts = np.cumsum(self.counts) - self.counts
        self.place_N = np.zeros(len(labels_N), np.int64)
        self.place_N[self.order] = np.arange(len(self.order)) - np.repeat(self.starts, self.counts)


def open_generated(folder: Path, data: CodeTable) -> GeneratedCodes:
    """The drawn images of `folder` for training on `data`.

    Raises:
        CodesError: no table of drawn images, one of another tokenizer, or one that was drawn with guidance or cut
            distributions.
    """
    if not (folder / MANIFEST_NAME).is_file():
        raise CodesError(f"data.generated={folder}: holds no table of codes; draw one with cca-sample --codes")
    table = CodeTable.open(folder)
    manifest, of_data = table.manifest, data.manifest
    if not manifest.drawn:
        raise CodesError(f"data.generated={folder}: holds encoded images; draw some with cca-sample --codes")
    if not isinstance(manifest.drawn.get("weights_sha256"), str):
        raise CodesError(f"data.generated={folder}: does not say which weights drew it; draw it again with cca-sample")
    shape = (manifest.sequence_length, manifest.vocab_size)
    if shape != (of_data.sequence_length, of_data.vocab_size):
        raise CodesError(
            f"data.generated={folder}: {shape[0]} codes an image from a vocabulary of {shape[1]}, but data.codes has "
            f"{of_data.sequence_length} from {of_data.vocab_size}: draw them from the reference"
        )
    hashes = {manifest.tokenizer_hash, of_data.tokenizer_hash} - {""}
    if len(hashes) > 1:
        raise CodesError(
            f"data.generated={folder}: its codes are of another tokenizer than data.codes: draw them with the "
            "tokenizer.weights that made data.codes"
        )
    require_plain(manifest.drawn, f"data.generated={folder}: was drawn with")
    return GeneratedCodes(table, data.labels)


def require_plain(settings: Mapping[str, Any], what: str) -> None:
    """Raise CodesError for images that are not from the model's own distribution; `what` begins the message."""
    odd = {name: value for name, value in PLAIN.items() if settings.get(name) != value}
    if odd:
        found = ", ".join(f"sampling.{name}={settings.get(name)}" for name in odd)
        remedy = " ".join(f"sampling.{name}={value:g}" for name, value in odd.items())
        raise CodesError(f"{what} {found}, and the loss needs the model's own distribution: draw with --set {remedy}")


def require_drawn_by(generated: GeneratedCodes, weights_sha256: str) -> None:
    """Raise CodesError for images that another model drew.

    Args:
        weights_sha256: `state_hash` of the reference's parameters.
    """
    drawn = generated.table.manifest.drawn
    if drawn["weights_sha256"] != weights_sha256:
        raise CodesError(
            f"data.generated={generated.table.folder}: was drawn by other weights (sha256 "
            f"{drawn['weights_sha256'][:12]}) than the reference's ({weights_sha256[:12]}): draw again with cca-sample "
            "--codes --weights, or set reference.weights to what drew it"
        )
