"""Reused memory."""

import torch

from cca_ds.ops.attention import scale_attention
from cca_ds.ops.scratch import Scratch
from tests.support.ops import using


def test_memory_is_reused_once_no_tensor_refers_to_it():
    pool, like = Scratch(), torch.empty(0)
    with using("kernel"):
        with torch.inference_mode():
            small = pool.take("a use", (3, 4), like)
        small.fill_(1.0)  # not an inference tensor
        address = small.data_ptr()
        assert pool.take("another", (3, 4), like).data_ptr() != address
        held = pool.take("a use", (2, 6), like)
        assert held.data_ptr() != address
        address, part = held.data_ptr(), held[1:]
        del held
        assert pool.take("a use", (2, 6), like).data_ptr() != address  # a view refers to it too
        del part
        again = pool.take("a use", (2, 6), like).data_ptr()
        assert pool.take("a use", (3, 3), like).data_ptr() == again
        assert pool.take("a use", (3, 4), like.bfloat16()).dtype == torch.bfloat16
        assert pool.take("a use", (5, 5), like).shape == (5, 5)
        assert pool.take("a use", (5, 5), like.to("meta")).is_meta


def test_gradients_that_are_kept_are_not_overwritten():
    found = []
    for seed in (0, 1, 1):
        torch.manual_seed(seed)
        qkv = torch.randn(2, 9, 48, requires_grad=True)
        out = scale_attention(qkv, torch.tensor([1.0, 2.0]), (3,))
        found.append(torch.autograd.grad(out, qkv, torch.randn_like(out))[0])
    first, second, third = found
    assert not torch.equal(first, second) and torch.equal(second, third)
