"""The three attentions against their definitions in float64."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from cca_ds.models.var.model import SCALES_256
from cca_ds.ops.attention import (
    causal_attention,
    causal_attention_eager,
    one_query_attention,
    one_query_attention_eager,
    rope_qkv,
    scale_attention,
    scale_attention_eager,
    scale_segments,
)
from cca_ds.ops.library import backend
from cca_ds.ops.qk_norm import qk_norm_eager
from cca_ds.ops.rope import rotary_table
from tests.support.compare import error
from tests.support.ops import TOLERANCE, VERSIONS, check_op, using

SCALES = (1, 2, 3, 4)
ONE_QUERY_TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


# ---- causal, with rotary positions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("op", [causal_attention, causal_attention_eager])
@pytest.mark.parametrize(
    ("length", "channels", "dtype", "tolerance"),
    [
        (9, 16, torch.float32, 2e-6),
        (9, 4, torch.float32, 2e-6),
        (400, 20, torch.float32, 5e-6),
        (400, 16, torch.bfloat16, 2e-2),
        (9, 16, torch.float64, 1e-6),
    ],
)
def test_causal_attention_and_its_gradient(device, version, op, length, channels, dtype, tolerance):
    torch.manual_seed(4)
    heads = 3
    table = rotary_table(round(length**0.5), channels)[:length].to(device)
    angles = torch.view_as_complex(table.double())[:, None]

    def rotate(x):
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * angles).flatten(-2)

    def definition(qkv):
        q, k, v = qkv.unflatten(-1, (3, heads, channels)).unbind(2)
        scores = torch.einsum("bqhc,bkhc->bhqk", rotate(q), rotate(k)) / channels**0.5
        hidden = torch.ones(length, length, device=device).triu(1).bool()
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        return torch.einsum("bhqk,bkhc->bqhc", weights, v).flatten(2)

    qkv = torch.randn(2, length, 3 * heads * channels, device=device).to(dtype)
    with using(version):
        check_op(lambda qkv: op(qkv, table, heads), definition, [qkv], tolerance)


def test_attention_dropout_leaves_weights_out(device):
    torch.manual_seed(0)
    table = rotary_table(2, 8)[:4].to(device)
    qkv = torch.zeros(1, 4, 3 * 8, device=device)  # equal scores: the weights of the last position are 1/4
    qkv[..., 16:] = torch.eye(4, 8, device=device)
    mixed = causal_attention(qkv.repeat(64, 1, 1), table, 1, dropout=0.5)[:, 3, :4]
    kept = mixed > 0
    torch.testing.assert_close(mixed[kept], torch.full_like(mixed[kept], 0.5))
    assert 0.3 < kept.float().mean() < 0.7


@pytest.mark.parametrize(("channels", "padded"), [(100, 104), (64, 64), (4, 8)])
def test_heads_are_padded_to_a_multiple_of_eight_channels(channels, padded):
    qkv, table = torch.randn(2, 5, 3 * 2 * channels), rotary_table(2, channels)
    for part in rope_qkv(qkv, table, 2):
        assert part.shape == (2, 2, 5, padded) and not part[..., channels:].any()
    assert rope_qkv(qkv, table, 2)[2][..., :channels].transpose(1, 2).flatten(2).equal(qkv[..., 4 * channels :])


# ---- over the scales of an image -----------------------------------------------------------------------------------


def masked_attention(qkv, scale, scales):
    """The definition: softmax over all keys, with minus infinity where a key's scale is finer than the query's."""
    q, k, v = qkv.unflatten(-1, (3, len(scale), -1)).permute(2, 0, 3, 1, 4)
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(2, 3) * scale[:, None, None]
    level = torch.cat([torch.full((size**2,), index) for index, size in enumerate(scales)]).to(qkv.device)
    scores = scores.masked_fill(level[:, None] < level, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("scales", [(1,), SCALES, (2, 12), (5, 11, 13), SCALES_256], ids=str)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str
)
def test_scale_attention_and_its_gradients(device, version, scales, dtype, tolerance):
    torch.manual_seed(0)
    length = sum(size**2 for size in scales)
    qkv = torch.randn(2, length, 3 * 2 * 16, device=device).to(dtype)
    scale = torch.tensor([3.0, 20.0], device=device, dtype=torch.promote_types(dtype, torch.float32))
    for op in (scale_attention, scale_attention_eager):
        with using(version):
            check_op(
                lambda *x, op=op: op(*x, scales),
                lambda *x: masked_attention(*x, scales),
                [qkv, scale],
                tolerance,
                # of the scale in bf16: small differences of rounded probabilities
                [2 * tolerance, (5 if dtype == torch.bfloat16 else 2) * tolerance],
            )


def test_large_scores_keep_their_precision_in_bf16(device):
    torch.manual_seed(0)
    qkv = torch.randn(1, 680, 3 * 64, device=device).bfloat16()
    scale = torch.tensor([100.0], device=device)
    grad = torch.randn(1, 680, 64, device=device).bfloat16()
    exact = [qkv.double().clone().requires_grad_(), scale.double().clone().requires_grad_()]
    masked_attention(*exact, SCALES_256).backward(grad.double())
    inputs = [qkv.clone().requires_grad_(), scale.clone().requires_grad_()]
    scale_attention(*inputs, SCALES_256).backward(grad)
    plain = [qkv.clone().requires_grad_(), scale.clone().requires_grad_()]
    q, k, v = qk_norm_eager(*plain)
    level = torch.cat([torch.full((size**2,), size) for size in SCALES_256]).to(device)
    F.scaled_dot_product_attention(q, k, v, attn_mask=level[:, None] >= level, scale=1.0).transpose(1, 2).flatten(
        2
    ).backward(grad)
    # no worse than PyTorch's own attention with a mask
    assert error(inputs[0].grad, exact[0].grad) < 1.2 * error(plain[0].grad, exact[0].grad)


def test_no_hidden_score_is_computed_but_among_the_coarsest():
    parts = scale_segments(SCALES_256)
    assert [part.end for part in parts] == [91, 155, 255, 424, 680]
    assert [part.start for part in parts] == [0, 91, 155, 255, 424]
    assert [part.mask is None for part in parts] == [False, True, True, True, True]
    assert parts[0].mask.shape == (91, 91)
    computed = sum((part.end - part.start) * part.end for part in parts)
    visible = sum(size**2 * sum(s**2 for s in SCALES_256 if s <= size) for size in SCALES_256)
    assert visible / 680**2 == pytest.approx(0.63, abs=0.02)
    assert computed / visible < 1.02


# ---- one query -----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("op", [one_query_attention, one_query_attention_eager])
@pytest.mark.parametrize("dtype", ONE_QUERY_TOLERANCE, ids=str)
@pytest.mark.parametrize(("slots", "channels"), [(1, 64), (5, 100), (37, 32), (300, 20)])
def test_one_query_attends_to_the_live_slots_of_a_cache(op, dtype, slots, channels):
    torch.manual_seed(0)
    query = torch.randn(2, 3, 1, channels).mul(2).to(dtype)
    caches = [torch.full((4, 3, 310, channels), torch.nan, dtype=dtype) for _ in range(2)]
    live = [cache[:2, :, :slots] for cache in caches]  # the slots behind are never read
    for cache in live:
        cache.copy_(torch.randn(2, 3, slots, channels))
    found = op(query, *live, 0.15)
    expected = F.scaled_dot_product_attention(query.double(), *(cache.double() for cache in live), scale=0.15)
    assert found.dtype == dtype and found.shape == query.shape
    tolerance = ONE_QUERY_TOLERANCE[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=2 * tolerance, atol=tolerance)


def test_gradients_of_one_query():
    torch.manual_seed(0)
    shapes = [(1, 2, 1, 8), (1, 2, 5, 8), (1, 2, 5, 8)]
    inputs = [torch.randn(shape) for shape in shapes]
    check_op(functools.partial(one_query_attention, scale=8**-0.5), F.scaled_dot_product_attention, inputs, 2e-6)


@torch.no_grad()
def test_one_query_and_slots_that_do_not_count():
    torch.manual_seed(0)
    query, keys, values = torch.randn(2, 3, 1, 16), torch.randn(2, 3, 9, 16), torch.randn(2, 3, 9, 16)
    live = (torch.arange(9) < 4)[None]
    expected = one_query_attention(query, keys[:, :, :4], values[:, :, :4], 0.25)
    torch.testing.assert_close(one_query_attention(query, keys, values, 0.25, live), expected)


@torch.no_grad()
def test_one_query_and_numbers_that_are_not_finite():
    query, keys, values = torch.randn(1, 2, 1, 64), torch.randn(1, 2, 40, 64), torch.randn(1, 2, 40, 64)
    keys[0, 1, 17, 3] = torch.nan
    found = one_query_attention(query, keys, values, 0.125)
    assert found[0, 0].isfinite().all() and found[0, 1].isnan().all()
    query[0, 0] = 1e4  # a softmax of large scores
    assert one_query_attention(query, keys, values, 0.125)[0, 0].isfinite().all()


# ---- the kernels ---------------------------------------------------------------------------------------------------


def prefix_attention(dtype):
    if backend() == "torch" or not torch.ops.cca_ds.has_prefix_attention(dtype == torch.bfloat16):
        pytest.skip("no kernel here")
    return torch.ops.cca_ds.prefix_attention


@torch.no_grad()
def test_one_query_refuses_shapes_that_do_not_fit():
    cache = torch.randn(2, 3, 9, 40)
    with using("kernel"):
        with pytest.raises(RuntimeError, match="one position for each head"):
            one_query_attention(torch.randn(2, 3, 2, 40), cache, cache, 0.2)
        with pytest.raises(RuntimeError, match="must be alike"):
            one_query_attention(torch.randn(2, 3, 1, 40), cache, cache[:, :, :4], 0.2)


def test_a_table_that_does_not_fit_is_refused():
    prefix_attention(torch.float32)
    with pytest.raises(RuntimeError, match="does not fit 9 positions"):
        causal_attention(torch.randn(1, 9, 24), torch.randn(8, 4, 2), 1)


@pytest.mark.parametrize(("images", "heads", "length", "channels"), [(2, 3, 7, 16), (1, 2, 91, 8), (2, 2, 200, 64)])
@pytest.mark.parametrize("steps", [1, 10, 45])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_attention_to_a_prefix(images, heads, length, channels, steps, dtype):
    """The limits of runs of `steps` queries are equal: 1 is causal, more are scales."""
    op = prefix_attention(dtype)
    torch.manual_seed(0)
    heads_3BHLC = torch.randn(3, images, heads, length, channels).to(dtype)
    heads_3BHLC[0] *= 2 * channels**-0.5
    limits = ((torch.arange(length) // steps + 1) * steps).clamp_max(length)
    exact = heads_3BHLC.double().requires_grad_()
    visible = torch.arange(length) < limits[:, None]
    scores = (exact[0] @ exact[1].transpose(-1, -2)).masked_fill(~visible, -torch.inf)
    expected = (scores.softmax(-1) @ exact[2]).transpose(1, 2)
    mixed, lse = op(heads_3BHLC, limits)
    assert mixed.dtype == dtype and error(mixed, expected) < TOLERANCE[dtype]
    assert (lse - scores.logsumexp(-1)).abs().max() < 1e-4
    grad, found = torch.randn(images, length, heads, channels).to(dtype), torch.full_like(heads_3BHLC, torch.nan)
    expected.backward(grad.double())
    torch.ops.cca_ds.prefix_attention_backward(grad, heads_3BHLC, mixed, lse, limits, found)
    for part, true in zip(found, exact.grad, strict=True):
        assert error(part, true) < 3 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_prefix_attention_refuses_limits_that_do_not_fit(dtype):
    op, heads = prefix_attention(dtype), torch.randn(3, 1, 2, 5, 8).to(dtype)
    for limits, message in (
        ([1, 2, 3, 4, 6], "limit 6 of query 4 must be from 1 to 5"),
        ([0, 1, 2, 3, 4], "limit 0 of query 0"),
        ([2, 1, 3, 4, 5], "not below the one before"),
        ([1, 2, 3], "do not fit 5 positions"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(heads, torch.tensor(limits))
    heads[1, 0, 1, 2] = torch.nan  # visible to the later queries of that head only
    mixed = op(heads, torch.arange(1, 6))[0]
    assert mixed.isnan().any(-1)[0].tolist() == [[False, False]] * 2 + [[False, True]] * 3


def test_operations_are_counted_as_those_of_pytorch():
    prefix_attention(torch.float32)
    qkv = torch.randn(2, 36, 3 * 2 * 16, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        causal_attention(qkv, rotary_table(6, 16)[:36], 2).sum().backward()
    assert counter.get_total_flops() == (4 + 10) * 2 * 2 * 36 * 36 * 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    if backend() == "torch":
        pytest.skip("the kernels are not built")
    ops, check = torch.ops.cca_ds, torch.library.opcheck
    x, table = torch.randn(2, 9, 24).to(dtype), rotary_table(3, 4)[:9].contiguous()
    heads = ops.rope_heads(x, table, 2, 0.5)
    check(ops.rope_heads.default, (x, table, 2, 0.5))
    check(ops.rope_heads_backward.default, (heads, table, 0.5, torch.empty_like(x)))
    with torch.no_grad():
        cache = torch.randn(2, 3, 9, 40).to(dtype)
        check(ops.one_query_attention.default, (torch.randn(2, 3, 1, 40).to(dtype), cache, cache, 0.2))
    op, limits = prefix_attention(dtype), torch.arange(1, 10)
    check(op.default, (heads, limits))
    mixed, lse = op(heads, limits)
    grads = torch.empty_like(heads)
    check(ops.prefix_attention_backward.default, (mixed, heads, mixed, lse, limits, grads))
