"""VAR's block-causal attention against its masked definition."""

import pytest
import torch
import torch.nn.functional as F

from cca_ds.models.var.model import SCALES_256
from cca_ds.ops.scale_attention import block_causal_attention, normalised_heads, segments
from tests.support.compare import error

SCALES = (1, 2, 3, 4)


def masked_attention(qkv, scale, scales):
    """The definition: softmax over all keys, with minus infinity where a key's scale is finer than the query's."""
    q, k, v = qkv.unflatten(-1, (3, len(scale), -1)).permute(2, 0, 3, 1, 4)
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(2, 3) * scale[:, None, None]
    level = torch.cat([torch.full((size**2,), index) for index, size in enumerate(scales)]).to(qkv.device)
    scores = scores.masked_fill(level[:, None] < level, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("scales", [(1,), SCALES, (2, 12), (5, 11, 13), SCALES_256], ids=str)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str
)
def test_attention_and_its_gradients(device, scales, dtype, tolerance):
    torch.manual_seed(0)
    length = sum(size**2 for size in scales)
    qkv = torch.randn(2, length, 3 * 2 * 16, device=device).to(dtype)
    scale = torch.tensor([3.0, 20.0], device=device, dtype=torch.promote_types(dtype, torch.float32))
    grad = torch.randn(2, length, 32, device=device).to(dtype)
    exact = [qkv.double().clone().requires_grad_(), scale.double().clone().requires_grad_()]
    expected = masked_attention(*exact, scales)
    expected.backward(grad.double())
    inputs = [qkv.clone().requires_grad_(), scale.clone().requires_grad_()]
    found = block_causal_attention(*inputs, scales)
    found.backward(grad)
    assert found.dtype == dtype
    assert error(found, expected) < tolerance
    for mine, true in zip(inputs, exact, strict=True):
        if true.grad.norm() > 1e-9:  # a single key's weight is 1 whatever the query
            assert mine.grad.dtype == mine.dtype
            assert error(mine.grad, true.grad) < 2 * tolerance


def test_large_scores_keep_their_precision_in_bf16(device):
    torch.manual_seed(0)
    qkv = torch.randn(1, 680, 3 * 64, device=device).bfloat16()
    scale = torch.tensor([100.0], device=device)
    grad = torch.randn(1, 680, 64, device=device).bfloat16()
    exact = [qkv.double().clone().requires_grad_(), scale.double().clone().requires_grad_()]
    masked_attention(*exact, SCALES_256).backward(grad.double())
    inputs = [qkv.clone().requires_grad_(), scale.clone().requires_grad_()]
    block_causal_attention(*inputs, SCALES_256).backward(grad)
    plain = [qkv.clone().requires_grad_(), scale.clone().requires_grad_()]
    q, k, v = normalised_heads(*plain)
    level = torch.cat([torch.full((size**2,), size) for size in SCALES_256]).to(device)
    F.scaled_dot_product_attention(q, k, v, attn_mask=level[:, None] >= level, scale=1.0).transpose(
        1, 2
    ).flatten(2).backward(grad)
    # no worse than PyTorch's own attention with a mask
    assert error(inputs[0].grad, exact[0].grad) < 1.2 * error(plain[0].grad, exact[0].grad)


def test_no_hidden_score_is_computed_but_among_the_coarsest():
    parts = segments(SCALES_256)
    assert [part.end for part in parts] == [91, 155, 255, 424, 680]
    assert [part.start for part in parts] == [0, 91, 155, 255, 424]
    assert [part.mask is None for part in parts] == [False, True, True, True, True]
    assert parts[0].mask.shape == (91, 91)
    computed = sum((part.end - part.start) * part.end for part in parts)
    visible = sum(size**2 * sum(s**2 for s in SCALES_256 if s <= size) for size in SCALES_256)
    assert visible / 680**2 == pytest.approx(0.63, abs=0.02)
    assert computed / visible < 1.02
