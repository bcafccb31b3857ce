"""One seed, one trajectory: plain PyTorch, one rank, two ranks, any micro-batch, any ZeRO stage.

Letters: K pairs of a global batch, L codes per image.
"""

import functools
from functools import partial

import pytest
import torch
from torch.nn.functional import logsigmoid

from cca_ds.data.batches import BatchPlan, Steps
from cca_ds.data.codes import CodeTable
from cca_ds.models import create_model, load_weights
from cca_ds.sampling import generate
from tests.dist.runs import (
    REPOSITORY,
    SHAPE,
    assert_same_trajectory,
    fused_adamw,
    generated_table,
    losses,
    metrics,
    of_loss,
    plain_ddp,
    scratch,
    tiny_weights,
    train,
)
from tests.support.digits_table import digits_table

pytestmark = pytest.mark.dist

STEPS, BETA, LAMBDA = 20, 0.5, 10.0
SETTINGS = (f"batch.max_steps={STEPS}", "loss.lambda=10")
DECAY, CLIP = 0.05, 1.0  # of the digits recipe
NO_DROPOUT = {"token_dropout": 0.0, "resid_dropout": 0.0, "ffn_dropout": 0.0}


def start(**conditioning):
    module = create_model("digits", **SHAPE, **NO_DROPOUT, **conditioning)
    load_weights(module, tiny_weights())
    return module


def cca():
    """The policy, and its loss of a batch."""
    policy, reference = start(), start()

    def loss_of(batch):
        def reward(labels_K):
            with torch.no_grad():
                base_K = log_likelihood(reference, batch.codes_BL, labels_K)
            return BETA * (log_likelihood(policy, batch.codes_BL, labels_K) - base_K)

        chosen_K, other_K = reward(batch.positive_labels_B), reward(batch.negative_labels_B)
        second_K = torch.where(batch.positive_mask_B, logsigmoid(other_K), LAMBDA * logsigmoid(-other_K))
        return (-logsigmoid(chosen_K) - second_K).mean() / max(LAMBDA, 1.0)

    return policy, loss_of


def gft():
    """The policy, whose embedding of beta starts as `starting_weights` draws it, and its loss of a batch."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy = start(gft_conditioning=True)

    def loss_of(batch):
        labels_K, beta_K = batch.positive_labels_B, batch.gft_beta_B
        embedded_K = torch.where(batch.null_mask_B, 1.0, beta_K)
        cond_KLV = policy.logits(batch.codes_BL, labels_K, gft_beta=embedded_K)
        with torch.no_grad():
            uncond_KLV = policy.logits(batch.codes_BL, torch.full_like(labels_K, 10), gft_beta=1.0)
        share_K11 = beta_K.view(-1, 1, 1)
        mixed_KLV = share_K11 * cond_KLV + (1 - share_K11) * uncond_KLV
        return torch.nn.functional.cross_entropy(mixed_KLV.flatten(0, 1), batch.codes_BL.flatten())

    return policy, loss_of


def ddo(generated_of):
    """The policy and its loss of a batch, whose images `generated_of` returns for a model and the batch."""
    policy, reference = start(), start()

    def loss_of(batch):
        def reward(codes_KL):
            with torch.no_grad():
                base_K = log_likelihood(reference, codes_KL, batch.positive_labels_B)
            return BETA * (log_likelihood(policy, codes_KL, batch.positive_labels_B) - base_K)

        real_K, generated_K = reward(batch.codes_BL), reward(generated_of(reference, batch))
        second_K = torch.where(batch.null_mask_B, 0.0, LAMBDA * logsigmoid(-generated_K))
        return (-logsigmoid(real_K) - second_K).mean() / max(LAMBDA, 1.0)

    return policy, loss_of


def from_table(reference, batch):
    """The j-th image of a class takes the j-th drawn one of that class, and the first again after the last."""
    drawn, real = CodeTable.open(generated_table()), digits_table(scratch() / "data")
    found = []
    for index in batch.sample_indices_B.tolist():
        label = real.labels[index]
        of_class = [row for row, other in enumerate(drawn.labels) if other == label]
        place = int((real.labels[:index] == label).sum())
        found.append(of_class[place % len(of_class)])
    return torch.from_numpy(drawn.take(found)[0])


def drawn_now(reference, batch):
    """Each pair's image is drawn from a stream of its own, (seed, step, position); masked pairs have none."""
    codes_KL = batch.codes_BL.clone()
    for k in (~batch.null_mask_B).nonzero().flatten().tolist():
        index = (batch.step + 1) * 2**24 + k
        (codes_KL[k],) = generate(reference, batch.positive_labels_B[k : k + 1], seed=0, image_indices_B=[index])
    return codes_KL


BY_LOSS = {"cca": cca, "gft": gft, "ddo": partial(ddo, from_table), "ddo online": partial(ddo, drawn_now)}


def rate(loss: str) -> float:
    """The learning rate; at CCA's the small model tells drawn digits from real ones in ten steps, and the loss is 0."""
    return 1e-4 if loss.startswith("ddo") else 1e-3


@functools.cache
def plain_run(loss: str) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of a loop without DeepSpeed and without the package's losses."""
    torch.set_num_threads(1)
    policy, loss_of = BY_LOSS[loss]()
    groups = [
        {"params": [p for p in policy.parameters() if p.ndim > 1], "weight_decay": DECAY},
        {"params": [p for p in policy.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=rate(loss), betas=(0.9, 0.95))
    plan = BatchPlan(global_size=32, seed=0, mask_probability=0.1, null_class=10)
    steps = Steps(digits_table(scratch() / "data"), plan, 0, [32])
    found, norms = [], []
    for step in range(STEPS):
        (batch,) = steps[step]
        loss = loss_of(batch)
        adamw.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(policy.parameters(), CLIP)))
        adamw.step()
        found.append(float(loss.detach()))
    return found, norms


def log_likelihood(module, codes_KL, labels_K):
    """[K]: the logits' log softmax at the codes, summed."""
    logp_KLV = module.logits(codes_KL, labels_K).float().log_softmax(-1)
    return logp_KLV.gather(-1, codes_KL[..., None]).squeeze(-1).sum(-1)


@pytest.mark.parametrize("loss", [name for name in BY_LOSS if name != "ddo online"])  # bf16 draws other images
def test_bf16_follows_the_trajectory_of_fp32(loss, tmp_path):
    """Weights and activations rounded to eight bits: the loss is off by less than what the run learns."""
    train(
        2,
        tmp_path / "run",
        *SETTINGS,
        f"optimizer.learning_rate={rate(loss)}",
        *of_loss(loss),
        "batch.micro_size=8",
        "precision=bf16",
    )
    expected, _ = plain_run(loss)
    found = losses(tmp_path / "run")
    assert found != expected and len(found) == STEPS
    learnt = max(expected) - min(expected)
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) < 0.25 * learnt


CASES = {
    "1 rank, ZeRO-3": (1, None, 32),
    "2 ranks, ZeRO-3": (2, None, 32),
    "1 rank, ZeRO-3, 4 forwards a step": (1, None, 8),
    "2 ranks, ZeRO-3, 2 forwards a step": (2, None, 8),
    "2 ranks, ZeRO-2": (2, REPOSITORY / "ds_configs/zero2.json", 32),
    "2 ranks, ZeRO-2, 2 forwards a step": (2, REPOSITORY / "ds_configs/zero2.json", 8),
    "2 ranks, stage 0": (2, "stage 0", 32),
    "2 ranks, ZeRO-3, fused AdamW": (2, "fused", 32),
}


SLOW = {"2 ranks, ZeRO-2, 2 forwards a step", "2 ranks, stage 0"}
FILES = {"stage 0": plain_ddp, "fused": fused_adamw}
FOR_EVERY = {"2 ranks, ZeRO-3, 2 forwards a step", "2 ranks, ZeRO-2"}  # losses other than CCA: the rest is slow

FOR_DDO = {
    *FOR_EVERY,
    "2 ranks, stage 0",
    "1 rank, ZeRO-3, 4 forwards a step",
}  # what differs is its data, not its steps


@pytest.mark.parametrize(
    ("case", "loss"),
    [
        pytest.param(case, loss, marks=[pytest.mark.slow] * (case in SLOW or (loss != "cca" and case not in FOR_EVERY)))
        for loss in BY_LOSS
        for case in CASES
        if case in FOR_DDO or not loss.startswith("ddo")
    ],
)
def test_trajectory_is_that_of_plain_pytorch(case, loss, tmp_path):
    ranks, ds, micro = CASES[case]
    ds = FILES[ds]() if ds in FILES else ds
    train(
        ranks,
        tmp_path / "run",
        *SETTINGS,
        f"optimizer.learning_rate={rate(loss)}",
        *of_loss(loss),
        f"batch.micro_size={micro}",
        ds=ds,
    )
    expected, norms = plain_run(loss)
    assert_same_trajectory(losses(tmp_path / "run"), expected)
    assert_same_trajectory([line["grad_norm"] for line in metrics(tmp_path / "run")], norms, 1e-4)
    assert max(expected) > (1.02 if loss == "gft" else 1.2) * min(expected)  # something was learnt, and compared
