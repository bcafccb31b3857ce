"""The two families of autoregressive image models, by name, with weights in and out."""

from cca_ds.models.llamagen.model import LlamaGenConfig
from cca_ds.models.registry import PRESETS, create_model, model_config, preset_name
from cca_ds.models.var.model import VARConfig
from cca_ds.models.weight_files import WeightsError, read_weights
from cca_ds.models.weights import (
    DTYPES,
    check_weights,
    expected_shapes,
    fix_lambda,
    load_weights,
    save_weights,
)

__all__ = [
    "DTYPES",
    "PRESETS",
    "LlamaGenConfig",
    "VARConfig",
    "WeightsError",
    "check_weights",
    "create_model",
    "expected_shapes",
    "fix_lambda",
    "load_weights",
    "model_config",
    "preset_name",
    "read_weights",
    "save_weights",
]
