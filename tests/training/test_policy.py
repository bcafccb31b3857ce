"""The module that the policy and the reference are built from: dropouts as the recipe says, weights by seed or file."""

import torch

from cca_ds.checkpoints.load_model import starting_weights
from cca_ds.config.recipes import load_recipe
from cca_ds.models.from_recipe import build_module
from cca_ds.reference.replica import reference_model
from cca_ds.training.run import reference_weights


def test_no_dropout_means_none_of_any_kind():
    codes_BL, labels_B = torch.randint(17, (4, 64)), torch.arange(4)
    rates = ["model.overrides={token_dropout: 0.5, resid_dropout: 0.5, ffn_dropout: 0.5, drop_path: 0.5}"]
    for dropout, equal in (("false", True), ("true", False)):
        run = load_recipe("digits", [*rates, f"model.dropout={dropout}"])
        module = build_module(run.model).train()
        torch.nn.init.normal_(module.output.weight)
        assert torch.equal(module(codes_BL, labels_B), module(codes_BL, labels_B)) is equal


def test_the_reference_has_dropout_only_where_asked():
    run = load_recipe("digits", ["model.dropout=true", "model.lambda_conditioning=true"])
    model = reference_model(run.model, run.reference.dropout)
    assert not model.dropout and not model.lambda_conditioning
    asked = load_recipe("digits", ["model.dropout=true", "reference.dropout=true"])
    assert reference_model(asked.model, asked.reference.dropout).dropout


def test_fresh_weights_follow_the_seed():
    first, again, other = (
        starting_weights(load_recipe("digits").model, None, seed)["tok_embeddings.weight"] for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_conditioned_model_starts_as_its_base():
    run = load_recipe("digits", ["model.lambda_conditioning=true"])
    weights = starting_weights(run.model, run.model.weights, run.seed)
    base = starting_weights(load_recipe("digits").model, run.model.weights, run.seed)
    assert set(base) < set(weights)
    assert all(torch.equal(weights[name], base[name]) for name in base)
    assert reference_weights(run, None, weights).keys() == base.keys()


def test_the_reference_is_the_policys_start_unless_other_weights_are_named(tmp_path):
    run = load_recipe("digits", ["model.weights=null", "model.lambda_conditioning=true"])
    weights = starting_weights(run.model, None, run.seed)
    own = reference_weights(run, None, weights)
    assert all(own[name] is weights[name] for name in own) and set(own) < set(weights)
    assert all(torch.equal(tensor, own[name]) for name, tensor in reference_weights(run, None, None).items())
    other = load_recipe("digits", ["model.weights=null", "reference.weights=asset:digits_base.safetensors"])
    found = reference_weights(other, None, weights)
    assert not torch.equal(found["output.weight"], weights["output.weight"])
