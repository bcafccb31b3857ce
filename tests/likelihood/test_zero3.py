"""The head under DeepSpeed itself: ZeRO-3 on two ranks against one process, the plain version."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cca_ds.likelihood import linear_sequence_logp_eager

SCRIPT = Path(__file__).parents[1] / "dist" / "likelihood_zero3.py"


@pytest.mark.dist
def test_zero3_gathers_the_head_in_forward_and_in_backward(tmp_path):
    output = tmp_path / "zero3.pt"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
    environment["PYTHONPATH"] = str(SCRIPT.parents[2])
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    done = subprocess.run([*launch, str(SCRIPT), str(output)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    results = torch.load(output, weights_only=True)

    spec = importlib.util.spec_from_file_location("likelihood_zero3", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
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
