"""Metrics as pure functions of features: Frechet distance, inception score, precision, recall, accuracy."""

from cca_ds.metrics.digits_classifier import class_accuracy, digits_classifier
from cca_ds.metrics.frechet import FeatureStatistics, feature_statistics, frechet_distance
from cca_ds.metrics.inception_score import inception_score
from cca_ds.metrics.precision_recall import precision_recall

__all__ = [
    "FeatureStatistics",
    "class_accuracy",
    "digits_classifier",
    "feature_statistics",
    "frechet_distance",
    "inception_score",
    "precision_recall",
]
