"""Before the first step: the loss is that of r = 0, and codes that the checkpoint does not know end the run."""

import re

import pytest

from tests.dist.runs import PATIENCE, start_training

pytestmark = pytest.mark.dist


def start(folder, *settings):
    """One step of a small model with the check before it."""
    settings = ("batch.max_steps=1", "baseline.check=true", *settings)
    with start_training(2, folder, *settings) as ranks:
        return ranks.wait(PATIENCE)


def test_the_loss_at_step_0_is_that_of_a_policy_that_equals_its_reference(tmp_path):
    outputs = start(tmp_path / "run", "baseline.nll_band=[0.5, 20.0]")
    assert [output.returncode for output in outputs] == [0, 0]
    said = outputs[0].stderr
    nll = float(re.search(r"baseline: ([\d.]+) nats a code, expected 0.5 to 20.0", said)[1])
    expected, measured = map(float, re.search(r"loss at r = 0: ([\d.]+), measured ([\d.]+)", said).groups())
    assert 0.5 < nll < 20.0 and measured == pytest.approx(expected, abs=1e-6)


def test_a_likelihood_outside_its_band_ends_the_run_before_a_step(tmp_path):
    outputs = start(tmp_path / "run", "baseline.nll_band=[0.01, 0.02]")
    assert all(output.returncode not in (0, None) for output in outputs)
    said = outputs[0].stderr
    assert re.search(r"negative log-likelihood is [\d.]+ nats a code, outside 0.01 to 0.02", said)
    assert "do not belong together" in said and "set baseline.nll_band=null" in said
    assert "Traceback" not in said
    assert not list((tmp_path / "run").glob("checkpoints/step_*"))
