"""The passes of a training step on a CPU: csrc's kernels and their twins in PyTorch, both against float64."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from cca_ds.likelihood import backend
from cca_ds.models.layers import rotary_table
from cca_ds.ops import cpu_kernels, prefix_attention
from cca_ds.ops import linear as products
from tests.support.compare import error

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3}
WAYS = ["kernel", "twin"]


@pytest.fixture(params=WAYS)
def way(request, monkeypatch) -> str:
    """With the kernels, and as it is without them."""
    if request.param == "twin":
        monkeypatch.setattr(cpu_kernels, "backend", lambda: "torch")
    elif backend() == "torch":
        pytest.skip("the kernels are not built")
    return request.param


def gradients(function, inputs, grad):
    """The value in float64 and the gradients of the inputs."""
    exact = [x.double().clone().requires_grad_() for x in inputs]
    value = function(*exact)
    return value, torch.autograd.grad(value, exact, grad.double())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(3,), (33,), (2, 7, 100), (40, 4096)], ids=str)
def test_activations(way, dtype, shape):
    torch.manual_seed(0)
    x, value, grad = ((4 * torch.randn(shape)).to(dtype) for _ in range(3))
    expected, (grad_x,) = gradients(lambda x: F.gelu(x, approximate="tanh"), [x], grad)
    assert error(cpu_kernels.gelu(x), expected) < TOLERANCE[dtype]
    assert error(cpu_kernels.gelu_backward_(grad.clone(), x), grad_x) < 2 * TOLERANCE[dtype]
    expected, wanted = gradients(lambda gate, value: F.silu(gate) * value, [x, value], grad)
    assert error(cpu_kernels.gated(x, value), expected) < TOLERANCE[dtype]
    for mine, true in zip(cpu_kernels.gated_backward(grad, x, value), wanted, strict=True):
        assert mine.dtype == dtype and error(mine, true) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_activations_of_extreme_numbers(way, dtype):
    x = torch.tensor([-1e4, -90.0, -20.0, 0.0, 20.0, 90.0, 1e4, torch.nan, torch.inf]).to(dtype)
    ones = torch.ones_like(x)
    gelu = F.gelu(x.double(), approximate="tanh")
    torch.testing.assert_close(cpu_kernels.gelu(x).double(), gelu, equal_nan=True, rtol=4e-3, atol=1e-6)
    torch.testing.assert_close(
        cpu_kernels.gated(x, ones).double(), F.silu(x.double()), equal_nan=True, rtol=4e-3, atol=1e-6
    )
    slopes = torch.tensor([0.0, 0.0, 0.0, 0.5, 1.0, 1.0, 1.0])
    torch.testing.assert_close(
        cpu_kernels.gelu_backward_(ones.clone(), x)[:7].float(), slopes, atol=1e-6, rtol=4e-3
    )
    grad_gate, grad_value = cpu_kernels.gated_backward(ones, x, ones)
    torch.testing.assert_close(grad_gate[:7].float(), slopes, atol=1e-6, rtol=4e-3)
    torch.testing.assert_close(grad_value.double()[:7], F.silu(x.double())[:7], atol=1e-6, rtol=4e-3)


def test_layouts_and_shapes():
    x = torch.randn(12, 8).t()
    torch.testing.assert_close(cpu_kernels.gelu(x), F.gelu(x, approximate="tanh"))
    assert cpu_kernels.gelu(torch.empty(0, 4)).shape == (0, 4)
    if backend() != "torch":
        with pytest.raises(RuntimeError, match="must be alike"):
            cpu_kernels.gated(torch.randn(4), torch.randn(5))
        with pytest.raises(RuntimeError, match="does not fit 9 positions"):
            cpu_kernels.turned_heads(torch.randn(1, 9, 24), torch.randn(8, 4, 2), 1, 1.0)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("images", "length", "width"), [(1, 5, 24), (3, 7, 40), (2, 100, 1024)])
def test_norms_and_back(way, dtype, images, length, width):
    torch.manual_seed(0)
    x, grad = (torch.randn(images, length, width).to(dtype) for _ in range(2))
    x += 3.0
    weight, bias = torch.randn(2, images, width)

    def layer_norm(x, weight, bias):
        return F.layer_norm(x, (width,), eps=1e-6) * weight[:, None] + bias[:, None]

    expected, wanted = gradients(layer_norm, [x, weight, bias], grad)
    out = torch.empty_like(x)
    statistics = cpu_kernels.layer_norm(x, weight, bias, 1e-6, out)
    assert error(out, expected) < 2 * TOLERANCE[dtype]
    for mine, true in zip(cpu_kernels.layer_norm_backward(grad, x, weight, statistics), wanted, strict=True):
        assert error(mine, true) < 3 * TOLERANCE[dtype]

    rows, scale = x.flatten(0, 1), weight[0].to(dtype)
    expected, wanted = gradients(
        lambda x, weight: F.rms_norm(x, (width,), weight, 1e-5), [rows, scale], grad.flatten(0, 1)
    )
    out, statistics = cpu_kernels.rms_norm(rows, scale, 1e-5)
    assert out.dtype == dtype and error(out, expected) < 2 * TOLERANCE[dtype]
    found = cpu_kernels.rms_norm_backward(grad.flatten(0, 1), rows, scale, statistics)
    for mine, true in zip(found, wanted, strict=True):
        assert mine.dtype == dtype and error(mine, true) < 3 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("rows", "width", "outputs"), [(577, 256, 384), (70, 4100, 128), (1000, 64, 300), (9, 2050, 1024)]
)
def test_linear_layers_and_back(way, dtype, rows, width, outputs):
    """Tiles that are not filled, more depth than a step takes, an odd number of rows, and few rows."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(rows, width), torch.randn(outputs, width), torch.randn(outputs)
    grad = torch.randn(rows, outputs)
    x, weight, bias, grad = (tensor.to(dtype) for tensor in (x, weight, bias, grad))
    expected, wanted = gradients(F.linear, [x, weight, bias], grad)
    inputs = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
    found = products.linear(*inputs)
    found.backward(grad)
    assert found.dtype == dtype and error(found, expected) < TOLERANCE[dtype]
    for tensor, true in zip(inputs, wanted, strict=True):
        assert tensor.grad.dtype == dtype and error(tensor.grad, true) < TOLERANCE[dtype]
    out = torch.full_like(grad, torch.nan)
    assert products.product(x, weight, bias, out) is out and error(out, expected) < TOLERANCE[dtype]
    out = torch.full_like(x, torch.nan)
    assert products.input_gradient(grad, weight, out) is out and error(out, wanted[0]) < TOLERANCE[dtype]
    out = torch.full_like(weight, torch.nan)
    assert error(products.weight_gradient(grad, x, out), wanted[1]) < TOLERANCE[dtype]
    with torch.no_grad():
        assert error(products.linear(*inputs), expected) < TOLERANCE[dtype]


def test_scratch_is_reused_once_nothing_holds_it():
    if backend() == "torch":
        pytest.skip("the kernels are not built")
    pool, like = type(cpu_kernels.scratch)(), torch.empty(0)
    with torch.inference_mode():
        small = pool.take("a use", (3, 4), like)
    small.fill_(1.0)  # not a tensor of inference alone
    place = small.data_ptr()
    assert pool.take("another", (3, 4), like).data_ptr() != place
    held = pool.take("a use", (2, 6), like)
    assert held.data_ptr() != place
    place, part = held.data_ptr(), held[1:]
    del held
    assert pool.take("a use", (2, 6), like).data_ptr() != place  # a view holds it too
    del part
    again = pool.take("a use", (2, 6), like).data_ptr()
    assert pool.take("a use", (3, 3), like).data_ptr() == again
    assert pool.take("a use", (3, 4), like.bfloat16()).dtype == torch.bfloat16
    assert pool.take("a use", (5, 5), like).shape == (5, 5)
    assert pool.take("a use", (5, 5), like.to("meta")).is_meta


def test_gradients_that_are_kept_are_not_written_over():
    """Those of attention lie in memory that is used again."""
    torch.manual_seed(0)
    segments, scale = (prefix_attention.Segment(0, 9),), torch.tensor([1.0, 2.0])
    found = []
    for seed in (0, 1, 1):
        torch.manual_seed(seed)
        heads, factors = cpu_kernels.normalised_heads(torch.randn(2, 9, 48), scale)
        mixed, lse = prefix_attention.attend(heads, segments)
        grads = prefix_attention.attend_backward(torch.randn_like(mixed), heads, mixed, lse, segments)
        found.append((grads, cpu_kernels.normalised_heads_backward(grads, heads, factors, scale)[0]))
    for first, second, third in zip(*found, strict=True):
        assert not torch.equal(first, second) and torch.equal(second, third)


def test_operations_are_counted_as_those_of_pytorchs_own():
    """A linear layer and attention, forward and backward, by torch's counter."""
    if backend() == "torch" or not torch.ops.cca_ds.has_prefix_attention(False):
        pytest.skip("no kernel here")
    x, weight = torch.randn(512, 256, requires_grad=True), torch.randn(384, 256, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        products.linear(x, weight).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 512 * 256 * 384
    heads, segments = torch.randn(3, 2, 2, 40, 16), (prefix_attention.Segment(0, 40),)
    with FlopCounterMode(display=False) as counter:
        mixed, lse = prefix_attention.attend(heads, segments)
        prefix_attention.attend_backward(mixed, heads, mixed, lse, segments)
    assert counter.get_total_flops() == (4 + 10) * 2 * 2 * 40 * 40 * 16


def turned(qkv, table, heads, scale):
    """The definition, in complex numbers."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    angles = torch.view_as_complex(table.to(qkv.dtype))
    q, k = (
        torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * angles).flatten(-2)
        for x in (q, k)
    )
    return torch.stack([q * scale, k, v])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("channels", [4, 20, 64])
def test_turned_heads_and_back(way, dtype, channels):
    torch.manual_seed(0)
    table = rotary_table(3, channels)[:9]
    qkv = torch.randn(2, 9, 3 * 2 * channels).to(dtype)
    grad = torch.randn(3, 2, 2, 9, channels).to(dtype)
    expected, (grad_qkv,) = gradients(lambda qkv: turned(qkv, table, 2, 0.3), [qkv], grad)
    assert error(cpu_kernels.turned_heads(qkv, table, 2, 0.3), expected) < TOLERANCE[dtype]
    found = cpu_kernels.turned_heads_backward(grad, table, 0.3)
    assert found.dtype == dtype and error(found, grad_qkv) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("channels", [4, 20, 64])
def test_normalised_heads_and_back(way, dtype, channels):
    torch.manual_seed(0)
    scale, length = torch.tensor([3.0, 20.0]), 7
    qkv = torch.randn(2, length, 3 * 2 * channels).to(dtype)
    grad = torch.randn(3, 2, 2, length, channels).to(dtype)

    def definition(qkv, scale):
        q, k, v = qkv.unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return torch.stack([F.normalize(q, dim=-1) * scale[:, None, None], F.normalize(k, dim=-1), v])

    expected, (grad_qkv, grad_scale) = gradients(definition, [qkv, scale], grad)
    heads, factors = cpu_kernels.normalised_heads(qkv, scale)
    assert heads.dtype == dtype and error(heads, expected) < TOLERANCE[dtype]
    found, found_scale = cpu_kernels.normalised_heads_backward(grad, heads, factors, scale)
    assert found.dtype == dtype and error(found, grad_qkv) < 2 * TOLERANCE[dtype]
    assert error(found_scale, grad_scale) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("images", "heads", "length", "channels"), [(2, 3, 7, 16), (1, 2, 91, 8), (2, 2, 200, 64)]
)
@pytest.mark.parametrize("steps", [1, 10, 45])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_attention_to_a_prefix(way, images, heads, length, channels, steps, dtype):
    torch.manual_seed(0)
    heads_3BHLC = torch.randn(3, images, heads, length, channels).to(dtype)
    heads_3BHLC[0] *= 2 * channels**-0.5
    limits = ((torch.arange(length) // steps + 1) * steps).clamp_max(length)
    cut = length // 2 // steps * steps
    sees = torch.arange(length) < limits[:, None]
    segments = (prefix_attention.Segment(0, cut, sees[:cut, :cut]),) if cut else ()
    segments += (prefix_attention.Segment(cut, length, sees[cut:, cut:]),)
    mixed, lse = prefix_attention.attend(heads_3BHLC, segments)
    q, k, v = heads_3BHLC.double()
    scores = (q @ k.transpose(-1, -2)).masked_fill(~sees, -torch.inf)
    assert error(mixed, (scores.softmax(-1) @ v).transpose(1, 2)) < TOLERANCE[dtype]
    assert (lse - scores.logsumexp(-1)).abs().max() < 1e-4

    def definition(heads):
        scores = (heads[0] @ heads[1].transpose(-1, -2)).masked_fill(~sees, -torch.inf)
        return (scores.softmax(-1) @ heads[2]).transpose(1, 2)

    grad = torch.randn(images, length, heads, channels).to(dtype)
    _, (expected,) = gradients(definition, [heads_3BHLC], grad)
    found = prefix_attention.attend_backward(grad, heads_3BHLC, mixed, lse, segments)
    for mine, true in zip(found, expected, strict=True):
        assert mine.dtype == dtype and error(mine, true) < 3 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_attention_says_what_it_cannot_take(dtype):
    if backend() == "torch" or not torch.ops.cca_ds.has_prefix_attention(dtype == torch.bfloat16):
        pytest.skip("no kernel here")
    heads, op = torch.randn(3, 1, 2, 5, 8).to(dtype), torch.ops.cca_ds.prefix_attention
    for limits, message in (
        ([1, 2, 3, 4, 6], "limit 6 of query 4 must be from 1 to 5"),
        ([0, 1, 2, 3, 4], "limit 0 of query 0"),
        ([2, 1, 3, 4, 5], "not below the one before"),
        ([1, 2, 3], "do not fit 5 positions"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(heads, torch.tensor(limits))
    heads[1, 0, 1, 2] = torch.nan  # seen by the later queries of that head alone
    mixed = op(heads, torch.arange(1, 6))[0]
    assert mixed.isnan().any(-1)[0].tolist() == [[False, False]] * 2 + [[False, True]] * 3


def test_opcheck():
    if backend() == "torch":
        pytest.skip("the kernels are not built")
    ops, check = torch.ops.cca_ds, torch.library.opcheck
    x, table, scale = torch.randn(2, 9, 24), rotary_table(3, 4)[:9].contiguous(), torch.tensor([1.0, 2.0])
    heads, factors = ops.normalised_heads(x, scale)
    check(ops.gelu.default, (x, torch.empty_like(x)))
    check(ops.gelu_backward.default, (x.clone(), x))
    check(ops.gated.default, (x, x, torch.empty_like(x)))
    check(ops.gated_backward.default, (x, x, x))
    weight = torch.randn(2, 24)
    statistics = ops.layer_norm(x, weight, weight, 1e-6, torch.empty_like(x))
    check(ops.layer_norm.default, (x, weight, weight, 1e-6, torch.empty_like(x)))
    check(ops.layer_norm_backward.default, (x, x, weight, statistics))
    check(ops.rms_norm.default, (x, weight[:1], 1e-6, torch.empty_like(x)))
    check(ops.rms_norm_backward.default, (x, x, weight[:1], statistics))
    check(ops.block_linear.default, (x, torch.randn(5, 24), None, torch.empty(2, 9, 5)))
    check(ops.weight_gradient.default, (x[0], x[0]))
    check(ops.turned_heads.default, (x, table, 2, 0.5))
    check(ops.turned_heads_backward.default, (heads, table, 0.5, torch.empty_like(x)))
    check(ops.normalised_heads.default, (x, scale))
    check(ops.normalised_heads_backward.default, (heads, heads, factors, scale, torch.empty_like(x)))
    for dtype in TOLERANCE:
        if not ops.has_prefix_attention(dtype == torch.bfloat16):
            continue
        heads, limits = heads.to(dtype), torch.arange(1, 10)
        check(ops.prefix_attention.default, (heads, limits))
        mixed, lse = ops.prefix_attention(heads, limits)
        grads = torch.empty_like(heads)
        check(ops.prefix_attention_backward.default, (mixed, heads, mixed, lse, limits, grads))
