"""LlamaGen: parity with the recorded outputs, shapes of the published models, and what training needs of it."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from cca_ds.models import LlamaGenConfig, create_model, model_config
from cca_ds.models.layers import DropPath
from cca_ds.ops.rope import rotary_table

TINY = LlamaGenConfig(n_layer=2, n_head=4, dim=64, vocab_size=64, sequence_length=16, num_classes=10)


def tiny(golden, device="cpu", **overrides) -> nn.Module:
    """The recorded model, its weights put in without the loader (which has tests of its own)."""
    model = create_model(TINY, **overrides)
    state = torch.load(golden / "llamagen_ddp.pt", weights_only=True)["model"]
    model.load_state_dict({key: value.float() for key, value in state.items()}, strict=True)
    return model.to(device)


@pytest.fixture
def recorded(golden, device):
    """Codes, labels, logits and log-likelihoods that LlamaGen's own program computed."""
    return {key: value.to(device) for key, value in load_file(golden / "llamagen_io.safetensors").items()}


def random_model(**overrides) -> nn.Module:
    """A tiny model all of whose weights are random, the output layer's too."""
    torch.manual_seed(0)
    model = create_model(TINY, **overrides)
    nn.init.normal_(model.output.weight, std=0.3)
    return model


def test_logits_and_log_likelihoods_equal_the_originals(golden, recorded, device):
    model = tiny(golden, device).eval()
    with torch.no_grad():
        logits = model.logits(recorded["codes"], recorded["labels"])
        logp = model(recorded["codes"], recorded["labels"])
    token_logp = logits.log_softmax(-1).gather(-1, recorded["codes"][..., None])[..., 0]
    torch.testing.assert_close(logits, recorded["logits"], atol=1e-4, rtol=0)
    torch.testing.assert_close(token_logp, recorded["token_logp"], atol=1e-4, rtol=0)
    torch.testing.assert_close(logp, recorded["seq_logp"], atol=1e-4, rtol=0)
    assert logp.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_codes_of_any_integer_type(golden, recorded, device, dtype):
    model = tiny(golden, device).eval()
    with torch.no_grad():
        logp = model(recorded["codes"].to(dtype), recorded["labels"])
    torch.testing.assert_close(logp, recorded["seq_logp"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", ["B", "L", "XL", "XXL", "3B"])
def test_keys_and_shapes_of_the_published_models(golden, size):
    recorded = json.loads((golden / "state_dict_shapes.json").read_text())[f"llamagen/GPT-{size}"]
    with torch.device("meta"):
        model = create_model(f"GPT-{size}")
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == recorded["state_dict"]
    assert sum(parameter.numel() for parameter in model.parameters()) == recorded["params"]
    config = model.config
    assert (config.n_layer, config.n_head, config.dim) == tuple(recorded[k] for k in ("n_layer", "n_head", "dim"))


def test_digits_preset_is_about_eight_hundred_thousand_parameters():
    model = create_model("digits")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert 750_000 < parameters < 850_000
    assert (model.sequence_length, model.vocab_size, model.num_classes, model.null_class) == (64, 17, 10, 10)


def test_a_new_model_finds_every_code_equally_likely():
    model = create_model("digits").eval()
    logp = model(torch.randint(17, (3, 64)), torch.tensor([0, 9, 10]))
    torch.testing.assert_close(logp, torch.full((3,), -64 * math.log(17)))


def test_initial_values_have_the_originals_distribution():
    model = create_model("digits")
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == 1).all()
        elif name == "output.weight":
            assert (parameter == 0).all()
        else:
            count = parameter.numel()
            assert abs(parameter.mean()) < 5 * 0.02 / count**0.5, name
            assert parameter.std().item() == pytest.approx(0.02, rel=5 / (2 * count) ** 0.5), name


def test_a_position_sees_the_label_and_the_codes_before_it_only():
    model = random_model().eval()
    codes, labels = torch.randint(64, (1, 16)), torch.tensor([3])
    changed = codes.clone()
    changed[0, 7] = (changed[0, 7] + 1) % 64
    before, after = model.logits(codes, labels), model.logits(changed, labels)
    assert torch.equal(before[:, :8], after[:, :8])
    assert ((before - after).abs().amax(-1)[0, 8:] > 1e-6).all()
    other_label = model.logits(codes, labels + 1)
    assert ((before - other_label).abs().amax(-1) > 1e-6).all()


def test_rotary_table_stays_float32_through_casts_and_to_empty(golden, recorded, device):
    model = tiny(golden, device)
    exact = rotary_table(4, 16).to(device)
    for cast in (model.bfloat16, model.half, model.float):
        assert torch.equal(cast().freqs_cis, exact) and model.freqs_cis.dtype == torch.float32
    with torch.device("meta"):
        empty = create_model(TINY)
    empty = empty.to_empty(device=device)
    empty.load_state_dict(model.state_dict())
    with torch.no_grad():
        logp = empty.eval()(recorded["codes"], recorded["labels"])
    assert torch.equal(empty.freqs_cis, exact)
    torch.testing.assert_close(logp, model.eval()(recorded["codes"], recorded["labels"]))
    model.freqs_cis = model.freqs_cis.half()  # as an engine does that casts the buffers by itself
    with torch.inference_mode():
        model(recorded["codes"], recorded["labels"])
    assert torch.equal(model.freqs_cis, exact)
    model(recorded["codes"], recorded["labels"]).sum().backward()  # the table made above is no inference tensor


def test_half_precision_is_near_float32(golden, recorded, device):
    model = tiny(golden, device).eval().bfloat16()
    with torch.no_grad():
        logp = model(recorded["codes"], recorded["labels"])
    assert logp.dtype == torch.float32
    torch.testing.assert_close(logp, recorded["seq_logp"], atol=0.6, rtol=0)  # of 75 nats over 16 codes


def test_activation_checkpointing_changes_no_gradient(device):
    model = random_model(token_dropout=0.2).to(device)
    codes, labels = torch.randint(64, (4, 16), device=device), torch.tensor([0, 3, 10, 9], device=device)
    gradients = []
    for enabled in (False, True):
        model.set_activation_checkpointing(enabled)
        model.zero_grad()
        torch.manual_seed(7)  # the dropouts are drawn again in the backward, and must be the same
        model(codes, labels).sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


def test_activation_checkpointing_keeps_less():
    codes, labels = torch.randint(64, (4, 16)), torch.zeros(4, dtype=torch.long)

    def kept(enabled: bool) -> int:
        model = random_model(n_layer=8)
        model.set_activation_checkpointing(enabled)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            model(codes, labels)
        return sum(sizes)

    assert kept(True) < 0.35 * kept(False)


def test_dropouts_act_in_training_mode_only():
    codes, labels = torch.randint(64, (4, 16)), torch.zeros(4, dtype=torch.long)
    for field in ("token_dropout", "attention_dropout", "resid_dropout", "ffn_dropout", "drop_path"):
        rates = dict.fromkeys(("token_dropout", "resid_dropout", "ffn_dropout"), 0.0) | {field: 0.5}
        model = random_model(**rates)
        assert not torch.equal(model.train()(codes, labels), model(codes, labels)), field
        assert torch.equal(model.eval()(codes, labels), model(codes, labels)), field
    model = random_model(token_dropout=0.0, resid_dropout=0.0, ffn_dropout=0.0).train()
    assert torch.equal(model(codes, labels), model(codes, labels))


def test_drop_path_keeps_the_mean_and_grows_over_the_layers():
    torch.manual_seed(0)
    kept = DropPath(0.25).train()(torch.ones(4000, 2, 2))
    assert kept.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert (kept[:, :1, :1] == kept).all()
    assert kept.mean().item() == pytest.approx(1.0, abs=5 * (0.25 / 0.75 / 4000) ** 0.5)
    rates = [layer.drop_path.rate for layer in create_model(TINY, n_layer=5, drop_path=0.4).layers]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


def test_lambda_conditioning_starts_as_the_base_model_and_then_tells_lambdas_apart(golden, recorded, device):
    base = tiny(golden, device).eval()
    model = create_model(TINY, lambda_conditioning=True).to(device).eval()
    missing, unexpected = model.load_state_dict(base.state_dict(), strict=False)
    assert not unexpected and all(key.startswith("lambda_embedding.") for key in missing)
    log_lambda = torch.linspace(0, 9, 6, device=device)
    logp = model(recorded["codes"], recorded["labels"], log_lambda)
    torch.testing.assert_close(logp, recorded["seq_logp"], atol=1e-4, rtol=0)
    logp.sum().backward()
    assert model.lambda_embedding.fc2.weight.grad.abs().max() > 0
    nn.init.normal_(model.lambda_embedding.fc2.weight, std=0.1)
    assert (model(recorded["codes"], recorded["labels"], log_lambda) - logp).abs().min() > 1e-3
    with pytest.raises(ValueError, match="conditioned on lambda: log_lambda must be given"):
        model(recorded["codes"], recorded["labels"])
    with pytest.raises(ValueError, match="without lambda conditioning"):
        base(recorded["codes"], recorded["labels"], log_lambda)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"n_head": 5}, r"dim=64 must be a multiple of 4 \* n_head = 20"),
        ({"sequence_length": 17}, "sequence_length=17 must be a square number"),
        ({"n_layer": 0}, "n_layer=0 must be at least 1"),
        ({"resid_dropout": 1.0}, r"resid_dropout=1.0 must be in \[0, 1\)"),
        ({"droput": 0.1}, "LlamaGenConfig has no 'droput'"),
        ({"n_layers": 3}, "LlamaGenConfig has no 'n_layers': did you mean n_layer?"),
    ],
)
def test_a_shape_that_cannot_be_is_refused_in_one_line(overrides, message):
    with pytest.raises(ValueError, match=message) as caught:
        create_model(TINY, **overrides)
    assert "\n" not in str(caught.value)


def test_names_that_users_know():
    assert model_config("GPT-3B") == model_config("llamagen-3b") == model_config("c2i_3B")
    assert model_config("llamagen-b", sequence_length=256).grid_size == 16
    with pytest.raises(ValueError, match="llamagen-3d: no such model; did you mean llamagen-"):
        create_model("llamagen-3d")
    with pytest.raises(ValueError, match="choose one of llamagen-b, "):
        create_model("resnet")
