"""VAR under DeepSpeed itself: ZeRO-3 on two ranks against one process without it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.dist import var_zero3 as script


@pytest.mark.dist
def test_zero3_gathers_every_weight_in_forward_and_in_backward(tmp_path):
    output, path = tmp_path / "zero3.pt", Path(script.__file__)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
    environment["PYTHONPATH"] = str(path.parents[2])
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    done = subprocess.run([*launch, str(path), str(output)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
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
