"""The nine published models and the digits' by name, and the names under which their users know them."""

import difflib
import re
from dataclasses import fields, replace
from typing import Any

from torch import nn

from cca_ds.config.model_shapes import LLAMAGEN_SHAPES, VAR_SHAPES
from cca_ds.models.llamagen.model import LlamaGen, LlamaGenConfig

# name -> (family, what differs from the family's defaults)
PRESETS: dict[str, tuple[str, dict[str, int]]] = {
    **{name: ("llamagen", shape) for name, shape in LLAMAGEN_SHAPES.items()},
    **{name: ("var", shape) for name, shape in VAR_SHAPES.items()},
}


def preset_name(name: str) -> str:
    """The preset that a name means: "GPT-3B", "c2i_3B" and "llamagen-3b" are one, and so are "d30" and
    "VAR_d30".

    Raises ValueError for a name that is none, with the nearest one.
    """
    plain = re.sub(r"[_\s]+", "-", name.strip().lower())
    candidates = (plain, re.sub(r"^(gpt|c2i)-", "llamagen-", plain), f"var-{plain}")
    for candidate in candidates:
        if candidate in PRESETS:
            return candidate
    nearest = difflib.get_close_matches(plain, PRESETS, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]}?" if nearest else f"choose one of {', '.join(PRESETS)}"
    raise ValueError(f"model {name!r} is unknown: {hint}")


def model_config(preset: str, **overrides: Any) -> Any:
    """The `LlamaGenConfig` or `VARConfig` of a preset, with some fields replaced. Raises ValueError."""
    family, shape = PRESETS[preset_name(preset)]
    if family == "llamagen":
        config_class: Any = LlamaGenConfig
    else:
        from cca_ds.models.var.model import VARConfig as config_class
    return config_class(**_checked(config_class, {**shape, **overrides}))


def _checked(config_class: type, overrides: dict[str, Any]) -> dict[str, Any]:
    known = [field.name for field in fields(config_class)]
    for key in overrides:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"it has {', '.join(known)}"
            raise ValueError(f"{config_class.__name__} has no {key!r}: {hint}")
    return overrides


def create_model(preset_or_config: Any, tokenizer: nn.Module | None = None, **overrides: Any) -> nn.Module:
    """A model with random weights, from a preset's name or a config, with some of the config's fields
    replaced.

    A VAR takes `tokenizer=`, whose codebook it holds frozen; a LlamaGen needs none. Raises ValueError for an
    unknown name or field and for a shape that cannot be.
    """
    if isinstance(preset_or_config, str):
        config = model_config(preset_or_config, **overrides)
    else:
        config = replace(preset_or_config, **_checked(type(preset_or_config), overrides))
    if isinstance(config, LlamaGenConfig):
        return LlamaGen(config)
    from cca_ds.models.var.model import VAR

    return VAR(config, tokenizer=tokenizer)
