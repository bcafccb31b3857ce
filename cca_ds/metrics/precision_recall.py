"""Improved precision and recall (Kynkaanniemi et al. 2019) as the ADM evaluator has them: 3 neighbours.

A set's manifold is the union of balls around its points, each reaching the point's third nearest neighbour in
the set. Precision is the share of samples inside the reference's manifold, recall the share of references
inside the samples'. Distances are taken block by block: 50,000 against 50,000 features of 2048, whose distances
at once would be 10 GB, peak at 2.1 GiB, features included (measured on the first and last blocks of 5,000).

The original rounds each distance to float16 where that does not overflow; here they are float32, or float64
for float64 features, and the result does not depend on the size of the blocks.

N reference vectors, M samples, D numbers each.
"""

from typing import NamedTuple

import numpy as np
import torch

NEIGHBOURS = 3


class PrecisionRecall(NamedTuple):
    """Both between 0 and 1."""

    precision: float
    recall: float


def precision_recall(
    reference_features: np.ndarray,
    sample_features: np.ndarray,
    neighbours: int = NEIGHBOURS,
    block: int = 5000,
    device: str | torch.device = "cpu",
) -> PrecisionRecall:
    """Precision and recall of samples [M, D] against references [N, D]; squared distances in blocks.

    Raises ValueError when a set has no more vectors than `neighbours` or the widths differ.
    """
    reference_ND, sample_MD = _centred(reference_features, sample_features, device)
    if min(len(reference_ND), len(sample_MD)) <= neighbours:
        raise ValueError(
            f"{len(reference_ND)} reference and {len(sample_MD)} sample vectors: each set needs more than {neighbours}"
        )
    reference_radii_N = _squared_radii(reference_ND, neighbours, block)
    sample_radii_M = _squared_radii(sample_MD, neighbours, block)
    sample_inside_M = torch.zeros(len(sample_MD), dtype=torch.bool, device=device)
    reference_inside_N = torch.zeros(len(reference_ND), dtype=torch.bool, device=device)
    for rows in _blocks(len(reference_ND), block):
        for columns in _blocks(len(sample_MD), block):
            squared = _squared_distances(reference_ND[rows], sample_MD[columns])
            reference_inside_N[rows] |= (squared <= sample_radii_M[columns]).any(dim=1)
            sample_inside_M[columns] |= (squared <= reference_radii_N[rows, None]).any(dim=0)
    return PrecisionRecall(sample_inside_M.double().mean().item(), reference_inside_N.double().mean().item())


def _centred(
    reference: np.ndarray, sample: np.ndarray, device: str | torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both sets minus the references' mean: |u|^2 - 2 u.v + |v|^2 then cancels fewer digits."""
    sets = [torch.as_tensor(np.asarray(features)) for features in (reference, sample)]
    if any(features.ndim != 2 for features in sets) or sets[0].shape[1] != sets[1].shape[1]:
        raise ValueError(f"features of shapes {tuple(sets[0].shape)} and {tuple(sets[1].shape)}: [N, D] and [M, D]")
    dtype = torch.float64 if all(features.dtype == torch.float64 for features in sets) else torch.float32
    centre_D = sets[0].mean(dim=0, dtype=torch.float64)
    reference_ND, sample_MD = (features.to(device, dtype) - centre_D.to(device, dtype) for features in sets)
    return reference_ND, sample_MD


def _squared_radii(features_ND: torch.Tensor, neighbours: int, block: int) -> torch.Tensor:
    """Squared distance of every vector to its `neighbours`-th nearest other one, [N]."""
    radii_N = torch.empty(len(features_ND), dtype=features_ND.dtype, device=features_ND.device)
    for rows in _blocks(len(features_ND), block):
        # one more than the neighbours: the nearest is the vector itself
        smallest = features_ND.new_full((len(radii_N[rows]), neighbours + 1), torch.inf)
        for columns in _blocks(len(features_ND), block):
            squared = _squared_distances(features_ND[rows], features_ND[columns])
            nearest = squared.topk(min(neighbours + 1, squared.shape[1]), dim=1, largest=False).values
            smallest = torch.cat([smallest, nearest], dim=1).topk(neighbours + 1, dim=1, largest=False).values
        radii_N[rows] = smallest.amax(dim=1)
    return radii_N


def _squared_distances(a_ND: torch.Tensor, b_MD: torch.Tensor) -> torch.Tensor:
    """Squared Euclidean distances [N, M]."""
    squared_NM = torch.addmm(b_MD.square().sum(dim=1)[None, :], a_ND, b_MD.T, alpha=-2)
    return squared_NM.add_(a_ND.square().sum(dim=1)[:, None]).clamp_(min=0)


def _blocks(length: int, block: int) -> list[slice]:
    return [slice(start, min(start + block, length)) for start in range(0, length, block)]
