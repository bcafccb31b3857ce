"""The head under DeepSpeed itself: ZeRO-3 on two ranks against one process, the plain version."""

import pytest
import torch

from cca_ds.likelihood import linear_sequence_logp_eager
from tests.dist import likelihood_zero3 as script
from tests.support.two_ranks import torchrun


@pytest.mark.dist
def test_zero3_gathers_the_head_in_forward_and_in_backward(tmp_path):
    output = tmp_path / "zero3.pt"
    torchrun(script.__file__, output)
    results = torch.load(output, weights_only=True)

    codes = torch.randint(script.VOCABULARY, (4, script.TOKENS), generator=torch.Generator().manual_seed(5))
    for bias in (True, False):
        torch.manual_seed(0)
        model = script.Small(bias)
        hidden = model.layer(model.embedding(codes)).tanh()
        logp = linear_sequence_logp_eager(hidden, model.head.weight, codes.roll(1, 1), model.head.bias)
        (-logp.mean()).backward()
        torch.testing.assert_close(results[bias]["logp"], logp.detach(), atol=1e-4, rtol=1e-6)
        for name, parameter in model.named_parameters():
            assert parameter.grad.abs().sum() > 0
            updated = parameter.detach() - 0.1 * parameter.grad
            torch.testing.assert_close(results[bias]["state"][name], updated, atol=2e-6, rtol=1e-5)
