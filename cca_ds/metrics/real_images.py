"""Statistics of one's own real images, for `evaluate --reference`: read and cropped as `encode` does.

N images, S side of a crop, D features.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cca_ds.data.crops import CropSettings
from cca_ds.data.image_encoder import CropReader
from cca_ds.data.image_sources import ImageSource
from cca_ds.files import write_streamed
from cca_ds.metrics.extraction import Features
from cca_ds.metrics.image_sets import ImagesError
from cca_ds.metrics.scores import MINIMUM, reference_of

KEPT_IMAGES = 10_000  # in the file, for precision and recall; as many as in ADM's reference batches
MAX_MEGAPIXELS = 90.0


class CroppedImages:
    """The centre crops of a source's images, as `metrics.image_sets.Images`.

    An image that cannot be read is left out, and named in `skipped`.

    Args:
        source: any that encode takes.
        crops: centre crops, of kind "none".
        threads: that read, decode and crop.
    """

    def __init__(self, source: ImageSource, path: Path, crops: CropSettings, threads: int):
        side, mode = crops.image_size, crops.mode
        self.path, self.source, self.count = path, source, len(source)
        self.shape = (side, side, {"RGB": 3, "L": 1}[mode])
        self.labels_N = np.asarray(source.labels_N)
        self.skipped: list[str] = []
        self._read = CropReader(source, crops, threads, MAX_MEGAPIXELS)

    def batches(self, start: int, stop: int, size: int) -> Iterator[np.ndarray]:
        """Images `start` to `stop`, uint8 [B, S, S, C] with B of at most `size`."""
        waiting: list[np.ndarray] = []
        for index, found in self._read(range(start, stop), ahead=size):
            if isinstance(found, str):
                self.skipped.append(f"{self.source.name(index)}: {found}")
                continue
            waiting.append(found[0][0])
            if len(waiting) == size:
                yield np.stack(waiting)
                waiting.clear()
        if waiting:
            yield np.stack(waiting)

    def sha256(self) -> str:
        """Hash of the source's names and sizes, hexadecimal."""
        return self.source.fingerprint()

    def evenly(self, most: int) -> tuple[np.ndarray, np.ndarray]:
        """At most `most` images spread over all, uint8 [n, S, S, C], and their labels [n]."""
        indices = np.unique(np.linspace(0, self.count - 1, min(most, self.count)).round().astype(int)).tolist()
        kept = [(found[0][0], index) for index, found in self._read(indices) if not isinstance(found, str)]
        return np.stack([image for image, _ in kept]), self.labels_N[[index for _, index in kept]]


def write_reference(
    output: Path, images: CroppedImages, features: Features, skipped: list[str], about: dict[str, Any]
) -> str:
    """Write an .npz of statistics of all images and some of the images themselves, whole or not at all.

    The arrays are those of ADM's reference batches: mu [D], sigma [D, D], and mu_s, sigma_s of the spatial features
    where the network has them; arr_0 and arr_1, images and labels; and `about`, a JSON text of where they come from.

    Args:
        features: of all images.
        skipped: name and reason of each image that is left out.
        about: network, its weights, recipe.

    Returns:
        One line that describes the file.

    Raises:
        ImagesError: too few images.
        OSError: the file cannot be written.
    """
    count, width = features.pool_ND.shape
    if count < MINIMUM:
        raise ImagesError(f"{images.path}: {count} image that can be read: statistics need at least {MINIMUM}")
    found = reference_of(features)
    kept, labels = images.evenly(KEPT_IMAGES)
    arrays = {"mu": found.pool.mean_D, "sigma": found.pool.covariance_DD, "arr_0": kept, "arr_1": labels}
    if found.spatial is not None:
        arrays |= {"mu_s": found.spatial.mean_D, "sigma_s": found.spatial.covariance_DD}
    about = {**about, "source": images.path.name, "images": count, "side": images.shape[0], "skipped": skipped}
    output.parent.mkdir(parents=True, exist_ok=True)
    write_streamed(output, lambda file: np.savez(file, about=np.array(json.dumps(about)), **arrays))
    left = f"; {len(skipped)} left out, which cannot be read ({skipped[0]})" if skipped else ""
    few = f"; {count} images are no more than the {width} features: FID is biased upwards" if count <= width else ""
    return f"{output}: statistics of {count} images of {images.shape[0]} pixels, {len(kept)} of them kept{left}{few}"
