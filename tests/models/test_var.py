"""VAR: recorded logits, published names, what a code sees, conditioning and training modes."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from cca_ds.models import create_model, load_weights
from cca_ds.models.var.blocks import Block
from cca_ds.models.var.model import VAR, VARConfig
from cca_ds.vq import create_tokenizer
from tests.support.compare import error
from tests.support.golden_tokenizers import vqvae

SCALES = (1, 2, 3, 4)
CONFIG = VARConfig(depth=2, num_classes=10, vocab_size=64, scales=SCALES, width=128)


def build(tokenizer, device, **overrides):
    return create_model(CONFIG, tokenizer=tokenizer, **overrides).to(device).eval()


@pytest.fixture(scope="module")
def tokenizer(device):
    return vqvae().to(device)


@pytest.fixture
def model(golden, device, tokenizer):
    model = build(tokenizer, device)
    load_weights(model, golden / "var_depth2.pth")
    return model


@pytest.fixture(scope="module")
def recorded(golden, device):
    return {name: tensor.to(device) for name, tensor in load_file(golden / "var_io.safetensors").items()}


# --- the recorded numbers and names


@torch.no_grad()
def test_logits_and_log_likelihoods_are_the_recorded_ones(model, recorded):
    codes, labels = recorded["codes"], recorded["labels"]
    torch.testing.assert_close(model.logits(codes, labels), recorded["logits"], atol=1e-4, rtol=0)
    logp = model(codes.to(torch.int32), labels)
    assert logp.dtype == torch.float32
    torch.testing.assert_close(logp, recorded["seq_logp"], atol=1e-4, rtol=1e-6)


@pytest.mark.parametrize("depth", [16, 20, 24, 30])
def test_names_and_shapes_of_the_published_models(golden, depth):
    published = json.loads((golden / "state_dict_shapes.json").read_text())[f"var/d{depth}"]
    with torch.device("meta"):
        model = create_model(f"var-d{depth}")
    masks = {"lvl_1L", "attn_bias_for_masking"}  # computed, not learned
    expected = {key: shape for key, shape in published["state_dict"].items() if key not in masks}
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == expected
    assert sum(parameter.numel() for parameter in model.parameters()) == published["params"]
    assert (model.config.dim, model.config.n_head) == (published["embed_dim"], published["num_heads"])
    assert (model.sequence_length, model.vocab_size, model.null_class) == (680, 4096, 1000)


def test_names_and_shapes_of_the_published_model_at_512_pixels(golden):
    """Recorded from VAR's own code: one adaptive norm shared by all blocks, ten scales up to 32."""
    published = json.loads((golden / "state_dict_shapes.json").read_text())["var/d36-512"]
    with torch.device("meta"):
        model = create_model("d36")
    expected = {k: v for k, v in published["state_dict"].items() if k not in ("lvl_1L", "attn_bias_for_masking")}
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == expected
    assert sum(parameter.numel() for parameter in model.parameters()) == published["params"]
    assert (model.sequence_length, model.config.n_head, model.config.drop_path_rate) == (2240, 36, pytest.approx(0.15))


def test_a_model_made_on_the_meta_device_loads_and_asks_for_its_tokenizer(golden, device, tokenizer, recorded):
    with torch.device("meta"):
        model = create_model(CONFIG)
    load_weights(model, golden / "var_depth2.pth")
    model = model.float().to(device).eval()
    with pytest.raises(ValueError, match="this VAR has no tokenizer: give create_model"):
        model(recorded["codes"], recorded["labels"])
    model.attach_tokenizer(tokenizer)
    with torch.no_grad():
        logp = model(recorded["codes"], recorded["labels"])
    torch.testing.assert_close(logp, recorded["seq_logp"], atol=1e-4, rtol=1e-6)


def test_the_tokenizer_in_the_model_is_frozen_and_no_part_of_its_weights(model, tokenizer, recorded):
    assert not [name for name, _ in model.named_parameters() if "pyramid" in name]
    assert not [name for name in model.state_dict() if "pyramid" in name]
    model.bfloat16()
    assert model.pos_1LC.dtype == torch.bfloat16
    assert {buffer.dtype for buffer in model.pyramid.buffers()} == {torch.float32}
    seen = model.pyramid.teacher_input(recorded["codes"])
    torch.testing.assert_close(seen, recorded["var_input"], atol=1e-5, rtol=0)
    model.to_empty(device=recorded["codes"].device)
    assert torch.equal(model.pyramid.teacher_input(recorded["codes"]), seen)
    tokenizer_weight = tokenizer.quantize.embedding.weight
    assert model.pyramid.embedding.weight.data_ptr() != tokenizer_weight.data_ptr()


@torch.no_grad()
def test_a_code_is_seen_by_finer_scales_only(model, recorded):
    codes, labels = recorded["codes"][:1], recorded["labels"][:1]
    before = model.logits(codes, labels)
    changed = codes.clone()
    changed[:, 5:14] = (changed[:, 5:14] + 1) % 64  # the third scale
    moved = (model.logits(changed, labels) - before).abs().amax(-1)[0]
    assert moved[:14].max() == 0.0
    assert moved[14:].min() > 0.0


@torch.no_grad()
def test_the_learned_scale_is_capped_at_100(model, recorded):
    def logits_at(value):
        for block in model.blocks:
            block.attn.scale_mul_1H11.fill_(value)
        return model.logits(recorded["codes"], recorded["labels"])

    assert torch.equal(logits_at(math.log(100.0) + 3.0), logits_at(math.log(100.0) + 1.0))
    assert not torch.equal(logits_at(math.log(99.0)), logits_at(math.log(100.0)))


@torch.no_grad()
def test_shared_adaln_is_one_map_plus_each_blocks_offsets(device, tokenizer, recorded):
    torch.manual_seed(0)
    shared, own = build(tokenizer, device, shared_aln=True), build(tokenizer, device)
    assert {"shared_ada_lin.1.weight", "blocks.0.ada_gss"} <= set(shared.state_dict())
    for parameter in shared.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    own.load_state_dict(shared.state_dict(), strict=False)
    for block, theirs in zip(own.blocks, shared.blocks, strict=True):
        block.ada_lin[1].weight.copy_(shared.shared_ada_lin[1].weight)
        block.ada_lin[1].bias.copy_(shared.shared_ada_lin[1].bias + theirs.ada_gss.flatten())
    codes, labels = recorded["codes"], recorded["labels"]
    torch.testing.assert_close(shared(codes, labels), own(codes, labels), atol=1e-4, rtol=0)


# --- training


def gradients(model, recorded):
    model.zero_grad(set_to_none=True)
    model(recorded["codes"], recorded["labels"]).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_gradients_are_those_of_float64(model, recorded):
    """Against a float64 copy, in which norms and softmax go through PyTorch's own autograd."""
    found = gradients(model, recorded)
    expected = gradients(model.double(), recorded)
    assert set(found) == set(expected) and all(grad is not None for grad in found.values())
    worst = max((error(found[name], expected[name]), name) for name in found if expected[name].norm() > 1e-6)
    assert worst[0] < 1e-4, worst


def test_a_block_keeps_little_for_its_backward(device):
    """The stream twice, q, k, v, what attention gives, and the hidden layer (4): 10 times [B, L, D]."""
    if device != "cpu":
        pytest.skip("the CPU's own backward")
    block = Block(CONFIG, drop_path=0.0)
    x = torch.randn(4, 30, 128, requires_grad=True)
    kept = {}

    def pack(tensor):
        if tensor.shape[:1] == (4,) and tensor.numel() >= x.numel():
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = block(x, torch.randn(4, 128))
    assert out.requires_grad and sum(kept.values()) <= 10 * x.nbytes


def test_activation_checkpointing_changes_nothing_but_memory(model, recorded):
    model.train()
    for block in model.blocks:
        block.drop_path.rate = 0.5  # the recomputed block must leave out the same images
    torch.manual_seed(1)
    expected = gradients(model, recorded)
    model.set_activation_checkpointing(True)
    runs = []
    hook = model.blocks[0].ffn.register_forward_pre_hook(lambda *_: runs.append(1))
    torch.manual_seed(1)
    found = gradients(model, recorded)
    hook.remove()
    assert len(runs) == 2  # once forward, once again in the backward
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, atol=1e-5, rtol=1e-4)


def test_stochastic_depth_grows_over_the_blocks():
    rates = [block.drop_path.rate for block in VAR(VARConfig(depth=5, width=32, drop_path=0.4)).blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert VARConfig(depth=24).drop_path_rate == pytest.approx(0.1)
    assert VARConfig(depth=30).drop_path_rate == pytest.approx(0.125)
    assert VARConfig(depth=16, drop_path=0.0).drop_path_rate == 0.0


def test_a_branch_left_out_leaves_the_image_as_it_is_and_the_others_grow(device):
    torch.manual_seed(0)
    block = Block(CONFIG, drop_path=0.75).to(device)
    torch.nn.init.normal_(block.ada_lin[1].weight, std=0.1)
    x, condition = torch.randn(64, 30, 128, device=device), torch.randn(64, 128, device=device)
    with torch.no_grad():
        block.attn.proj.weight.zero_()  # the second branch alone
        expected = block.eval()(x, condition) - x
        found = block.train()(x, condition) - x
    left_out = found.abs().amax((1, 2)) == 0
    assert 0.5 < left_out.float().mean() < 0.95
    torch.testing.assert_close(found[~left_out], 4 * expected[~left_out], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_first_weights_have_the_originals_distribution():
    torch.manual_seed(0)
    model = VAR(VARConfig(depth=4, width=256, num_classes=500, vocab_size=1024))
    std = math.sqrt(1 / 256 / 3)
    expected = {
        "pos_1LC": std,
        "class_emb.weight": std,
        "word_embed.weight": std,
        "blocks.1.attn.mat_qkv.weight": std,
        "blocks.1.ffn.fc1.weight": std,
        "blocks.1.attn.proj.weight": std / math.sqrt(8),
        "blocks.1.ffn.fc2.weight": std / math.sqrt(8),
        "head.weight": 0.02 * std,
        "head_nm.ada_lin.1.weight": 0.5 * std,
    }
    state = model.state_dict()
    assert {name: state[name].std().item() for name in expected} == pytest.approx(expected, rel=0.05)
    adaptive = state["blocks.2.ada_lin.1.weight"]
    assert adaptive[:512].std().item() == pytest.approx(1e-5 * std, rel=0.05)
    assert adaptive[512:].std().item() == pytest.approx(0.5 * std, rel=0.05)
    assert all(value.abs().max() == 0 for name, value in state.items() if name.endswith("bias"))
    assert state["blocks.0.attn.scale_mul_1H11"].exp().flatten().tolist() == pytest.approx([4.0] * 4)


@torch.no_grad()
def test_bf16_weights_and_autocast_are_near_float32(model, recorded, device):
    codes, labels = recorded["codes"], recorded["labels"]
    with torch.autocast(device, torch.bfloat16):
        under_autocast = model(codes, labels)
    cast = model.bfloat16()(codes, labels)
    for logp in (under_autocast, cast):
        assert logp.dtype == torch.float32
        torch.testing.assert_close(logp, recorded["seq_logp"], atol=0.5, rtol=0)


# --- conditioning on lambda, and bad input


@torch.no_grad()
def test_lambda_conditioning_starts_as_the_base_model(golden, tokenizer, device, recorded):
    model = build(tokenizer, device, lambda_conditioning=True)
    load_weights(model, golden / "var_depth2.pth")
    assert [key for key in model.state_dict() if key.startswith("lambda_embedding.")]
    codes, labels = recorded["codes"], recorded["labels"]
    log_lambda = torch.tensor([0.0, 4.5, 9.0], device=device)
    torch.testing.assert_close(model(codes, labels, log_lambda), recorded["seq_logp"], atol=1e-4, rtol=1e-6)
    torch.nn.init.normal_(model.lambda_embedding.fc2.weight, std=0.1)
    moved = model(codes, labels, log_lambda) - recorded["seq_logp"]
    assert moved.abs().min() > 1e-3
    with pytest.raises(ValueError, match="log_lambda must be given"):
        model(codes, labels)
    with pytest.raises(ValueError, match="without lambda conditioning"):
        build(tokenizer, device)(codes, labels, log_lambda)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depth": 0}, "depth=0 must be at least 1"),
        ({"scales": (1, 3, 2)}, r"scales=\(1, 3, 2\) must be growing sizes"),
        ({"scales": ()}, "must be growing sizes"),
        ({"width": 100, "heads": 3}, "width=100 must be a multiple of heads=3"),
        ({"drop_path": 1.0}, r"drop_path=1.0 must be in \[0, 1\)"),
    ],
)
def test_a_shape_that_cannot_be_is_one_clear_line(fields, message):
    with pytest.raises(ValueError, match=message) as caught:
        VARConfig(**{"depth": 2, **fields})
    assert "\n" not in str(caught.value)


def test_another_tokenizer_or_sequence_is_refused(tokenizer, model, recorded):
    with pytest.raises(ValueError, match="vocab_size=128 but the tokenizer's is 64"):
        create_model(CONFIG, tokenizer=tokenizer, vocab_size=128)
    with pytest.raises(ValueError, match=r"scales=\(1, 2, 4\) but the tokenizer's is \(1, 2, 3, 4\)"):
        create_model(CONFIG, tokenizer=tokenizer, scales=(1, 2, 4))
    with pytest.raises(ValueError, match="takes 30 codes an image, not 16"):
        model(recorded["codes"][:, :16], recorded["labels"])


def test_a_tiny_model_of_explicit_width_learns(device):
    torch.manual_seed(0)
    shape = {"channels": 32, "channel_multipliers": (1,), "z_channels": 4, "codebook_size": 16, "scales": (1, 2, 4)}
    tokenizer = create_tokenizer("var-vqvae", **shape).to(device)
    config = VARConfig(depth=2, width=32, heads=4, num_classes=3, vocab_size=16, scales=(1, 2, 4), code_channels=4)
    model = create_model(config, tokenizer=tokenizer).to(device)
    codes, labels = torch.randint(0, 16, (3, 21), device=device), torch.arange(3, device=device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    first = model(codes, labels).mean().item()
    assert first == pytest.approx(-21 * math.log(16), rel=0.02)
    for _ in range(40):
        optimizer.zero_grad()
        (-model(codes, labels).mean()).backward()
        optimizer.step()
    assert model(codes, labels).mean().item() > 0.3 * first
