"""Families of models, and models by the name of a preset or by a config."""

import difflib
from dataclasses import fields, replace
from typing import Any, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError
from torch import nn

from cca_ds.config.original_names import canonical_model
from cca_ds.config.variants import Registry
from cca_ds.models.base import CodeModel, Family

FAMILIES: Registry[Family] = Registry("family")
LARGEST = 2**20  # of any number in a config


def presets() -> list[str]:
    """Names of all families' presets."""
    return [preset for family in FAMILIES.values() for preset in family.presets]


def preset_name(name: str) -> str:
    """The preset of a name: "GPT-3B", "c2i_3B" and "llamagen-3b" are one, and so are "d30" and "VAR_d30".

    Raises ValueError for an unknown name, with the nearest preset.
    """
    if problem := preset_problem(name):
        raise ValueError(problem)
    return canonical_model(name)


def preset_problem(name: str) -> str | None:
    """What is wrong with a preset's name, in one line with the nearest preset; None for a known name."""
    plain, known = canonical_model(name), presets()
    if plain in known:
        return None
    nearest = difflib.get_close_matches(plain, known, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]}?" if nearest else f"choose one of {', '.join(known)}"
    return f"model.preset={name}: no such model; {hint}"


def family_of(preset: str) -> Family:
    """The family that has a preset, under any of its names. Raises ValueError for an unknown one."""
    name = preset_name(preset)
    return next(family for family in FAMILIES.values() if name in family.presets)


def family_of_model(module: nn.Module) -> Family:
    """The family of a model that `create_model` built."""
    return FAMILIES[module.family]


def model_config(preset: str, **overrides: Any) -> Any:
    """The config of a preset (a `LlamaGenConfig` or `VARConfig`), with some fields replaced. Raises ValueError."""
    family = family_of(preset)
    shape = family.presets[preset_name(preset)]
    return family.config(**_checked(family.config, {**shape, **overrides}))


def _checked(config_class: type, overrides: dict[str, Any]) -> dict[str, Any]:
    """Overrides as the config's fields have them: whole numbers, tuples. Raises ValueError for what is none."""
    kinds = get_type_hints(config_class)
    known = [field.name for field in fields(config_class)]
    found = {}
    for key, value in overrides.items():
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"it has {', '.join(known)}"
            raise ValueError(f"{config_class.__name__} has no {key!r}: {hint}")
        found[key] = _checked_value(config_class, key, kinds[key], value)
    return found


def _checked_value(config_class: type, key: str, kind: Any, value: Any) -> Any:
    given = str(value)[:80]
    words = any(isinstance(value, odd) and odd not in (kind, *get_args(kind)) for odd in (bool, str))
    try:
        converted = None if words else TypeAdapter(kind).validate_python(value)
    except ValidationError:
        words = True
    if words:
        name = getattr(kind, "__name__", str(kind)) if not get_args(kind) else str(kind)
        raise ValueError(f"{config_class.__name__}: {key}={given} is no {name}")
    for number in converted if isinstance(converted, tuple) else (converted,):
        if isinstance(number, int | float) and not abs(number) <= LARGEST:  # NaN too
            raise ValueError(f"{config_class.__name__}: {key}={given} is not finite, or more than {LARGEST:,}")
    return converted


def create_model(preset_or_config: Any, tokenizer: nn.Module | None = None, **overrides: Any) -> CodeModel:
    """A model with random weights, from a preset's name or a config, with some of the config's fields replaced.

    Args:
        preset_or_config: such as "llamagen-b", or an instance of a family's config.
        tokenizer: for a family whose models hold a tokenizer's codebook frozen (VAR); others ignore it.
        overrides: fields of the config.

    Raises:
        ValueError: an unknown preset or field, or an impossible shape.
    """
    if isinstance(preset_or_config, str):
        config = model_config(preset_or_config, **overrides)
    else:
        config = replace(preset_or_config, **_checked(type(preset_or_config), overrides))
    family = next(family for family in FAMILIES.values() if isinstance(config, family.config))
    return family.build(config, tokenizer)
