"""The linear layer: large ones in training, few rows in decoding."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from cca_ds.ops.library import backend
from cca_ds.ops.linear import input_gradient, linear, linear_eager, matmul, weight_gradient
from tests.support.compare import error
from tests.support.ops import TOLERANCE, VERSIONS, check_op, using

FEW_ROWS_TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("rows", "width", "outputs"), [(577, 256, 384), (70, 4100, 128), (1000, 64, 300), (9, 2050, 1024)]
)
def test_linear_and_its_gradients(device, version, dtype, rows, width, outputs):
    """Blocks that are not full, more depth than one step takes, an odd number of rows, and few rows."""
    torch.manual_seed(0)
    shapes = [(rows, width), (outputs, width), (outputs,)]
    inputs = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    with using(version):
        check_op(linear, F.linear, inputs, TOLERANCE[dtype], TOLERANCE[dtype])
    check_op(linear_eager, F.linear, inputs, TOLERANCE[dtype])


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("rows", "width", "outputs"), [(577, 256, 384), (9, 2050, 1024)])
def test_matmuls_into_given_memory(version, dtype, rows, width, outputs):
    torch.manual_seed(0)
    shapes = [(rows, width), (outputs, width), (outputs,), (rows, outputs)]
    x, weight, bias, grad = (torch.randn(shape).to(dtype) for shape in shapes)
    exact = [tensor.double() for tensor in (x, weight, bias, grad)]
    with using(version):
        out = torch.full_like(grad, torch.nan)
        assert matmul(x, weight, bias, out) is out
        assert error(out, F.linear(*exact[:3])) < TOLERANCE[dtype]
        out = torch.full_like(x, torch.nan)
        assert input_gradient(grad, weight, out) is out
        assert error(out, exact[3] @ exact[1]) < TOLERANCE[dtype]
        out = torch.full_like(weight, torch.nan)
        assert error(weight_gradient(grad, x, out), exact[3].t() @ exact[0]) < TOLERANCE[dtype]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("dtype", FEW_ROWS_TOLERANCE)
@pytest.mark.parametrize("rows", [1, 3, 8, 11, 16])
@pytest.mark.parametrize(("outputs", "width"), [(7, 32), (50, 96), (3, 75), (1, 5)])
def test_few_rows(version, dtype, rows, outputs, width):
    torch.manual_seed(0)
    x, weight = torch.randn(rows, width).to(dtype), torch.randn(outputs, width).to(dtype)
    bias = torch.randn(outputs).to(dtype)
    for bias_or_none in (bias, None):
        with using(version), torch.no_grad():
            found = linear(x, weight, bias_or_none)
        shift = None if bias_or_none is None else bias.double()
        expected = F.linear(x.double(), weight.double(), shift)
        assert found.dtype == dtype
        difference = (found.double() - expected).abs()
        assert (difference <= FEW_ROWS_TOLERANCE[dtype] * (expected.abs() + width**0.5)).all()


def test_a_row_does_not_depend_on_the_other_rows():
    torch.manual_seed(0)
    x, weight = torch.randn(16, 100), torch.randn(33, 100)
    with using("kernel"), torch.no_grad():
        together = linear(x, weight)
        for row in range(16):
            assert torch.equal(linear(x[row : row + 1], weight), together[row : row + 1])


@torch.no_grad()
def test_shapes_layouts_and_numbers_that_are_not_finite():
    torch.manual_seed(0)
    weight = torch.randn(64, 10).t()  # not contiguous
    x = torch.randn(2, 3, 64)
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight))
    torch.testing.assert_close(linear(x.transpose(0, 1), weight), F.linear(x.transpose(0, 1), weight))
    x[1, 2, 5] = torch.nan
    assert linear(x, weight).isnan().any(-1).tolist() == [[False] * 3, [False, False, True]]
    assert linear(torch.empty(0, 64), weight).shape == (0, 10)
    with pytest.raises(RuntimeError):
        linear(torch.randn(2, 80), torch.randn(6, 40))  # as many numbers as 4 rows of 40
    with pytest.raises(RuntimeError):
        linear(torch.randn(2, 40), torch.randn(6, 40), torch.randn(5))


def test_autocast():
    x, weight = torch.randn(4, 16), torch.randn(8, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
        with torch.no_grad():
            assert linear(x, weight).dtype == torch.bfloat16


def test_operations_are_counted_as_those_of_pytorch():
    x, weight = torch.randn(512, 256, requires_grad=True), torch.randn(384, 256, requires_grad=True)
    with using("kernel"), FlopCounterMode(display=False) as counter:
        linear(x, weight).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 512 * 256 * 384


def test_opcheck():
    if backend() == "torch":
        pytest.skip("the kernels are not built")
    ops, check = torch.ops.cca_ds, torch.library.opcheck
    x = torch.randn(2, 9, 24)
    check(ops.block_linear.default, (x, torch.randn(5, 24), None, torch.empty(2, 9, 5)))
    check(ops.weight_gradient.default, (x[0], x[0]))
    check(ops.few_rows_linear.default, (torch.randn(2, 5, 40), torch.randn(6, 40), None))
    check(ops.few_rows_linear.default, (torch.randn(3, 40), torch.randn(6, 40), torch.randn(6)))
