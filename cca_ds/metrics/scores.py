"""All metrics of a set of samples against a reference, with notes on how far they can be compared.

N samples, D features.
"""

import warnings
from typing import NamedTuple

import numpy as np

from cca_ds.metrics.digits_classifier import class_accuracy
from cca_ds.metrics.extraction import Features
from cca_ds.metrics.frechet import (
    FeatureStatistics,
    SingularCovarianceWarning,
    feature_statistics,
    frechet_distance_of_statistics,
)
from cca_ds.metrics.inception_score import inception_score
from cca_ds.metrics.precision_recall import precision_recall

MINIMUM = 2  # images that a covariance needs
SPLIT = 5000  # images per split of the inception score


class Reference(NamedTuple):
    """Statistics of the real images, and their features when the images themselves are given."""

    pool: FeatureStatistics
    spatial: FeatureStatistics | None
    features_ND: np.ndarray | None  # for precision and recall, which need more than statistics


class Scores(NamedTuple):
    """Values by metric, None for one that cannot be computed, and notes on their comparability."""

    values: dict[str, float | None]
    notes: list[str]


def reference_of(features: Features) -> Reference:
    """Statistics of the features of real images, N of at least 2."""
    spatial = None if features.spatial_NS is None else feature_statistics(features.spatial_NS)
    return Reference(feature_statistics(features.pool_ND), spatial, features.pool_ND)


def score(samples: Features, reference: Reference, labels_N: np.ndarray | None = None, device: str = "cpu") -> Scores:
    """FID, sFID, inception score, precision, recall, and class accuracy when labels are given.

    Args:
        samples: features of the generated images.
        reference: of the real images, by the same network.
        labels_N: the generated images' classes, numbered as the network's.
        device: where the distances for precision and recall are computed.

    Returns:
        "sfid" is left out without spatial features, "class_accuracy" without labels; "precision" and "recall" are
        None when the reference has statistics only.

    Raises:
        ValueError: fewer than two samples, or features of another width than the reference's.
    """
    count, width = samples.pool_ND.shape
    if count < MINIMUM:
        raise ValueError(f"{count} image: a Frechet distance needs at least {MINIMUM}")
    notes = []
    if count <= width:
        notes.append(f"{count} images are no more than the {width} features: FID is biased upwards, not comparable")
    values: dict[str, float | None] = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", SingularCovarianceWarning)
        values["fid"] = frechet_distance_of_statistics(feature_statistics(samples.pool_ND), reference.pool)
        if samples.spatial_NS is not None and reference.spatial is not None:
            values["sfid"] = frechet_distance_of_statistics(feature_statistics(samples.spatial_NS), reference.spatial)
    notes += list(dict.fromkeys(str(warning.message) for warning in caught))
    values["inception_score"] = inception_score(samples.probabilities_NK, SPLIT)
    values["precision"] = values["recall"] = None
    if reference.features_ND is None:
        notes.append("the reference holds statistics without images: no precision and recall")
    else:
        values |= precision_recall(reference.features_ND, samples.pool_ND, device=device)._asdict()
    if labels_N is not None:
        values["class_accuracy"] = class_accuracy(samples.probabilities_NK, labels_N)
    return Scores(values, notes)


def order_note(labels_N: np.ndarray | None) -> list[str]:
    """A note when the images are sorted by class, which lowers the inception score: a mean over consecutive splits."""
    if labels_N is None or len(labels_N) <= SPLIT or labels_N[0] == labels_N[-1]:
        return []
    if (np.diff(labels_N.astype(np.int64)) < 0).any():
        return []
    return [f"images are in the order of their classes: a split of {SPLIT} for the inception score holds few; shuffle"]
