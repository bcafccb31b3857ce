"""What a model costs: parameters of the published models, and operations against torch's own counter."""

import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cca_ds.models import create_model
from cca_ds.models.cost import cost_of_module, model_cost

PUBLISHED = {
    "llamagen-b": "llamagen/GPT-B",
    "llamagen-l": "llamagen/GPT-L",
    "llamagen-xl": "llamagen/GPT-XL",
    "llamagen-xxl": "llamagen/GPT-XXL",
    "llamagen-3b": "llamagen/GPT-3B",
    "var-d16": "var/d16",
    "var-d20": "var/d20",
    "var-d24": "var/d24",
    "var-d30": "var/d30",
}


@pytest.mark.parametrize(("preset", "recorded"), PUBLISHED.items())
def test_parameters_are_the_published_models(golden, preset, recorded):
    shapes = json.loads((golden / "state_dict_shapes.json").read_text())
    assert model_cost(preset).parameters == shapes[recorded]["params"]


@pytest.mark.parametrize(
    ("preset", "overrides"),
    [
        ("digits", {}),
        ("digits", {"lambda_conditioning": True, "n_layer": 2}),
        ("llamagen-b", {"dim": 96, "n_head": 2, "vocab_size": 50, "num_classes": 7, "sequence_length": 16}),
        ("var-d16", {"depth": 3, "shared_aln": True, "scales": (1, 2, 3), "vocab_size": 50}),
        ("var-d16", {"depth": 2, "lambda_conditioning": True, "num_classes": 7, "width": 96, "heads": 2}),
    ],
)
def test_parameters_follow_the_overrides(preset, overrides):
    with torch.device("meta"):
        model = create_model(preset, **overrides)
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert model_cost(preset, overrides).parameters == counted


LLAMAGEN = {"n_layer": 2, "dim": 64, "n_head": 2, "vocab_size": 48, "sequence_length": 64, "num_classes": 5}
VAR = {"depth": 2, "num_classes": 5, "vocab_size": 48, "scales": (1, 2, 3, 4), "drop_path": 0.0}


class NoPyramid(torch.nn.Module):
    """Stands in for the tokenizer's frozen part, whose convolutions are no work of the model's."""

    def teacher_input(self, codes_BL):
        return torch.zeros(len(codes_BL), 29, 32, dtype=torch.float64)


def counted_flops(module, backward):
    """Operations of one image's forward, and with `backward` of that too, by torch's counter: matmuls and attention.

    In float64, for which every op is plain torch, and with attention as matmuls, since the counter has no entry for the
    CPU's attention kernel.
    """
    module = module.double().eval()
    codes_BL = torch.zeros(1, module.sequence_length, dtype=torch.int64)
    log_lambda_B = [torch.zeros(1, dtype=torch.float64)] if module.config.lambda_conditioning else []
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        logits_BLV = module.logits(codes_BL, torch.zeros(1, dtype=torch.int64), *log_lambda_B)
        if backward:
            logits_BLV.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("conditioned", [False, True])
@pytest.mark.parametrize(("passes", "backward"), [(1, False), (3, True)])
def test_operations_of_llamagen_are_what_torch_counts(passes, backward, conditioned):
    """Exactly; the embedding of lambda adds its biases (0.1%), and its first layer's input needs no gradient (1%)."""
    module = create_model("llamagen-b", **LLAMAGEN, lambda_conditioning=conditioned)
    formula = passes * cost_of_module(module, "small").forward_flops()
    assert counted_flops(module, backward) == pytest.approx(formula, rel=0.01 if conditioned else 1e-9)


@pytest.mark.parametrize("conditioned", [False, True])
@pytest.mark.parametrize(("passes", "backward"), [(1, False), (3, True)])
def test_operations_of_var_are_what_torch_counts(passes, backward, conditioned):
    """Within 1%, attention apart: the formula has it over all pairs of codes, VAR computes about 70% of them, and the
    counter does not see those that the project's own CPU kernel computes.
    """
    module = create_model("var-d16", **VAR, lambda_conditioning=conditioned)
    module.pyramid = NoPyramid()
    formula = cost_of_module(module, "small").forward_flops()
    attention = 4 * module.sequence_length**2 * module.config.dim * module.config.depth
    assert 0.99 * passes * (formula - attention) <= counted_flops(module, backward) <= passes * formula
    assert attention < 0.04 * formula
