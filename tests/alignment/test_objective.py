"""Policy and reference to one loss, against the recorded ten-step trajectory of the public program."""

import math

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cca_ds.alignment.objective import Objective, summarize
from cca_ds.config.schema import Loss
from cca_ds.data.batches import MicroBatch
from cca_ds.models import LlamaGenConfig, create_model
from cca_ds.models.weights import load_weights


def micro_batch(codes_BL, positive_B, negative_B, null_B, weight=1.0, gft_beta_B=None, generated_codes_BL=None):
    size = len(codes_BL)
    return MicroBatch(
        codes_BL=codes_BL,
        positive_labels_B=positive_B,
        negative_labels_B=negative_B,
        null_mask_B=null_B,
        positive_mask_B=null_B | (positive_B == negative_B),
        log_lambda_B=torch.linspace(0, 9, size),
        gft_beta_B=torch.full((size,), 0.5) if gft_beta_B is None else gft_beta_B,
        sample_indices_B=torch.arange(size),
        positions_B=torch.arange(size),
        generated_codes_BL=generated_codes_BL,
        weight=weight,
    )


def tiny_model(golden, golden_configs):
    shape = golden_configs["llamagen"]
    config = LlamaGenConfig(
        n_layer=shape["n_layer"], n_head=shape["n_head"], dim=shape["dim"], vocab_size=shape["vocab_size"],
        sequence_length=shape["block_size"], num_classes=shape["num_classes"],
        token_dropout=0.0, resid_dropout=0.0, ffn_dropout=0.0,
    )  # fmt: skip
    model = create_model(config)
    load_weights(model, golden / "llamagen_ddp.pt")
    return model


def test_ten_recorded_steps_of_the_public_program(golden, golden_configs):
    """Loss and gradient norm to 1e-4, weights after step 10, with the program's own negatives and masks."""
    settings, recorded = golden_configs["trajectory"], load_file(golden / "llamagen_trajectory.safetensors")
    policy, reference = (tiny_model(golden, golden_configs) for _ in range(2))
    decaying = [p for p in policy.parameters() if p.ndim >= 2]
    plain = [p for p in policy.parameters() if p.ndim < 2]
    groups = [{"params": decaying, "weight_decay": settings["weight_decay"]}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings["lr"], betas=settings["betas"])
    objective = Objective(Loss(beta=settings["beta"], lambda_=settings["lambda"]))
    accumulation, micro = settings["accumulation"], settings["micro_batch"]
    for step in range(settings["steps"]):
        total = 0.0
        for part in range(accumulation):
            codes, labels, null = (recorded[name][step, part] for name in ("codes", "labels", "uncond_mask"))
            null_class = torch.full_like(labels, policy.null_class)
            batch = micro_batch(
                codes, torch.where(null, null_class, labels), torch.where(null, null_class, labels.roll(-1)), null
            )
            inputs = objective.stacked(batch)
            with torch.no_grad():
                reference_logp = reference(*inputs)
            loss, _ = objective(policy(*inputs), reference_logp, batch)
            (loss / (accumulation * micro)).backward()
            total += loss.item() / (accumulation * micro)
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), settings["clip"])
        optimizer.step()
        optimizer.zero_grad()
        assert total == pytest.approx(float(recorded["loss"][step]), abs=1e-4)
        assert float(norm) == pytest.approx(float(recorded["grad_norm"][step]), abs=1e-4)
    after = tiny_model(golden, golden_configs)
    load_weights(after, golden / "llamagen_after10.pt")
    for (name, ours), theirs in zip(policy.named_parameters(), after.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-3, msg=name)


def test_stacked_rows_are_chosen_then_rejected():
    batch = micro_batch(torch.arange(8).view(2, 4), torch.tensor([1, 2]), torch.tensor([2, 3]), torch.zeros(2).bool())
    codes_BL, labels_B = Objective(Loss()).stacked(batch)
    assert labels_B.tolist() == [1, 2, 2, 3] and (codes_BL[:2] == codes_BL[2:]).all()
    codes_BL, labels_B = Objective(Loss(name="mle")).stacked(batch)
    assert labels_B.tolist() == [1, 2] and codes_BL.shape == (2, 4)
    *_, log_lambda_B = Objective(Loss(), lambda_conditioned=True).stacked(batch)
    assert log_lambda_B.tolist() == [0, 9, 0, 9]


def test_logged_means_by_hand():
    """Four pairs: two contrasted, one masked, one that met its own label."""
    null = torch.tensor([False, True, False, False])
    batch = micro_batch(torch.zeros(4, 5).long(), torch.tensor([0, 9, 1, 2]), torch.tensor([1, 9, 1, 0]), null)
    chosen, rejected = torch.tensor([2.0, 3.0, 5.0, -1.0]), torch.tensor([-4.0, 3.0, 5.0, 1.0])
    log_ratio = torch.cat([chosen, rejected])
    reference_logp = torch.full((8,), -10.0)
    objective = Objective(Loss(beta=0.5, lambda_=2.0))
    loss, sums = objective(reference_logp + log_ratio, reference_logp, batch)
    means = summarize(sums, objective.spec)
    assert means["rewards/chosen"] == pytest.approx(0.5 * (2 - 1) / 2)
    assert means["rewards/rejected"] == pytest.approx(0.5 * (-4 + 1) / 2)
    assert means["rewards/margins"] == pytest.approx(0.5 * (1 - -3) / 2)
    assert means["rewards/accuracies"] == 0.5
    assert means["rewards/unconditional"] == pytest.approx(0.5 * 3)
    assert means["logps/chosen"] == 0.5 and means["logps/rejected"] == -1.5
    assert means["nll_per_code"] == pytest.approx((8 + 7 + 5 + 11) / 4 / 5)
    assert means["loss"] == pytest.approx(loss.item() / 4)


def test_ddo_stacks_the_real_and_the_generated_codes_under_one_label():
    codes_BL, labels_B = torch.arange(8).view(2, 4), torch.tensor([1, 9])
    batch = micro_batch(codes_BL, labels_B, labels_B, labels_B == 9, generated_codes_BL=codes_BL + 10)
    objective = Objective(Loss(name="ddo"))
    assert objective.needs_generated and not Objective(Loss()).needs_generated
    stacked_RL, labels_R = objective.stacked(batch)
    assert labels_R.tolist() == [1, 9, 1, 9]
    assert torch.equal(stacked_RL[:2], codes_BL) and torch.equal(stacked_RL[2:], codes_BL + 10)


def test_logged_means_of_ddo_by_hand():
    """Three pairs, of them one masked; the tags name what is compared."""
    null, labels_B = torch.tensor([False, True, False]), torch.tensor([0, 9, 1])
    batch = micro_batch(torch.zeros(3, 5).long(), labels_B, labels_B, null, generated_codes_BL=torch.ones(3, 5).long())
    batch.positive_mask_B = null  # the labels are equal by design
    real, generated = torch.tensor([2.0, 3.0, -1.0]), torch.tensor([-4.0, 7.0, 1.0])
    reference_logp = torch.full((6,), -10.0)
    objective = Objective(Loss(name="ddo", beta=0.5, lambda_=2.0))
    loss, sums = objective(reference_logp + torch.cat([real, generated]), reference_logp, batch)
    means = summarize(sums, objective.spec)
    softplus = lambda x: math.log1p(math.exp(x))  # noqa: E731
    terms = [softplus(-1.0) + 2 * softplus(-2.0), softplus(-1.5), softplus(0.5) + 2 * softplus(0.5)]
    assert means == {
        "loss": pytest.approx(sum(terms) / 2 / 3),
        "nll_per_code": pytest.approx((8 + 7 + 11) / 3 / 5),
        "rewards/real": pytest.approx(0.25),
        "rewards/generated": pytest.approx(-0.75),
        "rewards/margins": pytest.approx(1.0),
        "rewards/accuracies": pytest.approx(0.5),
        "logps/real": pytest.approx(0.5),
        "logps/generated": pytest.approx(-1.5),
        "rewards/unconditional": pytest.approx(1.5),
    }
    assert loss.item() / 3 == pytest.approx(means["loss"])
    at_reference, _ = objective(reference_logp, reference_logp, batch)
    assert at_reference.item() / 3 == pytest.approx(objective.expected_initial_loss(2 / 3))


def test_a_forward_of_weight_zero_adds_nothing_but_keeps_the_graph():
    batch = micro_batch(
        torch.zeros(1, 5).long(), torch.tensor([0]), torch.tensor([1]), torch.tensor([False]), weight=0.0
    )
    logp = torch.tensor([-3.0, -4.0], requires_grad=True)
    loss, sums = Objective(Loss())(logp, torch.tensor([-3.5, -4.5]), batch)
    loss.backward()
    assert loss.item() == 0 and not sums.any() and logp.grad.tolist() == [0, 0]


def test_the_initial_loss_is_that_of_r_zero():
    objective = Objective(Loss(lambda_=500.0))
    assert objective.expected_initial_loss(1.0) == pytest.approx(501 * math.log(2) / 500)
    null = torch.tensor([False, False, True, False])
    batch = micro_batch(torch.zeros(4, 3).long(), torch.tensor([0, 1, 9, 2]), torch.tensor([1, 2, 9, 0]), null)
    logp = torch.tensor([-5.0, -6, -7, -8] * 2)
    loss, _ = objective(logp, logp, batch)
    assert loss.item() / 4 == pytest.approx(objective.expected_initial_loss(0.75))


@pytest.mark.parametrize("name", ["cca", "mle", "ddo"])
def test_nothing_is_made_on_the_host_and_copied_to_the_device(name):
    """Such a copy waits for all that a GPU has been given to do, at every micro-batch."""

    class Devices(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = set()

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            result = op(*args, **(kwargs or {}))
            self.seen |= {part.device.type for part in tree_leaves(result) if isinstance(part, torch.Tensor)}
            return result

    pairs = (torch.zeros(4, 16), *torch.arange(8).view(2, 4), torch.zeros(4, dtype=torch.bool))
    batch = micro_batch(*pairs, generated_codes_BL=torch.ones(4, 16)).to("meta")
    objective = Objective(Loss(name=name))
    rows = 4 * objective.spec.rows_per_pair
    policy, reference = torch.empty(2, rows, device="meta").requires_grad_()
    with Devices() as devices:
        objective(policy, reference if objective.spec.needs_reference else None, batch)
    assert devices.seen == {"meta"}
