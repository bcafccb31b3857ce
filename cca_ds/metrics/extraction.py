"""Images -> features, by the network that scores them: one record per network, and its run over a set of images.

N images, B of them in a batch, H height, W width, C channels, D features, S spatial features, K classes.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from cca_ds.config.variants import Registry
from cca_ds.metrics.digits_classifier import LEVELS, digits_classifier
from cca_ds.metrics.image_sets import Images, ImagesError

Progress = Callable[[Iterable[np.ndarray], int], Iterable[np.ndarray]]


class Features(NamedTuple):
    """A network's outputs for N images, float32."""

    pool_ND: np.ndarray  # FID, precision and recall
    spatial_NS: np.ndarray | None  # sFID; the Inception network's only
    probabilities_NK: np.ndarray  # inception score and class accuracy


class Extractor(Protocol):
    """A network with its weights."""

    name: str  # for reports
    identity: str  # of the network and its weights: features of another identity are not comparable
    width: int  # D
    spatial: str | None  # the layer of the spatial features, for reports
    resize: str | None  # how images are resized, for reports
    published: bool | None  # whether the weights are the published ones; None without such

    def check(self, shape: tuple[int, int, int]) -> None:
        """Raise ImagesError when images of this (H, W, C) cannot be scored."""

    def __call__(self, images_BHWC: np.ndarray) -> Features:
        """Features of images uint8 [B, H, W, C] with C of 1 or 3."""


class DigitsExtractor:
    """The digits' classifier; images are 8 x 8 with grey levels k stored as round(k * 255 / 16)."""

    name = "digits classifier (MLP, 64 tanh units, trained on scikit-learn's 1,797 digits)"
    width = 64
    spatial = resize = published = None

    def __init__(self) -> None:
        self.identity = f"digits-{digits_classifier().sha256()}"

    def check(self, shape: tuple[int, int, int]) -> None:
        """Raise ImagesError for images of another size than 8 x 8."""
        if shape[:2] != (8, 8):
            raise ImagesError(f"images of {shape[1]} x {shape[0]}: the digits are 8 x 8; choose another --recipe")

    def __call__(self, images_BHWC: np.ndarray) -> Features:
        """Features of the first channel's grey levels; D = 64, K = 10."""
        levels_BHW = np.rint(images_BHWC[..., 0].astype(np.float64) * (LEVELS - 1) / 255).astype(np.int64)
        return digits_features(levels_BHW)


class InceptionExtractor:
    """The FID Inception network on one device.

    Args:
        weights: the published weights file.
        device: "cpu", "cuda" or "cuda:N".

    Raises:
        InceptionWeightsError: the file is missing or holds other weights.
    """

    name = "Inception 2015-12-05 (torch-fidelity's FID-compatible weights)"
    width = 2048
    spatial = "mixed_6/conv, 7 channels x 17 x 17 = 2023, NHWC"
    resize = "TensorFlow 1 bilinear to 299 x 299"

    def __init__(self, weights: str | Path | None, device: str = "cpu"):
        from cca_ds.files import file_hash
        from cca_ds.metrics.inception import WEIGHTS_SHA256, load_inception

        self.device, self.network = device, load_inception(weights, device)
        assert weights is not None
        sha256 = file_hash(weights)
        self.published: bool | None = sha256 == WEIGHTS_SHA256
        self.identity = f"inception-{sha256}"

    def check(self, shape: tuple[int, int, int]) -> None:
        """Images of any size can be scored: they are resized to 299 x 299."""

    def __call__(self, images_BHWC: np.ndarray) -> Features:
        """Features of the images; D = 2048, S = 2023, K = 1008."""
        import torch

        if images_BHWC.shape[-1] == 1:
            images_BHWC = np.repeat(images_BHWC, 3, axis=-1)
        images_BCHW = torch.from_numpy(np.array(images_BHWC)).permute(0, 3, 1, 2).to(self.device)
        return Features(*(part.float().cpu().numpy() for part in self.network(images_BCHW)))


@dataclass(frozen=True)
class ScoringNetwork:
    """Which network scores the images of a tokenizer, and what it knows about them.

    Attributes:
        name: the tokenizer (recipe key tokenizer.name).
        build: (Inception weights file or None, device) -> the network.
        real_features: features of real images that come with the package; None: the user gives --reference.
        real_images: what those images are, for reports.
        label_classes: how many classes the network has, where they are the images' labels: class accuracy is computed.
    """

    name: str
    build: Callable[[str | None, str], Extractor]
    real_features: Callable[[], Features] | None = None
    real_images: str | None = None
    label_classes: int | None = None


# of tokenizers whose images are not scored by Inception
NETWORKS: Registry[ScoringNetwork] = Registry("tokenizer.name")
NETWORKS.register(
    ScoringNetwork(
        "digits",
        build=lambda weights, device: DigitsExtractor(),
        real_features=lambda: digits_features(digits_classifier().reference_codes),
        real_images="scikit-learn's 1,797 digits",
        label_classes=10,
    )
)
INCEPTION = ScoringNetwork("inception", build=InceptionExtractor)  # its 1,008 classes are in another order


def network_for(tokenizer: str) -> ScoringNetwork:
    """The network that scores the images of a tokenizer: its own where one is registered, else Inception."""
    return NETWORKS.get(tokenizer, INCEPTION)


def digits_features(codes: np.ndarray) -> Features:
    """Features of digits given as grey levels [N, 64] or [N, 8, 8]."""
    classifier = digits_classifier()
    return Features(
        classifier.features(codes).astype(np.float32), None, classifier.probabilities(codes).astype(np.float32)
    )


def extract(
    images: Images, extractor: Extractor, batch_size: int, progress: Progress, rank: int = 0, ranks: int = 1
) -> Features | None:
    """Features of this rank's share of the images; None when it has none that can be read.

    Args:
        images: the whole set; rank r of W takes images N r / W to N (r + 1) / W, so that `join` restores the order.
        extractor: the network.
        batch_size: images per forward.
        progress: wraps the batches, given their number, e.g. under a progress bar.

    Raises:
        ImagesError: an image cannot be read, or the network cannot score images of this size.
    """
    extractor.check(images.shape)
    start, stop = images.count * rank // ranks, images.count * (rank + 1) // ranks
    if start == stop:
        return None
    batches = progress(images.batches(start, stop, batch_size), -(-(stop - start) // batch_size))
    found = [extractor(batch) for batch in batches]
    return join(found) if found else None


def join(parts: list[Features | None]) -> Features:
    """Concatenate consecutive parts; at least one must not be None."""
    parts = [part for part in parts if part is not None]
    spatial = [part.spatial_NS for part in parts if part.spatial_NS is not None]
    return Features(
        np.concatenate([part.pool_ND for part in parts]),
        np.concatenate(spatial) if spatial else None,
        np.concatenate([part.probabilities_NK for part in parts]),
    )
