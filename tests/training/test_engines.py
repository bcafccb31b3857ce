"""What the loop needs of the engines: loss and sums of a forward, finite losses, steps at the scheduled rate."""

import pytest
import torch

from cca_ds.alignment.losses import cca_loss
from cca_ds.alignment.objective import SUMS, Objective
from cca_ds.cluster.launch import Ranks
from cca_ds.config.recipes import load_recipe
from cca_ds.data.batches import BatchPlan, Steps
from cca_ds.models import create_model
from cca_ds.training.engines import Engines, OptimizerSteps
from cca_ds.training.inputs import open_inputs
from cca_ds.training.policy import NonFinite
from cca_ds.training.schedule import learning_rate
from tests.support.digits_table import digits_table

ALONE = Ranks(0, 0, 1, 1, 0, "node1", "cpu", "alone")
SHAPE = {"n_layer": 1, "n_head": 2, "dim": 16, "multiple_of": 16}


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    table = digits_table(tmp_path_factory.mktemp("digits"))
    (batch,) = Steps(table, BatchPlan(8, 0, 0.2, 10), 0, [8])[0]
    return batch


def models():
    torch.manual_seed(0)
    policy, reference = (create_model("digits", **SHAPE).eval() for _ in range(2))
    for model in (policy, reference):
        torch.nn.init.normal_(model.output.weight)
    return policy, reference


def engines(policy, reference, name="cca"):
    objective = Objective(load_recipe("digits", [f"loss.name={name}"]).loss)
    frozen = (lambda batch, inputs: reference(*inputs[:2]).detach()) if objective.spec.needs_reference else None
    return Engines(policy, frozen, objective, torch.device("cpu"), "fp32")


def test_a_forward_is_the_loss_of_policy_and_reference(batch):
    policy, reference = models()
    built = engines(policy, reference)
    loss, sums, logps = built.forward(batch)
    labels = (batch.positive_labels_B, batch.negative_labels_B)
    own, frozen = ([m(batch.codes_BL, label) for label in labels] for m in (policy, reference))
    settings = load_recipe("digits").loss
    expected = cca_loss(*own, *frozen, batch.positive_mask_B, settings.beta, settings.lambda_, reduction="sum")
    torch.testing.assert_close(loss, expected)
    assert loss.requires_grad and not logps.requires_grad and logps.shape == (16,)
    assert sums[SUMS.index("pairs")] == 8 and sums.dtype == torch.float64
    assert not built.zero_sums().any() and built.zero_sums().shape == sums.shape


def test_maximum_likelihood_has_no_reference_and_one_row_a_pair(batch):
    policy, reference = models()
    loss, _, logps = engines(policy, reference, "mle").forward(batch)
    assert logps.shape == (8,)
    torch.testing.assert_close(loss, -policy(batch.codes_BL, batch.positive_labels_B).sum())


def test_a_loss_that_is_not_finite_names_step_rank_and_samples(batch):
    built = engines(*models())
    _, sums, logps = built.forward(batch)
    built.require_finite(4, sums, [batch], [logps], ALONE)
    logps, sums = logps.clone(), sums.clone()
    logps[9] = torch.nan  # [chosen, rejected]: the second sample's negative
    sums[SUMS.index("loss")] = torch.nan
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        sample = int(batch.sample_indices_B[1])
        with pytest.raises(NonFinite, match=rf"step 5: .*rank 0 \(node1\): samples \[{sample}\]"):
            built.require_finite(4, sums, [batch], [logps], ALONE)
    finally:
        torch.distributed.destroy_process_group()


class FakeScaler:
    """A policy that answers steps as DeepSpeed's fp16 scaler may: the second one is skipped."""

    def __init__(self):
        self.loss_scale, self.skipped_steps, self.rates = 8.0, 0, []

    def step(self, rate, decay):
        self.rates.append(rate)
        if len(self.rates) == 2:
            self.loss_scale, self.skipped_steps = 4.0, 1
            return None
        return 2.5


def test_a_skipped_step_does_not_advance_the_schedule():
    run = load_recipe("digits", ["schedule.name=cosine", "optimizer.learning_rate=1"])
    policy = FakeScaler()
    lines = []
    step = OptimizerSteps(policy, run.optimizer, run.schedule, 10, 10, lines.append)
    tags = [step(index) for index in range(3)]
    rates = [learning_rate(taken, 10, 10, run.optimizer, run.schedule) for taken in (0, 1, 1)]
    assert policy.rates == rates and rates[0] > rates[1]
    assert tags[0] == {"lr": rates[0], "grad_norm": 2.5, "loss_scale": 8.0, "skipped_steps": 0.0}
    assert "grad_norm" not in tags[1] and tags[1]["loss_scale"] == 4.0 and tags[2]["skipped_steps"] == 1.0
    (line,) = lines
    assert line.startswith("WARNING: step 2 was skipped") and "at loss scale 8; loss scale now 4, 1 step(s)" in line


def test_the_inputs_decide_the_number_of_steps(tmp_path):
    assert open_inputs(load_recipe("digits", ["batch.max_steps=3"]), tmp_path).steps == 3
