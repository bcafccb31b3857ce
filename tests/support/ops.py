"""An op and its plain version against a definition in float64: values and gradients, per dtype."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import Tensor

from cca_ds.ops.library import backend, eager_ops
from tests.support.compare import error

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3}
VERSIONS = ("kernel", "eager")


@contextmanager
def using(version: str) -> Iterator[None]:
    """Run the body with the built kernels, or with every op's plain version; skips where no kernel is built."""
    if version == "kernel" and backend() == "torch":
        pytest.skip("the kernels are not built")
    with eager_ops() if version == "eager" else nullcontext():
        yield


def check_op(
    op: Callable[..., Tensor],
    definition: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    tolerance: float,
    gradient_tolerance: float | Sequence[float] | None = None,
) -> None:
    """`op` of the inputs against `definition` of the same numbers in float64: value, gradients of all inputs, dtypes.

    Errors are relative norms; that of a gradient is below `gradient_tolerance`, of all inputs or one each, by
    default twice `tolerance`.
    """
    exact = [x.double().clone().requires_grad_() for x in inputs]
    inputs = [x.clone().requires_grad_() for x in inputs]
    expected, found = definition(*exact), op(*inputs)
    assert found.dtype == inputs[0].dtype and error(found, expected) < tolerance
    grad = torch.randn_like(found)
    found.backward(grad)
    expected.backward(grad.double())
    limits = gradient_tolerance or 2 * tolerance
    limits = [limits] * len(inputs) if isinstance(limits, float) else limits
    for x, true, limit in zip(inputs, exact, limits, strict=True):
        assert x.grad.dtype == x.dtype
        if true.grad.norm() > 1e-9:
            assert error(x.grad, true.grad) < limit
    with torch.no_grad():
        assert error(op(*inputs), expected) < tolerance
