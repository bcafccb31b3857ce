"""Images -> features, by the network that belongs to them, and the cache of features beside the images.

N images, B of them in a batch, D features, S spatial features, K classes.
"""

import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from cca_ds.files import write_streamed
from cca_ds.metrics.features import LEVELS, digits_classifier
from cca_ds.metrics.images import Images, ImagesError

Progress = Callable[[Iterable[np.ndarray], int], Iterable[np.ndarray]]


class Features(NamedTuple):
    """What a network makes of images, float32; spatial features are the Inception network's only."""

    pool_ND: np.ndarray
    spatial_NS: np.ndarray | None
    probabilities_NK: np.ndarray


class Extractor(Protocol):
    """A network that scores images."""

    name: str
    identity: str  # of the network and its weights: features of another identity are not comparable
    width: int  # D

    def check(self, shape: tuple[int, int, int]) -> None:
        """Raises ImagesError for images of a height, width and number of channels that it cannot take."""

    def __call__(self, images_BHWC: np.ndarray) -> Features:
        """Features of uint8 images."""


class DigitsExtractor:
    """The digits' classifier; images are 8 x 8 with grey levels k stored as round(k * 255 / 16)."""

    name = "digits classifier (MLP, 64 tanh units, trained on scikit-learn's 1,797 digits)"
    width = 64

    def __init__(self) -> None:
        self.identity = f"digits-{digits_classifier().sha256()}"

    def check(self, shape: tuple[int, int, int]) -> None:
        if shape[:2] != (8, 8):
            raise ImagesError(
                f"images of {shape[1]} x {shape[0]}: the digits are 8 x 8; choose another --recipe"
            )

    def __call__(self, images_BHWC: np.ndarray) -> Features:
        levels_BHW = np.rint(images_BHWC[..., 0].astype(np.float64) * (LEVELS - 1) / 255).astype(np.int64)
        return digits_features(levels_BHW)


class InceptionExtractor:
    """The FID Inception network on one device."""

    name = "Inception 2015-12-05 (torch-fidelity's FID-compatible weights)"
    width = 2048

    def __init__(self, weights: str | Path | None, device: str = "cpu"):
        from cca_ds.metrics.inception import WEIGHTS_SHA256, load_inception, sha256_of

        self.device, self.network = device, load_inception(weights, device)
        assert weights is not None
        self.weights_sha256 = sha256_of(weights)
        self.published = self.weights_sha256 == WEIGHTS_SHA256
        self.identity = f"inception-{self.weights_sha256}"

    def check(self, shape: tuple[int, int, int]) -> None:
        """Any size is resized to 299 x 299."""

    def __call__(self, images_BHWC: np.ndarray) -> Features:
        import torch

        if images_BHWC.shape[-1] == 1:
            images_BHWC = np.repeat(images_BHWC, 3, axis=-1)
        images_BCHW = torch.from_numpy(np.array(images_BHWC)).permute(0, 3, 1, 2).to(self.device)
        return Features(*(part.float().cpu().numpy() for part in self.network(images_BCHW)))


def digits_features(codes: np.ndarray) -> Features:
    """Features of digits given as grey levels [N, 64] or [N, 8, 8]."""
    classifier = digits_classifier()
    return Features(
        classifier.features(codes).astype(np.float32),
        None,
        classifier.probabilities(codes).astype(np.float32),
    )


def extract(
    images: Images, extractor: Extractor, batch_size: int, progress: Progress, rank: int = 0, ranks: int = 1
) -> Features:
    """Features of this rank's part of the images: consecutive ones, in order, so that parts can be joined."""
    extractor.check(images.shape)
    start, stop = images.count * rank // ranks, images.count * (rank + 1) // ranks
    batches = progress(images.batches(start, stop, batch_size), -(-(stop - start) // batch_size))
    return join([extractor(batch) for batch in batches])


def join(parts: list[Features]) -> Features:
    """Consecutive parts as one; a rank without images contributes nothing."""
    spatial = [part.spatial_NS for part in parts if part.spatial_NS is not None]
    return Features(
        np.concatenate([part.pool_ND for part in parts]),
        np.concatenate(spatial) if spatial else None,
        np.concatenate([part.probabilities_NK for part in parts]),
    )


def cache_path(images: Images) -> Path:
    """Where the features of these images are kept: beside the archive, or inside the folder."""
    if images.path.is_dir():
        return images.path / "features.npz"
    return images.path.with_name(f"{images.path.stem}.features.npz")


def load_cached(path: Path, key: str) -> Features | None:
    """Features stored under this very key (of images and network), or None."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if str(arrays["key"]) != key:
                return None
            spatial_NS = arrays.get("spatial")
            return Features(arrays["pool"], spatial_NS, arrays["probabilities"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None  # missing, or cut short by something that is not this program: computed again


def store_cached(path: Path, key: str, features: Features) -> None:
    """Write the features under their key, whole or not at all; OSError where the folder is read-only."""
    arrays = {"pool": features.pool_ND, "probabilities": features.probabilities_NK}
    if features.spatial_NS is not None:
        arrays["spatial"] = features.spatial_NS
    write_streamed(path, lambda file: np.savez(file, key=np.array(key), **arrays))
