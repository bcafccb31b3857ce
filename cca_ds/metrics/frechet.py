"""Frechet distance between two sets of features (FID, sFID): features -> statistics -> number.

The distance of two Gaussians is |m_a - m_b|^2 + tr(S_a) + tr(S_b) - 2 tr((S_a S_b)^(1/2)) (Heusel et al.
2017, eq. 6); conventions (mean, covariance over n - 1) are those of OpenAI's ADM evaluator, guided-diffusion
evaluations/evaluator.py. The last trace is the sum of the square roots of the eigenvalues of S_a S_b, so no
matrix square root is taken.

N feature vectors, D numbers each.
"""

import warnings
from typing import NamedTuple

import numpy as np


class SingularCovarianceWarning(UserWarning):
    """A covariance has no full rank; the distance is still exact on the subspace it spans."""


class FeatureStatistics(NamedTuple):
    """Mean [D] and covariance [D, D] of a set of features, float64."""

    mean_D: np.ndarray
    covariance_DD: np.ndarray


def feature_statistics(features_ND: np.ndarray) -> FeatureStatistics:
    """Mean and unbiased covariance of features [N, D], computed in float64.

    Raises ValueError for fewer than two vectors, another shape than [N, D], or values that are not finite.
    """
    features_ND = np.asarray(features_ND, dtype=np.float64)
    if features_ND.ndim != 2 or len(features_ND) < 2:
        raise ValueError(f"features of shape {features_ND.shape}: at least two vectors, [N, D], are needed")
    if not np.isfinite(features_ND).all():
        raise ValueError("features hold NaN or infinite values; check the images and the network's weights")
    return FeatureStatistics(features_ND.mean(axis=0), np.atleast_2d(np.cov(features_ND, rowvar=False)))


def frechet_distance(features_a: np.ndarray, features_b: np.ndarray) -> float:
    """Frechet distance of two feature sets, [N_a, D] and [N_b, D]; 0 for equal means and covariances.

    Warns with `SingularCovarianceWarning` where a covariance has no full rank, as with N <= D.
    """
    return frechet_distance_of_statistics(feature_statistics(features_a), feature_statistics(features_b))


def frechet_distance_of_statistics(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Frechet distance of two Gaussians given by their statistics; ValueError when D differs."""
    if a.mean_D.shape != b.mean_D.shape or a.covariance_DD.shape != b.covariance_DD.shape:
        raise ValueError(
            f"statistics of {a.mean_D.shape[0]} and {b.mean_D.shape[0]} features cannot be compared; "
            "extract both with the same network and layer"
        )
    difference_D = a.mean_D - b.mean_D
    traces = np.trace(a.covariance_DD) + np.trace(b.covariance_DD)
    return float(difference_D @ difference_D + traces - 2.0 * _trace_of_root(a.covariance_DD, b.covariance_DD))


def _trace_of_root(a_DD: np.ndarray, b_DD: np.ndarray) -> float:
    """tr((A B)^(1/2)) of two positive semi-definite matrices.

    A B is similar to L^T B L with A = L L^T, which is symmetric: one Cholesky factor and one symmetric
    eigenvalue problem. That loses half the digits of eigenvalues near zero, so where A or B is singular the same
    sum is taken as the singular values of F_A^T F_B, of factors A = F_A F_A^T that are as wide as the ranks:
    exact zeros stay out of it.
    """
    factor_a, factor_b = _cholesky_or_none(a_DD), _cholesky_or_none(b_DD)
    if factor_a is not None and factor_b is not None:
        eigenvalues = np.linalg.eigvalsh(factor_a.T @ b_DD @ factor_a)
        return float(np.sqrt(np.clip(eigenvalues, 0.0, None)).sum())
    factor_a = _rank_factor(a_DD) if factor_a is None else factor_a
    factor_b = _rank_factor(b_DD) if factor_b is None else factor_b
    ranks = factor_a.shape[1], factor_b.shape[1]
    warnings.warn(
        f"singular covariance: ranks {ranks[0]} and {ranks[1]} of {len(a_DD)} features; the Frechet distance is "
        "that of the spanned subspaces; use more images than features",
        SingularCovarianceWarning,
        stacklevel=4,
    )
    return float(np.linalg.svd(factor_a.T @ factor_b, compute_uv=False).sum()) if min(ranks) else 0.0


def _cholesky_or_none(matrix_DD: np.ndarray) -> np.ndarray | None:
    """Lower Cholesky factor, or None where a pivot is zero to rounding: the matrix is singular."""
    try:
        factor = np.linalg.cholesky(matrix_DD)
    except np.linalg.LinAlgError:
        return None
    pivots = np.diagonal(factor) ** 2
    return factor if pivots.min() > _relative_rounding(matrix_DD) * pivots.max() else None


def _rank_factor(matrix_DD: np.ndarray) -> np.ndarray:
    """F [D, rank] with F F^T equal to the symmetric positive semi-definite matrix, to rounding."""
    eigenvalues, vectors = np.linalg.eigh(matrix_DD)
    kept = eigenvalues > _relative_rounding(matrix_DD) * max(eigenvalues[-1], 0.0)
    return vectors[:, kept] * np.sqrt(eigenvalues[kept])


def _relative_rounding(matrix_DD: np.ndarray) -> float:
    return len(matrix_DD) * np.finfo(np.float64).eps
