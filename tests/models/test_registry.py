"""The families' records: presets and their names, and what the rest of the package asks of them."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from cca_ds.config.recipes import recipe_names
from cca_ds.models import FAMILIES, create_model, family_of, family_of_model, model_config, preset_name, state_hash
from cca_ds.models.registry import preset_problem, presets
from cca_ds.vq import TOKENIZERS


@pytest.mark.parametrize(
    ("name", "preset"),
    [("GPT-3B", "llamagen-3b"), ("c2i_3B", "llamagen-3b"), (" LlamaGen_XL", "llamagen-xl"), ("d30", "var-d30"),
     ("VAR_d30", "var-d30"), ("digits", "digits")],
)  # fmt: skip
def test_the_originals_names_are_presets(name, preset):
    assert preset_name(name) == preset and preset_problem(name) is None
    assert preset in family_of(name).presets


def test_an_unknown_name_gets_the_nearest():
    assert preset_problem("var-d31") == "model.preset=var-d31: no such model; did you mean var-d36?"
    assert preset_problem("quux").startswith("model.preset=quux: no such model; choose one of llamagen-b, ")
    with pytest.raises(ValueError, match="did you mean llamagen-xxl"):
        family_of("gpt-xxxl")


@pytest.mark.parametrize("preset", presets())
def test_a_record_fits_its_models(preset):
    family, config = family_of(preset), model_config(preset)
    with torch.device("meta"):
        short = create_model(config, **family.shortened(config, 2))
    assert isinstance(config, family.config)
    blocks = getattr(short, family.blocks)
    assert isinstance(blocks, nn.ModuleList) and len(blocks) == short.config.n_layer == 2
    assert (short.config.dim, short.config.n_head) == (config.dim, config.n_head)
    assert family_of_model(short) is family
    assert short.state_dict()[family.class_embedding].shape[0] == config.num_classes + 1
    assert family.weights.marker in short.state_dict()
    assert 1 <= family.guidance_steps(config) <= config.sequence_length


def test_a_shortened_models_block_is_the_whole_models():
    for preset in ("digits", "var-d16"):
        family, config = family_of(preset), model_config(preset)
        with torch.device("meta"):
            whole, short = create_model(config), create_model(config, **family.shortened(config, 1))
        own, its = (getattr(module, family.blocks)[0].state_dict() for module in (whole, short))
        assert {name: value.shape for name, value in own.items()} == {n: v.shape for n, v in its.items()}


def test_only_var_needs_its_tokenizer_to_run():
    assert [family.name for family in FAMILIES.values() if family.needs_tokenizer] == ["var"]
    assert {spec.family for spec in TOKENIZERS.values()} <= set(FAMILIES)


def test_state_hash_is_of_names_shapes_and_float32_values():
    """The digest of today's reference caches and sampling.json files."""
    state = {"b": torch.tensor([1.0, 2.0]), "a": torch.arange(6.0).view(2, 3)}
    digest = "a55f7d8ccbc95e3ffbd9901647e2e1e5cde3e969b90db443a9a47aceda81073c"
    assert state_hash(state) == state_hash({name: tensor.half() for name, tensor in state.items()}) == digest
    assert state_hash(state | {"a": state["a"].view(3, 2)}) != digest
    assert state_hash({"a": state["a"], "c": state["b"]}) != digest


def test_the_page_of_published_weights_has_every_file_with_a_recipe_that_is_there():
    """Rows `| file | pixels | ... | recipe |` of docs/weights.md, against the families' patterns of published files."""
    page = (Path(__file__).parents[2] / "docs" / "weights.md").read_text()
    rows = dict(re.findall(r"^\| `((?:c2i|var)_\w+\.pth?)` \| \d+ \|.* `([\w-]+)` \|$", page, re.M))
    assert len(rows) == 12
    for file, recipe in rows.items():
        family = family_of(re.sub(r"-256$", "", recipe))
        assert re.fullmatch(family.hub_files, file) and f"huggingface.co/{family.hub}>" in page, file
        assert recipe in recipe_names()
    depths = {f"var_d{depth}.pth" for depth in (16, 20, 24, 30, 36)}
    assert {file for file in rows if file.startswith("var")} == depths


def test_the_page_of_published_weights_counts_the_parameters_of_its_recipes_models():
    page = (Path(__file__).parents[2] / "docs" / "weights.md").read_text()
    rows = re.findall(r"^\| `\w+\.pth?` \| \d+ \| ([\d.]+ [MB]) \| ([\d.]+) \|.* `([\w-]+)` \|$", page, re.M)
    assert len(rows) == 12
    for parameters, gigabytes, recipe in rows:
        with torch.device("meta"):
            model = create_model(re.sub(r"-256$", "", recipe))
        count = sum(parameter.numel() for parameter in model.parameters())
        assert parameters == (f"{count / 1e9:.1f} B" if count > 1e9 else f"{count / 1e6:.0f} M"), recipe
        assert gigabytes == f"{4 * count / 1e9:.1f}", recipe
