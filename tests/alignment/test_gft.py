"""Guidance-free training against the numbers recorded from thu-ml/GFT's own program, and its parts by definition."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from cca_ds.alignment.losses import LOSSES, gft_forward, gft_loss
from cca_ds.alignment.objective import SUMS, Objective, summarize
from cca_ds.config.schema import Loss
from cca_ds.models import LlamaGenConfig, create_model, load_weights
from cca_ds.sampling import generate
from tests.alignment.test_objective import micro_batch


@pytest.fixture
def recorded(golden, device):
    return {key: value.to(device) for key, value in load_file(golden / "gft_io.safetensors").items()}


def recorded_model(golden, golden_configs, device="cpu", weights="gft_weights.pt"):
    shape = golden_configs["gft"]["shape"]
    config = LlamaGenConfig(
        n_layer=shape["n_layer"], n_head=shape["n_head"], dim=shape["dim"], vocab_size=shape["vocab_size"],
        sequence_length=shape["block_size"], num_classes=shape["num_classes"],
        token_dropout=0.0, resid_dropout=0.0, ffn_dropout=0.0, gft_conditioning=True,
    )  # fmt: skip
    model = create_model(config)
    load_weights(model, golden / weights)
    return model.to(device)


def inputs(recorded):
    return [recorded[name] for name in ("codes", "labels", "betas", "label_mask")]


def test_logits_loss_and_gradients_equal_the_originals(golden, golden_configs, recorded, device):
    model = recorded_model(golden, golden_configs, device).train()
    codes, labels, betas, mask = inputs(recorded)
    assert mask.any() and not mask.all()
    masked = torch.where(mask, model.null_class, labels)
    logits = model.logits(codes, masked, gft_beta=torch.where(mask, 1.0, betas))
    torch.testing.assert_close(logits, recorded["cond_logits"], atol=1e-4, rtol=0)
    uncond = model.logits(codes, torch.full_like(labels, model.null_class), gft_beta=1.0)
    torch.testing.assert_close(uncond, recorded["uncond_logits"], atol=1e-4, rtol=0)
    loss = gft_loss(model, codes, labels, betas, mask)
    loss.backward()
    torch.testing.assert_close(loss, recorded["loss"].reshape(()), atol=1e-4, rtol=0)
    names = [key.removeprefix("grad.") for key in recorded if key.startswith("grad.")]
    assert len(names) == 6
    for name in names:
        torch.testing.assert_close(model.get_parameter(name).grad, recorded[f"grad.{name}"], atol=1e-4, rtol=1e-4)
    parts = gft_forward(model, codes, masked, betas, mask).view(3, -1).mean(1) / -codes.shape[1]
    for found, name in zip(parts, ("cond_loss", "uncond_loss", "loss"), strict=True):
        torch.testing.assert_close(found, recorded[name].reshape(()), atol=1e-4, rtol=0)


def test_ten_recorded_steps_of_the_public_program(golden, golden_configs):
    """Through the objective: loss and gradient norm to 1e-4, and the weights after step 10."""
    settings, recorded = golden_configs["gft"]["trajectory"], load_file(golden / "gft_trajectory.safetensors")
    policy = recorded_model(golden, golden_configs).train()
    decaying = [p for p in policy.parameters() if p.ndim >= 2]
    plain = [p for p in policy.parameters() if p.ndim < 2]
    groups = [{"params": decaying, "weight_decay": settings["weight_decay"]}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings["lr"], betas=settings["betas"])
    objective = Objective(Loss(name="gft"))
    for step in range(settings["steps"]):
        codes, labels, betas, null = (recorded[name][step] for name in ("codes", "labels", "betas", "label_mask"))
        masked = torch.where(null, policy.null_class, labels)
        batch = micro_batch(codes, masked, masked, null, gft_beta_B=betas)
        loss, sums = objective(policy(*objective.stacked(batch), compute=objective.compute), None, batch)
        (loss / len(codes)).backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), settings["clip"])
        optimizer.step()
        optimizer.zero_grad()
        assert loss.item() / len(codes) == pytest.approx(float(recorded["loss"][step]), abs=1e-4)
        assert summarize(sums, objective.spec)["nll_per_code/mixed"] == pytest.approx(loss.item() / len(codes))
        assert float(norm) == pytest.approx(float(recorded["grad_norm"][step]), abs=1e-4)
    after = recorded_model(golden, golden_configs, weights="gft_after10.pt")
    for (name, ours), theirs in zip(policy.named_parameters(), after.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-3, msg=name)


@pytest.mark.parametrize("beta", [0.7, 0.3])
def test_greedy_decodes_equal_the_originals(golden, golden_configs, device, beta):
    model, greedy = recorded_model(golden, golden_configs, device), load_file(golden / "gft_greedy.safetensors")
    codes = generate(model, greedy["labels"], top_k=1, gft_beta=beta)
    assert torch.equal(codes.cpu(), greedy[f"beta_{beta}"])
    assert not torch.equal(greedy["beta_0.7"], greedy["beta_0.3"])


def test_the_embedding_is_computed_in_float32(golden, golden_configs):
    exact, narrow = (recorded_model(golden, golden_configs).t_embedder for _ in range(2))
    betas = torch.linspace(0, 1, 101)
    error = (narrow.bfloat16()(betas).float() - exact(betas)).abs().max()
    assert error < 0.02 * exact(betas).abs().max()  # a bf16 sinusoid of 1000 beta is off by whole radians


def test_the_unconditional_half_has_neither_dropout_nor_gradient(golden, golden_configs, recorded):
    model = recorded_model(golden, golden_configs)
    model.tok_dropout.p = 0.5
    codes, labels, betas, mask = inputs(recorded)
    state = torch.random.get_rng_state()
    cond, uncond, mixed = gft_forward(model.train(), codes, labels, betas, mask).chunk(3)
    assert model.training and all(part.training for part in model.modules())
    null = torch.full_like(labels, model.null_class)
    with torch.no_grad():
        expected = model.eval()(codes, null, gft_beta=1.0)
        torch.testing.assert_close(uncond, expected)
        torch.random.set_rng_state(state)  # the dropout of the conditional half is the first thing drawn
        torch.testing.assert_close(cond, model.train()(codes, labels, gft_beta=torch.where(mask, 1.0, betas)))
    assert not cond.requires_grad or mixed.requires_grad
    mixed.sum().backward()
    (gft_forward(model.eval(), codes, labels, betas, mask))
    assert not model.training


def test_a_share_of_one_is_maximum_likelihood_and_of_zero_teaches_nothing(golden, golden_configs, recorded):
    model = recorded_model(golden, golden_configs).eval()
    codes, labels, betas, _ = inputs(recorded)
    one = torch.ones_like(betas)
    plain = -model(codes, labels, gft_beta=one).mean() / codes.shape[1]
    torch.testing.assert_close(gft_loss(model, codes, labels, one), plain)
    gft_loss(model, codes, labels, torch.zeros_like(betas)).backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_the_loss_by_definition_in_float64(recorded):
    """Two heads and their mix, of a model whose weights are all random."""
    torch.manual_seed(0)
    config = LlamaGenConfig(n_layer=2, n_head=4, dim=64, vocab_size=64, sequence_length=16, num_classes=10,
                            token_dropout=0.0, resid_dropout=0.0, ffn_dropout=0.0, gft_conditioning=True)  # fmt: skip
    model = create_model(config).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    codes, labels, betas, mask = inputs(recorded)
    found = gft_loss(model, codes, labels, betas.double(), mask)
    found.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    masked, share = torch.where(mask, 10, labels), betas.double().view(-1, 1, 1)
    cond = model.logits(codes, masked, gft_beta=torch.where(mask, 1.0, betas))
    uncond = model.logits(codes, torch.full_like(labels, 10), gft_beta=1.0).detach()
    expected = F.cross_entropy((share * cond + (1 - share) * uncond).flatten(0, 1), codes.flatten().long())
    expected.backward()
    torch.testing.assert_close(found, expected)
    for one, (name, p) in zip(gradients, model.named_parameters(), strict=True):
        torch.testing.assert_close(one, p.grad, msg=name)


def test_stacked_rows_and_sums(golden, golden_configs, recorded):
    objective, (codes, labels, betas, mask) = Objective(Loss(name="gft")), inputs(recorded)
    model = recorded_model(golden, golden_configs).eval()
    batch = micro_batch(codes, torch.where(mask, 10, labels), labels.roll(-1), mask, gft_beta_B=betas)
    stacked = objective.stacked(batch)
    assert [len(rows) for rows in stacked] == [len(codes)] * 4  # codes, labels, beta, mask; no second sequence
    assert LOSSES["gft"].passes == 4 and objective.expected_initial_loss(0.5) is None
    logp = model(*stacked, compute=objective.compute)
    _, sums = objective(logp, None, batch)
    tags = summarize(sums, objective.spec)
    means = (logp.view(3, -1).mean(1) / -codes.shape[1]).tolist()
    found = [tags[f"nll_per_code{part}"] for part in ("", "/unconditional", "/mixed")]
    assert found == pytest.approx(means, rel=1e-5) and tags["loss"] == pytest.approx(means[2], rel=1e-5)
    assert not any(tag.startswith(("rewards", "logps")) for tag in tags)
    assert float(sums[SUMS.index("pairs")]) == len(codes)


def test_beta_is_given_to_models_that_take_it_and_to_no_others(golden, golden_configs, recorded):
    model, (codes, labels, _, _) = recorded_model(golden, golden_configs), inputs(recorded)
    with pytest.raises(ValueError, match="conditioned on GFT's beta: gft_beta must be given"):
        model(codes, labels)
    plain = create_model("digits")
    with pytest.raises(ValueError, match="gft_beta given to a model without GFT's beta conditioning: leave it out"):
        plain(torch.zeros(1, 64, dtype=torch.long), torch.zeros(1, dtype=torch.long), gft_beta=0.5)
    for wrong in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="must be above 0 and at most 1"):
            generate(model, labels, gft_beta=wrong)
    with pytest.raises(ValueError, match="exclude each other"):
        create_model("digits", lambda_conditioning=True, gft_conditioning=True)
