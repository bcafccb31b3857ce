"""Sampling from VAR: the recorded greedy images, and a sampler without cache or shortcuts as the judge of the rest."""

import pytest
import torch
from safetensors.torch import load_file

from cca_ds.models import create_model, load_weights
from cca_ds.models.var.blocks import Block
from cca_ds.models.var.model import VARConfig
from cca_ds.sampling import generate
from cca_ds.sampling.guidance import draw_codes, guidance_scales, image_uniforms
from tests.support.golden_tokenizers import vqvae

SCALES = (1, 2, 3, 4)
CONFIG = VARConfig(depth=2, num_classes=10, vocab_size=64, scales=SCALES, width=128)


@pytest.fixture(scope="module")
def tokenizer(device):
    return vqvae().to(device)


@pytest.fixture
def model(golden, device, tokenizer):
    model = create_model(CONFIG, tokenizer=tokenizer).to(device).eval()
    load_weights(model, golden / "var_depth2.pth")
    return model


@pytest.fixture(scope="module")
def recorded(golden, device):
    return {name: tensor.to(device) for name, tensor in load_file(golden / "var_greedy.safetensors").items()}


def slow_sampler(model, labels, strengths, uniforms, **draw):
    """Scale by scale with neither cache nor shortcut: the whole sequence through the model, both conditions always."""
    codes = torch.zeros(len(labels), model.sequence_length, dtype=torch.long, device=labels.device)
    start = 0
    for scale, strength in zip(SCALES, strengths, strict=True):
        span = slice(start, start + scale**2)
        cond = model.logits(codes, labels)[:, span]
        uncond = model.logits(codes, torch.full_like(labels, model.null_class))[:, span]
        logits = cond + strength * (cond - uncond)
        codes[:, span] = draw_codes(logits.flatten(0, 1), uniforms[:, span].flatten(), **draw).view(len(labels), -1)
        start = span.stop
    return codes


@pytest.mark.parametrize("scale", [0.0, 1.5, 4.0])
def test_greedy_images_are_the_recorded_ones(model, tokenizer, recorded, scale):
    codes = generate(model, recorded["labels"], scale, top_k=1, guidance_schedule="linear")
    assert codes.dtype == torch.int64 and codes.shape == (4, 30)
    images = (tokenizer.decode(codes) + 1) / 2
    torch.testing.assert_close(images, recorded[f"image_cfg_{scale}"], atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("scale", "schedule", "interval"),
    [
        (0.0, "constant", None),
        (2.0, "constant", None),
        (2.0, "linear", None),
        (3.0, "constant", (0, 2)),
        (3.0, "linear", (1, 3)),
        (3.0, "constant", (2, 4)),
    ],
)
@pytest.mark.parametrize(
    "draw", [{"top_k": 1}, {"top_k": 12, "top_p": 0.9}, {"temperature": 0.7}, {"top_p": 0.5, "temperature": 1.3}]
)
@torch.no_grad()
def test_same_codes_as_the_slow_sampler(model, device, scale, schedule, interval, draw):
    labels = torch.tensor([3, 0, 7], device=device)
    strengths = guidance_scales(scale, len(SCALES), schedule, interval)
    uniforms = image_uniforms(5, [10, 11, 12], model.sequence_length).to(device)
    expected = slow_sampler(model, labels, strengths, uniforms, **draw)
    codes = generate(
        model,
        labels,
        scale,
        seed=5,
        image_indices_B=[10, 11, 12],
        guidance_schedule=schedule,
        guidance_interval=interval,
        **draw,
    )
    assert torch.equal(codes, expected)


@pytest.mark.parametrize(
    ("scale", "interval", "rows"),
    [(0.0, None, [3, 3, 3, 3]), (1.5, None, [6, 6, 6, 6]), (1.5, (0, 2), [6, 6, 3, 3]), (1.5, (1, 3), [6, 6, 6, 3])],
)
def test_the_unconditional_half_runs_only_while_needed(model, device, monkeypatch, scale, interval, rows):
    seen = []
    step = Block.step

    def counted(self, x, *arguments):
        seen.append(tuple(x.shape[:2]))
        return step(self, x, *arguments)

    monkeypatch.setattr(Block, "step", counted)
    generate(model, torch.tensor([1, 2, 3], device=device), scale, guidance_interval=interval)
    # two blocks a scale, each on that scale's codes only
    assert seen == [(row, size**2) for row, size in zip(rows, SCALES, strict=True) for _ in range(2)]


def test_the_head_skips_the_half_that_a_scale_does_not_use(model, device):
    rows = []
    hook = model.head.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    generate(model, torch.tensor([1, 2], device=device), 2.0, guidance_interval=(1, 3))
    hook.remove()
    assert rows == [2, 4, 4, 2]


def test_what_the_class_determines_is_computed_once(model, device):
    calls = []
    hook = model.blocks[0].ada_lin.register_forward_hook(lambda *_: calls.append(1))
    generate(model, torch.tensor([1, 2], device=device), 2.0)
    hook.remove()
    assert len(calls) == 1


def test_the_same_image_in_any_batch(model, device):
    labels = torch.tensor([4, 4, 9, 0], device=device)
    together = generate(model, labels, 1.0, seed=3, image_indices_B=[7, 8, 9, 10])
    alone = [generate(model, labels[i : i + 1], 1.0, seed=3, image_indices_B=[7 + i]) for i in range(4)]
    assert torch.equal(together, torch.cat(alone))
    assert not torch.equal(together[0], together[1])  # one label, two images
    assert not torch.equal(together, generate(model, labels, 1.0, seed=4, image_indices_B=[7, 8, 9, 10]))


def test_samples_follow_the_model(model, device, monkeypatch):
    labels = torch.full((1000,), 3, device=device)
    monkeypatch.setattr(model, "scale_slices", lambda: [(0, 1)])  # the first code is enough
    codes = generate(model, labels, seed=1)[:, 0]
    expected = model.logits(torch.zeros(1, 30, dtype=torch.long, device=device), labels[:1])[0, 0].softmax(-1)
    frequency = codes.bincount(minlength=64) / 1000
    # chi-square of 63 degrees of freedom: above 120 in one case of 20,000
    assert (1000 * (frequency - expected).square() / expected).sum() < 120


def test_bf16_and_autocast_sample(model, device):
    labels = torch.tensor([1, 2], device=device)
    with torch.autocast(device, torch.bfloat16):
        under_autocast = generate(model, labels, top_k=1)
    assert under_autocast.shape == (2, 30)
    cast = generate(model.bfloat16(), labels, 1.0, top_k=5)
    assert cast.shape == (2, 30) and cast.min() >= 0 and cast.max() < 64


def test_lambda_is_chosen_when_sampling(golden, device, tokenizer):
    model = create_model(CONFIG, tokenizer=tokenizer, lambda_conditioning=True).to(device).eval()
    load_weights(model, golden / "var_depth2.pth")
    labels = torch.tensor([1, 2, 3], device=device)
    torch.manual_seed(0)
    torch.nn.init.normal_(model.lambda_embedding.fc2.weight, std=0.2)
    low = generate(model, labels, 1.0, top_k=1, log_lambda=0.0)
    high = generate(model, labels, 1.0, top_k=1, log_lambda=9.0)
    assert not torch.equal(low, high)
    with pytest.raises(ValueError, match="log_lambda must be given"):
        generate(model, labels)


def test_a_model_without_tokenizer_says_so(device):
    model = create_model(CONFIG).to(device)
    with pytest.raises(ValueError, match="this VAR has no tokenizer"):
        generate(model, torch.tensor([1], device=device))
