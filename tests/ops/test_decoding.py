"""What a decoding step runs through on a CPU: a linear layer of few rows, and attention of one query."""

import pytest
import torch
import torch.nn.functional as F

from cca_ds.likelihood import backend
from cca_ds.models.layers import Linear
from cca_ds.ops.decoding import linear, one_query_attention

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", [1, 3, 8, 11, 16])
@pytest.mark.parametrize(("outputs", "width"), [(7, 32), (50, 96), (3, 75), (1, 5)])
def test_products_of_few_rows(dtype, rows, outputs, width):
    torch.manual_seed(0)
    x, weight = torch.randn(rows, width).to(dtype), torch.randn(outputs, width).to(dtype)
    bias = torch.randn(outputs).to(dtype)
    for shift in (bias, None):
        with torch.no_grad():
            found = linear(x, weight, shift)
        expected = F.linear(x.double(), weight.double(), None if shift is None else shift.double())
        assert found.dtype == dtype
        error = (found.double() - expected).abs()
        assert (error <= TOLERANCE[dtype] * (expected.abs() + width**0.5)).all()


def test_a_row_does_not_depend_on_the_rows_beside_it():
    if backend() == "torch":
        pytest.skip("the kernels are not built")
    torch.manual_seed(0)
    x, weight = torch.randn(16, 100), torch.randn(33, 100)
    with torch.no_grad():
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


def test_gradients_and_autocast_are_those_of_torch():
    torch.manual_seed(0)
    layer, x = Linear(16, 8, bias=True), torch.randn(4, 16)
    layer(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand(8, 16))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


@torch.no_grad()
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("slots", "channels"), [(1, 64), (5, 100), (37, 32), (300, 20)])
def test_attention_of_one_query_to_the_live_slots_of_a_cache(dtype, slots, channels):
    torch.manual_seed(0)
    query = torch.randn(2, 3, 1, channels).mul(2).to(dtype)
    caches = [torch.full((4, 3, 310, channels), torch.nan, dtype=dtype) for _ in range(2)]
    live = [cache[:2, :, :slots] for cache in caches]  # what lies behind is never read
    for cache in live:
        cache.copy_(torch.randn(2, 3, slots, channels))
    found = one_query_attention(query, *live)
    expected = F.scaled_dot_product_attention(query.double(), *(cache.double() for cache in live))
    assert found.dtype == dtype and found.shape == query.shape
    torch.testing.assert_close(found.double(), expected, rtol=2 * TOLERANCE[dtype], atol=TOLERANCE[dtype])


@torch.no_grad()
def test_attention_of_one_query_to_numbers_that_are_not_finite():
    query, keys, values = torch.randn(1, 2, 1, 64), torch.randn(1, 2, 40, 64), torch.randn(1, 2, 40, 64)
    keys[0, 1, 17, 3] = torch.nan
    found = one_query_attention(query, keys, values)
    assert found[0, 0].isfinite().all() and found[0, 1].isnan().all()
    query[0, 0] = 1e4  # a softmax of large scores
    assert one_query_attention(query, keys, values)[0, 0].isfinite().all()


@torch.no_grad()
def test_opcheck():
    if backend() == "torch":
        pytest.skip("the kernels are not built")
    ops = torch.ops.cca_ds
    weight, cache = torch.randn(6, 40), torch.randn(2, 3, 9, 40)
    torch.library.opcheck(ops.few_rows_linear.default, (torch.randn(2, 5, 40), weight, None))
    torch.library.opcheck(ops.few_rows_linear.default, (torch.randn(3, 40), weight, torch.randn(6)))
    torch.library.opcheck(ops.one_query_attention.default, (torch.randn(2, 3, 1, 40), cache, cache))


@torch.no_grad()
def test_shapes_that_do_not_fit_are_an_error_and_not_read_askew():
    weight, cache = torch.randn(6, 40), torch.randn(2, 3, 9, 40)
    with pytest.raises(RuntimeError):
        linear(torch.randn(2, 80), weight)  # as many numbers as 4 rows of 40
    with pytest.raises(RuntimeError):
        linear(torch.randn(2, 40), weight, torch.randn(5))
    if backend() != "torch":
        with pytest.raises(RuntimeError, match="one position for each head"):
            one_query_attention(torch.randn(2, 3, 2, 40), cache, cache)
        with pytest.raises(RuntimeError, match="must be alike"):
            one_query_attention(torch.randn(2, 3, 1, 40), cache, cache[:, :, :4])
