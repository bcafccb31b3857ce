"""Small inputs of the log-likelihood ops, and how far a gradient is off."""

import torch


def relative(found, expected):
    """Norm of the difference over the norm of the float64 value."""
    return ((found.double() - expected).norm() / expected.norm()).item()


def sample(device, dtype, sequences=2, tokens=7, vocabulary=1000, width=64, seed=0):
    """Hidden [B, L, D], weight [V, D] and bias [V] of `dtype`, targets [B, L]."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(sequences, tokens, width, generator=g).to(device, dtype)
    weight = (torch.randn(vocabulary, width, generator=g) / 4).to(device, dtype)
    bias = torch.randn(vocabulary, generator=g).to(device, dtype)
    targets = torch.randint(vocabulary, (sequences, tokens), generator=g).to(device)
    return hidden, weight, bias, targets


def leaves(*tensors):
    """Copies that gather gradients."""
    return [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
