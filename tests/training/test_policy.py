"""The module that the policy and the reference are built from: dropouts as the recipe says, weights by seed or file."""

import torch

from cca_ds.config.recipes import load_recipe
from cca_ds.models.from_recipe import build_module, starting_weights
from cca_ds.reference.replica import reference_recipe


def test_no_dropout_means_none_of_any_kind():
    codes_BL, labels_B = torch.randint(17, (4, 64)), torch.arange(4)
    rates = ["model.overrides={token_dropout: 0.5, resid_dropout: 0.5, ffn_dropout: 0.5, drop_path: 0.5}"]
    for dropout, equal in (("false", True), ("true", False)):
        run = load_recipe("digits", [*rates, f"model.dropout={dropout}"])
        module = build_module(run).train()
        torch.nn.init.normal_(module.output.weight)
        assert torch.equal(module(codes_BL, labels_B), module(codes_BL, labels_B)) is equal


def test_the_reference_has_dropout_only_where_asked():
    run = load_recipe("digits", ["model.dropout=true", "model.lambda_conditioning=true"])
    assert not reference_recipe(run).model.dropout and not reference_recipe(run).model.lambda_conditioning
    asked = load_recipe("digits", ["model.dropout=true", "reference.dropout=true"])
    assert reference_recipe(asked).model.dropout


def test_fresh_weights_follow_the_seed():
    first, again, other = (
        starting_weights(load_recipe("digits", [f"seed={seed}"]), None)["tok_embeddings.weight"]
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_conditioned_model_starts_as_its_base():
    run = load_recipe("digits", ["model.lambda_conditioning=true"])
    weights = starting_weights(run, run.model.weights)
    base = starting_weights(load_recipe("digits"), run.model.weights)
    assert set(base) < set(weights)
    assert all(torch.equal(weights[name], base[name]) for name in base)
