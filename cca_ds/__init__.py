"""cca_ds: large-scale fine-tuning of autoregressive image models with Condition Contrastive Alignment on DeepSpeed.

model, tokenizer, recipe = cca_ds.load("runs/digits")
"""

import importlib
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`load`, which imports torch at its first use; see `cca_ds.checkpoints.load_model.load`."""
    if name == "load":
        return importlib.import_module("cca_ds.checkpoints.load_model").load
    raise AttributeError(f"module 'cca_ds' has no attribute {name!r}")
