"""The losses against the recorded programs, against a rewrite from the paper, and against arithmetic by hand."""

import math
import re

import pytest
import torch
from safetensors.torch import load_file

from cca_ds.alignment.losses import LOSSES as RECORDS
from cca_ds.alignment.losses import cca_loss, ddo_loss, dpo_loss, mle_loss, unlearning_loss

LOSSES = {"cca": cca_loss, "dpo": dpo_loss, "unlearning": unlearning_loss}


@pytest.fixture(scope="module")
def recorded(golden):
    return load_file(golden / "losses.safetensors")


def test_every_recorded_case(recorded):
    """Values and gradients in float64 to 1e-10, for every (loss, beta, lambda) that was recorded."""
    positive = recorded["labels_masked"] == recorded["labels_rolled_masked"]  # masked, or met itself
    found = [re.fullmatch(r"(\w+)_beta([\d.]+)_lambda([\d.]+)", key) for key in recorded]
    found = [match for match in found if match]
    assert {match[1] for match in found} == set(LOSSES) and len(found) >= 10
    for match in found:
        pos = recorded["policy_logp_pos"].double().clone().requires_grad_()
        neg = recorded["policy_logp_neg"].double().clone().requires_grad_()
        loss = LOSSES[match[1]](
            pos, neg, recorded["ref_logp_pos"], recorded["ref_logp_neg"], positive, float(match[2]), float(match[3])
        )
        loss.backward()
        torch.testing.assert_close(loss, recorded[match[0]], rtol=0, atol=1e-10)
        torch.testing.assert_close(pos.grad, recorded[f"{match[0]}_grad_pos"], rtol=0, atol=1e-10)
        torch.testing.assert_close(neg.grad, recorded[f"{match[0]}_grad_neg"], rtol=0, atol=1e-10)


def test_cca_by_hand():
    """Two pairs, one contrasted and one masked, lambda 10, beta 0.5."""
    log_sigmoid = lambda x: -math.log1p(math.exp(-x))  # noqa: E731
    contrasted = -log_sigmoid(0.5 * 2.0) - 10 * log_sigmoid(-0.5 * -1.0)
    masked = -log_sigmoid(0.5 * 1.0) - 1 * log_sigmoid(0.5 * 3.0)
    expected = (contrasted + masked) / 2 / 10
    loss = cca_loss(
        torch.tensor([-88.0, -79.0]), torch.tensor([-91.0, -87.0]), torch.tensor([-90.0, -80.0]),
        torch.tensor([-90.0, -90.0]), torch.tensor([False, True]), 0.5, 10.0,
    )  # fmt: skip
    assert float(loss) == pytest.approx(expected, rel=1e-6)


def test_at_the_reference_the_losses_are_known():
    zero, no = torch.zeros(4), torch.zeros(4, dtype=torch.bool)
    assert float(cca_loss(zero, zero, zero, zero, no, 0.02, 500.0)) == pytest.approx(501 * math.log(2) / 500)
    assert float(cca_loss(zero, zero, zero, zero, no, 0.02, 0.5)) == pytest.approx(1.5 * math.log(2))
    assert float(dpo_loss(zero, zero, zero, zero, no, 0.02)) == pytest.approx(math.log(2))
    assert float(unlearning_loss(zero, zero, zero, zero, no, 0.02, 3.0)) == 0.0


def test_without_masks_the_loss_is_still_cca():
    """The public LlamaGen program trains another loss then."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4, 8, generator=generator, dtype=torch.float64)
    no = torch.zeros(8, dtype=torch.bool)
    reward_pos, reward_neg = 0.3 * (values[0] - values[2]), 0.3 * (values[1] - values[3])
    expected = (-torch.sigmoid(reward_pos).log() - 7 * torch.sigmoid(-reward_neg).log()).mean() / 7
    torch.testing.assert_close(cca_loss(*values, no, 0.3, 7.0), expected)


def test_sums_of_parts_make_the_mean_and_lambda_may_differ_by_pair():
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(4, 10, generator=generator, dtype=torch.float64)
    mask = torch.arange(10) % 3 == 0
    lambdas = torch.linspace(0.5, 20, 10, dtype=torch.float64)
    whole = cca_loss(*values, mask, 0.5, lambdas)
    parts = sum(
        cca_loss(*values[:, a:b], mask[a:b], 0.5, lambdas[a:b], reduction="sum") for a, b in [(0, 3), (3, 4), (4, 10)]
    )
    torch.testing.assert_close(parts / 10, whole)
    one_by_one = [cca_loss(*values[:, [k]], mask[[k]], 0.5, float(lambdas[k])) for k in range(10)]
    torch.testing.assert_close(torch.stack(one_by_one).mean(), whole)


def test_maximum_likelihood():
    assert float(mle_loss(torch.tensor([-3.0, -5.0]))) == 4.0


def test_ddo_by_hand():
    """Two pairs, one contrasted and one masked, lambda 10, beta 0.5; then lambda 0.5, which divides nothing."""
    log_sigmoid = lambda x: -math.log1p(math.exp(-x))  # noqa: E731
    inputs = (torch.tensor([-88.0, -79.0]), torch.tensor([-91.0, -87.0]), torch.tensor([-90.0, -80.0]),
              torch.tensor([-90.0, -90.0]), torch.tensor([False, True]), 0.5)  # fmt: skip
    real, generated, masked = (-log_sigmoid(0.5 * x) for x in (2.0, 1.0, 1.0))  # -log sigmoid(-(-1) / 2) for the second
    assert float(ddo_loss(*inputs, 10.0)) == pytest.approx((real + 10 * generated + masked) / 2 / 10, rel=1e-6)
    assert float(ddo_loss(*inputs, 0.5)) == pytest.approx((real + 0.5 * generated + masked) / 2, rel=1e-6)


@pytest.mark.parametrize(("beta", "lambda_"), [(0.02, 50.0), (1.0, 1.0), (0.5, 0.3)])
def test_ddo_from_the_paper_with_its_gradients(beta, lambda_):
    """L = -log sigmoid(r(x,c)) - lambda log sigmoid(-r(x~,c)), divided by max(lambda, 1); dL/dr = s - 1, lambda s."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4, 12, generator=generator, dtype=torch.float64)
    mask = torch.arange(12) % 4 == 1
    policy = [value.clone().requires_grad_() for value in values[:2]]
    loss = ddo_loss(*policy, *values[2:], mask, beta, lambda_)
    loss.backward()
    reward, drawn_reward = (beta * (values[i] - values[i + 2]) for i in (0, 1))
    kept, share = (~mask).double(), 1 / (12 * max(lambda_, 1.0))
    terms = -torch.sigmoid(reward).log() - kept * lambda_ * (1 - torch.sigmoid(drawn_reward)).log()
    torch.testing.assert_close(loss, terms.sum() * share)
    torch.testing.assert_close(policy[0].grad, share * beta * (torch.sigmoid(reward) - 1))
    torch.testing.assert_close(policy[1].grad, share * beta * lambda_ * kept * torch.sigmoid(drawn_reward))
    torch.autograd.gradcheck(lambda *logps: ddo_loss(*logps, *values[2:], mask, beta, lambda_), policy)


def test_ddo_in_parts_and_with_a_lambda_for_each_pair():
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(4, 10, generator=generator, dtype=torch.float64)
    mask, lambdas = torch.arange(10) % 3 == 0, torch.linspace(0.5, 20, 10, dtype=torch.float64)
    whole = ddo_loss(*values, mask, 0.5, lambdas)
    parts = [ddo_loss(*values[:, a:b], mask[a:b], 0.5, lambdas[a:b], reduction="sum") for a, b in ((0, 3), (3, 10))]
    torch.testing.assert_close(sum(parts) / 10, whole)
    one_by_one = [ddo_loss(*values[:, [k]], mask[[k]], 0.5, float(lambdas[k])) for k in range(10)]
    torch.testing.assert_close(torch.stack(one_by_one).mean(), whole)


@pytest.mark.parametrize("lambda_", [0.3, 1.0, 50.0])
def test_ddo_at_the_reference_is_its_records_initial_loss(lambda_):
    logp, mask = torch.linspace(-9.0, -3.0, 8), torch.arange(8) < 2
    found = ddo_loss(logp, logp, logp, logp, mask, 0.02, lambda_)
    assert float(found) == pytest.approx(RECORDS["ddo"].initial_loss(0.75, lambda_), rel=1e-6)
    assert float(found) == pytest.approx((1 + 0.75 * lambda_) * math.log(2) / max(lambda_, 1), rel=1e-6)


def test_a_masked_row_of_ddo_gives_its_second_sequence_no_gradient():
    far = torch.tensor([-1e4, -5.0], requires_grad=True)
    zero = torch.zeros(2)
    ddo_loss(zero, far, zero, zero, torch.tensor([True, False]), 1.0, 1.0).backward()
    assert far.grad[0] == 0 and far.grad[1] != 0
