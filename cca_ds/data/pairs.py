"""Positive and negative conditions of a global batch (arXiv 2410.09347, section 4.1), in NumPy.

Letters: N images of the data set, K pairs of a global batch.

Every value depends on (seed, epoch, sample index) or on the whole global batch, never on a rank or a micro-batch, so a
partition of the batch over ranks changes no pair, negative, mask or crop.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# One stream of random numbers per purpose: drawing more from one does not change another.
MASK_STREAM, CROP_STREAM, LAMBDA_STREAM, GFT_STREAM = 1, 2, 3, 4
LOG_LAMBDA_RANGE = (0.0, 9.0)  # lambda from 1 to e^9, log-uniformly (Table 5)


@dataclass(frozen=True)
class PairBatch:
    """K pairs of an image with its own label and with another one's.

    A pair with `positive_mask_K` set has no negative: its labels are masked, or both are the same. Of a loss that takes
    no other labels both are always the same, and the mask is the label's alone.
    """

    sample_indices_K: np.ndarray  # int64, rows of the table
    crops_K: np.ndarray  # int64, crop of each image
    positive_labels_K: np.ndarray  # int64, the null class if masked
    negative_labels_K: np.ndarray  # int64
    null_mask_K: np.ndarray  # bool, both labels masked to the null class
    positive_mask_K: np.ndarray  # bool, null, or c' == c where c' should differ
    log_lambda_K: np.ndarray  # float64, for lambda-conditioned models
    gft_beta_K: np.ndarray  # float64, uniform in [0, 1), for GFT

    def __getitem__(self, rows: slice) -> PairBatch:
        """The pairs at these positions."""
        return PairBatch(*(getattr(self, field)[rows] for field in self.__dataclass_fields__))


def epoch_order(images: int, seed: int, epoch: int) -> np.ndarray:
    """Order of the images in an epoch, a permutation [N] int64 drawn from (seed, epoch)."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(images)


def sample_uniforms(seed: int, epoch: int, sample_indices: np.ndarray, stream: int) -> np.ndarray:
    """One float64 in [0, 1) per sample, a hash of (seed, epoch, stream, sample index).

    The hash is the finaliser of SplitMix64 (Steele, Lea, Flood 2014), applied once to each of the four.
    """
    state = np.zeros(len(sample_indices), dtype=np.uint64)
    for word in (seed, epoch, stream, np.asarray(sample_indices)):
        state = _mix(state ^ np.asarray(word).astype(np.uint64))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(state: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser of uint64 values."""
    with np.errstate(over="ignore"):
        state = state + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def negative_labels(labels_K: np.ndarray) -> np.ndarray:
    """Negative label c' of each pair: the label of the next pair of the global batch, [K] -> [K]."""
    return np.roll(labels_K, -1)


def make_pairs(
    sample_indices_K: np.ndarray,
    labels_K: np.ndarray,
    *,
    null_class: int,
    mask_probability: float,
    crops: int,
    seed: int,
    epoch: int,
    contrastive: bool = True,
) -> PairBatch:
    """Pair every image of a global batch with its own label and with that of the next image.

    Args:
        sample_indices_K, labels_K: int64, in the epoch's order.
        null_class: replaces both labels of a pair with probability `mask_probability`.
        crops: per image in the table; one of them is drawn.
        contrastive: whether the loss takes other labels as negatives; False keeps each image's own.

    Raises:
        ValueError: every label of the batch is the same, so that no pair has a negative.
    """
    sample_indices_K, labels_K = np.asarray(sample_indices_K, np.int64), np.asarray(labels_K, np.int64)
    if contrastive and len(labels_K) and (labels_K == labels_K[0]).all():
        raise ValueError(
            f"all {len(labels_K)} labels of the batch are {labels_K[0]}: there is no negative; "
            "use data of several classes, a larger batch.global_size, or loss.name=mle"
        )
    draw = lambda stream: sample_uniforms(seed, epoch, sample_indices_K, stream)  # noqa: E731
    null_mask_K = draw(MASK_STREAM) < mask_probability
    negatives_K = negative_labels(labels_K) if contrastive else labels_K
    same_K = (negatives_K == labels_K) & contrastive
    low, high = LOG_LAMBDA_RANGE
    return PairBatch(
        sample_indices_K=sample_indices_K,
        crops_K=(draw(CROP_STREAM) * crops).astype(np.int64),
        positive_labels_K=np.where(null_mask_K, null_class, labels_K),
        negative_labels_K=np.where(null_mask_K, null_class, negatives_K),
        null_mask_K=null_mask_K,
        positive_mask_K=null_mask_K | same_K,
        log_lambda_K=low + (high - low) * draw(LAMBDA_STREAM),
        gft_beta_K=draw(GFT_STREAM),
    )
