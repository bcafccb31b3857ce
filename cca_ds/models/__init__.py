"""The families of autoregressive image models, by name, with weights in and out."""

from cca_ds.models.base import CodeModel, Family
from cca_ds.models.llamagen import LlamaGenConfig
from cca_ds.models.registry import FAMILIES, create_model, family_of, family_of_model, model_config, preset_name
from cca_ds.models.var import VARConfig
from cca_ds.models.weight_files import WeightsError, read_weights, state_hash
from cca_ds.models.weights import (
    DTYPES,
    check_weights,
    expected_shapes,
    fix_lambda,
    load_weights,
    save_weights,
    with_own_classes,
)

__all__ = [
    "DTYPES",
    "FAMILIES",
    "CodeModel",
    "Family",
    "LlamaGenConfig",
    "VARConfig",
    "WeightsError",
    "check_weights",
    "create_model",
    "expected_shapes",
    "family_of",
    "family_of_model",
    "fix_lambda",
    "load_weights",
    "model_config",
    "preset_name",
    "read_weights",
    "save_weights",
    "state_hash",
    "with_own_classes",
]
