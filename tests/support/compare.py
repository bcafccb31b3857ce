"""How far two tensors are apart."""

from torch import Tensor


def error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return float((found.detach().double() - expected.detach().double()).norm() / expected.detach().double().norm())
