"""Compiled blocks: by the real compiler, on a CPU."""

import copy

import pytest
import torch
from torch._dynamo.utils import counters

from cca_ds.config.schema import Model
from cca_ds.models import create_model
from cca_ds.models.base import list_of_blocks
from cca_ds.models.compilation import compile_blocks
from cca_ds.models.from_recipe import build_module
from cca_ds.models.llamagen.model import LlamaGenConfig
from cca_ds.models.var.model import VARConfig
from cca_ds.vq import create_tokenizer
from tests.support.golden_tokenizers import VQVAE_OPTIONS, VQVAE_WEIGHTS

BLOCKS = 12  # more than dynamo's own limit of graphs for one function
LLAMAGEN = LlamaGenConfig(n_layer=BLOCKS, n_head=2, dim=40, multiple_of=16, vocab_size=64, sequence_length=16,
                          num_classes=10, token_dropout=0.0)  # fmt: skip


def build(family: str):
    """A model of twelve blocks with random weights, in training mode, and its inputs."""
    torch.manual_seed(0)
    if family == "llamagen":
        module = create_model(LLAMAGEN)
    else:
        config = VARConfig(depth=BLOCKS, width=64, heads=2, vocab_size=64, scales=(1, 2, 3, 4), num_classes=10)
        module = create_model(config, tokenizer=create_tokenizer("var-vqvae", weights=VQVAE_WEIGHTS, **VQVAE_OPTIONS))
    for parameter in module.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return module.train(), torch.randint(64, (4, module.sequence_length)), torch.randint(10, (4,))


def without_dropout(module):
    """The same module with every dropout off."""
    for part in module.modules():
        for name in ("p", "rate"):
            if isinstance(getattr(part, name, None), float):
                setattr(part, name, 0.0)
    return module


@pytest.fixture(params=["llamagen", "var"])
def family(request):
    """Each family, with a compiler that has seen nothing yet."""
    torch._dynamo.reset()
    counters.clear()
    return request.param


@pytest.mark.parametrize(
    ("family", "dtype"), [("llamagen", torch.bfloat16), ("var", torch.float32)], indirect=["family"], ids=str
)
def test_compiled_blocks_compute_the_same(family, dtype):
    """In 16 bits they are nearer to float32, since what is fused is rounded once."""
    plain, *inputs = build(family)
    plain = without_dropout(plain)
    exact, compiled = copy.deepcopy(plain), copy.deepcopy(plain).to(dtype)
    plain = plain.to(dtype)
    compile_blocks(compiled)
    grads = []
    for module in (exact, plain, compiled):
        logp = module(*inputs)
        logp.sum().backward()
        grads.append(torch.cat([p.grad.float().flatten() for p in module.parameters() if p.grad is not None]))
        grads[-1] = torch.cat([grads[-1], logp.detach()])
    scale = grads[0].norm()
    found, tolerated = (grads[2] - grads[0]).norm() / scale, (grads[1] - grads[0]).norm() / scale
    assert found < 1e-5 if dtype == torch.float32 else found < 1.5 * tolerated, (found, tolerated)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_twelve_blocks_share_two_graphs_without_a_break(family, checkpointing):
    """With stochastic depth, whose rate differs in each block: one graph for rate 0, one for all other rates."""
    module, *inputs = build(family)
    module.set_activation_checkpointing(checkpointing)
    compile_blocks(module)  # fullgraph: a break is an error
    for _ in range(2):
        module(*inputs).sum().backward()
    assert counters["stats"]["unique_graphs"] <= 2 and not counters["graph_break"]
    assert all(p.grad.isfinite().all() for p in module.parameters() if p.grad is not None)


def test_the_whole_model_with_its_fused_head_compiles_without_a_break():
    torch._dynamo.reset()
    module, *inputs = build("llamagen")
    expected = without_dropout(module)(*inputs)
    found = torch.compile(module, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_dropout_is_drawn_anew_and_repeated_by_recomputation(family):
    """Activation checkpointing computes a compiled block again: with other masks the gradient would be another one."""
    plain, *inputs = build(family)
    compile_blocks(plain)
    grads = []
    for checkpointing, seed in ((False, 1), (True, 1), (False, 2)):
        plain.set_activation_checkpointing(checkpointing)
        plain.zero_grad()
        torch.manual_seed(seed)
        plain(*inputs).sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in plain.parameters() if p.grad is not None]))
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-4)
    assert (grads[2] - grads[0]).norm() > 0.01 * grads[0].norm()


def test_no_copy_or_view_of_a_weight_is_kept_for_the_backward(family):
    """Only the parameters themselves: ZeRO-3 releases them, and gathers them again for the backward."""
    module, *inputs = build(family)
    compile_blocks(module)
    module(*inputs).sum().backward()
    parameters = {p.untyped_storage().data_ptr(): p for p in module.parameters()}
    blocks = {id(p) for block in list_of_blocks(module)[1] for p in block.parameters()}
    kept = []

    def pack(tensor):
        parameter = parameters.get(tensor.untyped_storage().data_ptr())
        if parameter is not None and id(parameter) in blocks:
            kept.append(tensor is parameter)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(*inputs)
    assert len(kept) >= 4 * BLOCKS and all(kept)


def test_what_is_compiled_follows_the_recipe():
    overrides = {"n_layer": 2, "n_head": 2, "dim": 32, "multiple_of": 16}
    for setting, compiled in ((True, True), (False, False), ("auto", False)):  # auto: resolved by the run before
        module = build_module(Model(overrides=overrides, compile=setting))
        assert all(("forward" in vars(block)) == compiled for block in module.layers)
