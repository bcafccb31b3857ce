"""Raster sampling: greedy decodes equal the recorded ones, and an image depends on its own seed only."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from cca_ds.models import LlamaGenConfig, create_model, load_weights
from cca_ds.models.llamagen import decode
from cca_ds.sampling import generate
from cca_ds.sampling.guidance import Draw, image_uniforms

TINY = LlamaGenConfig(n_layer=2, n_head=4, dim=64, vocab_size=64, sequence_length=16, num_classes=10)


@pytest.fixture
def model(golden, device) -> nn.Module:
    """The recorded tiny model."""
    model = create_model(TINY)
    load_weights(model, golden / "llamagen_ddp.pt")
    return model.to(device).eval()


@pytest.mark.parametrize(
    ("name", "scale", "interval"),
    [("cfg_1.0", 0.0, None), ("cfg_1.5", 0.5, None), ("cfg_3.0", 2.0, None), ("cfg_3.0_interval_5", 2.0, (0, 7))],
)
def test_greedy_decodes_equal_the_originals(model, golden, name, scale, interval):
    recorded = load_file(golden / "llamagen_greedy.safetensors")
    codes = generate(model, recorded["labels"], guidance_scale=scale, guidance_interval=interval, top_k=1)
    assert torch.equal(codes.cpu(), recorded[name])
    assert codes.dtype == torch.int64


def slow_reference(model, labels, scales, uniforms, draw):
    """The definition: the whole sequence again for every code, no cache, both halves always."""
    codes = torch.zeros(len(labels), model.sequence_length, dtype=torch.int64, device=labels.device)
    null = torch.full_like(labels, model.null_class)
    for step, scale in enumerate(scales):
        cond, uncond = (model.logits(codes, label)[:, step] for label in (labels, null))
        codes[:, step] = draw(cond, uncond, scale, uniforms[:, step])
    return codes


@pytest.mark.parametrize("schedule", ["constant", "linear"])
@pytest.mark.parametrize("interval", [None, (0, 6), (4, 9), (15, 99)])
def test_sampled_codes_equal_decoding_without_a_cache(model, device, schedule, interval):
    labels = torch.tensor([0, 5, 9, 3, 10], device=device)
    first, end = interval or (0, 16)
    growth = [1.0 if schedule == "constant" else step / 15 for step in range(16)]
    scales = [1.5 * growth[step] if first <= step < end else 0.0 for step in range(16)]
    draw = Draw(temperature=1.3, top_k=40, top_p=0.95)
    uniforms = image_uniforms(11, range(5), 16).to(device)
    with torch.no_grad():
        expected = slow_reference(model, labels, scales, uniforms, draw)
    codes = generate(
        model,
        labels,
        guidance_scale=1.5,
        top_k=40,
        top_p=0.95,
        temperature=1.3,
        seed=11,
        guidance_schedule=schedule,
        guidance_interval=interval,
    )
    assert torch.equal(codes, expected)
    assert len(set(map(tuple, codes.tolist()))) == 5


def test_an_image_does_not_depend_on_its_batch(model):
    labels = torch.arange(12) % 10
    whole = generate(model, labels, guidance_scale=0.7, seed=5)
    alone = [generate(model, labels[i : i + 1], guidance_scale=0.7, seed=5, image_indices_B=[i]) for i in range(12)]
    assert torch.equal(whole, torch.cat(alone))
    odd = generate(model, labels[1::2], guidance_scale=0.7, seed=5, image_indices_B=range(1, 12, 2))
    assert torch.equal(whole[1::2], odd)
    assert not torch.equal(whole, generate(model, labels, guidance_scale=0.7, seed=6))


class RowCounter:
    """Counts the rows that go through the first block's attention, step by step."""

    def __init__(self, model: nn.Module) -> None:
        self.rows: list[int] = []
        model.layers[0].attention_norm.register_forward_pre_hook(lambda _, inputs: self.rows.append(len(inputs[0])))


def test_guidance_free_never_runs_the_unconditional_half(model):
    counter = RowCounter(model)
    generate(model, torch.arange(6))
    assert counter.rows == [6] * 16
    counter.rows.clear()
    generate(model, torch.arange(6), guidance_scale=1.0, guidance_interval=(2, 7))
    assert counter.rows == [12] * 7 + [6] * 9


def test_attention_sees_the_live_slots_only_and_copies_no_cache(model, monkeypatch):
    seen = []
    plain = decode.one_query_attention

    def recording(query, keys, values, scale):
        seen.append((keys.shape[2], keys.untyped_storage().data_ptr(), values.untyped_storage().data_ptr()))
        return plain(query, keys, values, scale)

    monkeypatch.setattr(decode, "one_query_attention", recording)
    generate(model, torch.arange(3))
    assert [slots for slots, _, _ in seen] == [step + 1 for step in range(16) for _ in range(2)]
    assert len({pointer for _, *pointers in seen for pointer in pointers}) == 4  # two layers, keys and values


def test_the_head_runs_on_the_last_position_only(model):
    positions = []
    model.output.register_forward_pre_hook(lambda _, inputs: positions.append(inputs[0].shape[1]))
    generate(model, torch.arange(3))
    assert positions == [1] * 16


def test_the_step_of_fixed_shapes_gives_the_same_codes(model, device, monkeypatch):
    """What CUDA graphs capture: positions as tensors, slots behind a mask. On a GPU it is captured, too."""
    labels = torch.arange(4)
    settings = {"guidance_scale": 1.0, "guidance_interval": (0, 9), "seed": 2}
    expected = generate(model, labels, **settings)
    if device == "cuda":
        assert torch.equal(generate(model, labels, cuda_graphs=True, **settings), expected)
    monkeypatch.setattr(decode, "_EagerStep", decode._GraphedStep)
    assert torch.equal(generate(model, labels, **settings), expected)


def test_bfloat16_and_the_training_mode_are_left_as_they_were(model):
    model = model.bfloat16().train()
    codes = generate(model, torch.arange(3))
    assert model.training and codes.shape == (3, 16)
    assert torch.equal(codes, generate(model.eval(), torch.arange(3)))  # sampled without dropout
    assert not model.training


def test_lambda_is_chosen_at_sampling_time(device):
    torch.manual_seed(0)
    model = create_model(TINY, lambda_conditioning=True).to(device)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    low, high = (generate(model, torch.arange(5), guidance_scale=0.5, log_lambda=value) for value in (0.0, 9.0))
    assert not torch.equal(low, high)
    with pytest.raises(ValueError, match="log_lambda must be given"):
        generate(model, torch.arange(5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels_B": torch.tensor([3, 11])}, r"label 11 is outside the model's classes 0\.\.9"),
        ({"labels_B": torch.tensor([-1])}, "label -1 is outside"),
        ({"temperature": 0.0}, "temperature=0.0 must be above 0; for the most probable code use top_k=1"),
        ({"top_k": -1}, "top_k=-1 must be at least 0"),
        ({"top_p": 0.0}, r"top_p=0.0 must be in \(0, 1\]"),
        ({"guidance_scale": -0.5}, "guidance_scale=-0.5 must be"),
        ({"guidance_schedule": "cosine"}, "guidance_schedule='cosine' is unknown"),
        ({"guidance_interval": (5, 5)}, r"guidance_interval=\(5, 5\) must be"),
        ({"image_indices_B": [1]}, "1 image indices for 2 labels"),
    ],
)
def test_settings_that_make_no_sense_get_one_line(model, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        generate(model, **{"labels_B": torch.tensor([1, 2]), **options})
    assert "\n" not in str(caught.value)
