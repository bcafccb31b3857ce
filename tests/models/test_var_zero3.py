"""VAR under DeepSpeed itself: ZeRO-3 on two ranks against one process without it."""

import pytest
import torch

from tests.dist import var_zero3 as script
from tests.support.two_ranks import torchrun


@pytest.mark.dist
def test_zero3_gathers_every_weight_in_forward_and_in_backward(tmp_path):
    output = tmp_path / "zero3.pt"
    torchrun(script.__file__, output)
    results = torch.load(output, weights_only=True)
    codes, labels = script.batch()
    for name in script.CASES:
        model = script.build(name)
        logp = model(codes, labels)
        (-logp.mean()).backward()
        torch.testing.assert_close(results[name]["logp"], logp.detach(), atol=1e-4, rtol=1e-6)
        for key, parameter in model.named_parameters():
            updated = parameter.detach() - 0.1 * parameter.grad
            torch.testing.assert_close(results[name]["state"][key], updated, atol=2e-6, rtol=1e-5)
        assert parameter.grad.abs().sum() > 0
