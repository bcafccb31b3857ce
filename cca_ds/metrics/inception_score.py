"""Inception score: exp of the mean divergence of p(y|x) from p(y), averaged over splits (Salimans et al.).

Splits follow OpenAI's ADM evaluator: consecutive 5,000 images each, the last one shorter, all with equal
weight.

N images, C classes.
"""

import numpy as np


def inception_score(probabilities: np.ndarray, split_size: int = 5000) -> float:
    """Inception score of class probabilities [N, C], between 1 and C; a probability of zero adds nothing.

    Raises ValueError when the rows are not probabilities.
    """
    probabilities_NC = np.asarray(probabilities, dtype=np.float64)
    if probabilities_NC.ndim != 2 or len(probabilities_NC) == 0:
        raise ValueError(f"probabilities of shape {probabilities_NC.shape}: a non-empty [images, classes] is needed")
    if not (probabilities_NC >= 0).all() or np.abs(probabilities_NC.sum(axis=1) - 1).max() > 1e-3:
        raise ValueError("rows of the probabilities do not sum to one; give softmax outputs, not logits")
    starts = range(0, len(probabilities_NC), split_size)
    return float(np.mean([_score_of_split(probabilities_NC[start : start + split_size]) for start in starts]))


def _score_of_split(probabilities_NC: np.ndarray) -> float:
    """exp(mean_x KL(p(y|x) || p(y))) with p(y) the mean over this split."""
    marginal_C = probabilities_NC.mean(axis=0, keepdims=True)
    # 0 log 0 = 0; a class absent from the split has marginal 0 and only zero entries
    ratio_NC = np.divide(probabilities_NC, marginal_C, out=np.ones_like(probabilities_NC), where=probabilities_NC > 0)
    return float(np.exp((probabilities_NC * np.log(ratio_NC)).sum(axis=1).mean()))
