"""Where a model's weights come from: a file, a run's folder, with the file's classes or its own."""

import pytest
import torch

from cca_ds.checkpoints.errors import CheckpointError
from cca_ds.checkpoints.load_model import starting_weights, weights_hash
from cca_ds.checkpoints.run_weights import run_weights
from cca_ds.config.recipes import ConfigError, load_recipe, resolve_path
from cca_ds.models import WeightsError, read_weights
from cca_ds.training.checks import recipe_problems, require_base
from cca_ds.training.run import reference_weights
from tests.support.golden_tokenizers import GOLDEN
from tests.support.trained_run import trained_run

VAR = ["model.overrides={depth: 2, num_classes: 3, vocab_size: 64, scales: [1, 2, 3, 4]}", "tokenizer.name=var-vqvae"]
CASES = {
    "llamagen": ("digits", [], "asset:digits_base.safetensors", "cls_embedding.embedding_table.weight"),
    "var": ("var-d16", VAR, str(GOLDEN / "var_depth2.pth"), "class_emb.weight"),
}


def recipe(family, *more):
    name, settings, weights, classes = CASES[family]
    run = load_recipe(name, [*settings, f"model.weights={weights}", "model.reset_classes=true", *more])
    run.model.overrides["num_classes"] = 3
    return run, weights, classes


@pytest.mark.parametrize("family", CASES)
def test_classes_drawn_anew_on_a_published_backbone(family):
    run, weights, classes = recipe(family)
    found = starting_weights(run.model, weights, seed=1)
    published = read_weights(resolve_path(weights))
    assert found[classes].shape[0] == 4 and published[classes].shape[0] != 4
    assert torch.equal(found[classes][-1], published[classes][-1].float())  # the null class
    assert found[classes][:-1].std() > 0.005 and len(found[classes].unique(dim=0)) == 4  # drawn, each row its own
    for name, value in found.items():
        if name != classes and name in published:
            assert torch.equal(value, published[name].float()), name
    again, other = (starting_weights(run.model, weights, seed=seed)[classes] for seed in (1, 2))
    assert torch.equal(again, found[classes]) and not torch.equal(other[:-1], found[classes][:-1])


@pytest.mark.parametrize("family", CASES)
def test_the_reference_starts_as_the_policy(family):
    """Whether it is built from the policy's start or, as for a cache, from the file again."""
    run, weights, classes = recipe(family)
    policy = starting_weights(run.model, weights, run.seed)
    for given in (policy, None):
        assert torch.equal(reference_weights(run, None, given)[classes], policy[classes])


def test_without_the_switch_another_number_of_classes_does_not_fit():
    run, weights, _ = recipe("llamagen")
    run.model.reset_classes = False
    with pytest.raises(WeightsError, match=r"3 classes|mis-shaped"):
        starting_weights(run.model, weights, seed=1)


def test_a_run_is_a_source_of_weights():
    folder = trained_run()
    run = load_recipe("digits", [f"model.weights={folder}"])
    found, expected = starting_weights(run.model, run.model.weights, 0), run_weights(folder).state
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert weights_hash(folder) == weights_hash(folder) != weights_hash(folder / "config.yaml")


def test_published_figures_go_with_the_published_model(tmp_path):
    assert load_recipe("llamagen-3b").paper and load_recipe("llamagen-3b").baseline.nll_band
    (tmp_path / "base").mkdir()
    for settings in (
        ["model.overrides={num_classes: 5}"],
        ["model.weights=x.pt", "model.reset_classes=true"],
        [f"model.weights={tmp_path / 'base'}"],
        ["model.weights=mine.safetensors"],
    ):
        run = load_recipe("llamagen-3b", settings)
        assert not run.paper and run.baseline.nll_band is None, settings
    for name in ("c2i_3B_384.pt", "weights/c2i_3B_384_CCA_0005000.pt", "LlamaGen3B_GF.pt", "var_d30-ddo.pth"):
        assert load_recipe("llamagen-3b", [f"model.weights={name}"]).paper, name
    assert load_recipe("digits").baseline.nll_band  # its own weights


def test_what_is_no_source(tmp_path):
    run = load_recipe("digits")
    with pytest.raises(CheckpointError, match=r"a folder without config\.yaml; name a weights file, or a run's folder"):
        starting_weights(run.model, str(tmp_path), 0)
    (tmp_path / "config.yaml").write_text("name: x\n")
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        weights_hash(tmp_path)


def test_a_contrastive_loss_needs_a_base():
    for name in ("cca", "dpo", "unlearning"):
        with pytest.raises(ValueError, match=f"loss.name={name} needs a pretrained model: set model.weights=FILE"):
            require_base(load_recipe("llamagen-b", [f"loss.name={name}"]))
    drawn = ["model.weights=x", "model.reset_classes=true"]
    with pytest.raises(ValueError, match=r"reset_classes=true draws them at random: train with loss.name=mle first"):
        require_base(load_recipe("llamagen-b", drawn))
    for settings in (
        ["loss.name=mle"], ["model.weights=x"], ["model.from_scratch=true"], [*drawn, "loss.name=mle"],
        [*drawn, "model.from_scratch=true"],
    ):  # fmt: skip
        require_base(load_recipe("llamagen-b", settings))
    with pytest.raises(ConfigError, match=r"model\.reset_classes=true needs model\.weights"):
        load_recipe("llamagen-b", ["model.reset_classes=true"], recipe_problems)
