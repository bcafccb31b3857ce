"""The output head under everything that wraps a module in training."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from cca_ds.likelihood import LikelihoodHead, backend, linear_sequence_logp, sequence_logp, sequence_logp_eager
from tests.support.likelihood_inputs import sample

kernels = pytest.mark.skipif(backend() == "torch", reason="no kernels are built")


def step(model, hidden, targets):
    model.zero_grad()
    inputs = hidden.detach().clone().requires_grad_()
    logp = model(inputs, targets)
    logp.sum().backward()
    return [logp.detach(), inputs.grad, *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("bias", [True, False])
def test_head_is_a_linear_with_a_second_face(device, bias):
    head = LikelihoodHead(64, 1000, bias=bias).to(device)
    hidden, _, _, targets = sample(device, torch.float32)
    assert sorted(head.state_dict()) == (["bias", "weight"] if bias else ["weight"])
    logits = head(hidden)
    torch.testing.assert_close(logits, F.linear(hidden, head.weight, head.bias))
    torch.testing.assert_close(head(hidden, targets), sequence_logp_eager(logits, targets))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(device, reentrant):
    head = LikelihoodHead(64, 1000).to(device)
    hidden, _, _, targets = sample(device, torch.float32)

    class Checkpointed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = head

        def forward(self, h, t):
            return checkpoint(self.head, h, t, use_reentrant=reentrant)

    for a, b in zip(step(head, hidden, targets), step(Checkpointed(), hidden, targets), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
@kernels
def test_torch_compile(device):
    head = LikelihoodHead(64, 1000).to(device)
    hidden, _, _, targets = sample(device, torch.float32)
    compiled = torch.compile(head, fullgraph=True)
    for a, b in zip(step(head, hidden, targets), step(compiled, hidden, targets), strict=True):
        torch.testing.assert_close(a, b)


def test_autocast(device):
    head = LikelihoodHead(64, 1000).to(device)
    hidden, _, _, targets = sample(device, torch.float32)
    narrow = [t.detach().bfloat16() for t in (hidden, head.weight, head.bias)]
    expected = linear_sequence_logp(narrow[0], narrow[1], targets, narrow[2])
    with torch.autocast(device, dtype=torch.bfloat16):
        logp = head(hidden, targets)
        assert logp.dtype == torch.float32 and torch.equal(logp, expected)
        logits = head(hidden)
        assert logits.dtype == torch.bfloat16 and sequence_logp(logits, targets).dtype == torch.float32
    logp.sum().backward()
    assert head.weight.grad.dtype == torch.float32 and head.weight.grad.abs().sum() > 0
