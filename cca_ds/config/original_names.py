"""What users of the original programs (LlamaGen, VAR, CCA) type, and what it is called here."""

from __future__ import annotations

import re

# flag of an original program -> key of a recipe
KEYS = {
    "lambda_": "loss.lambda",
    "beta": "loss.beta",
    "loss_type": "loss.name",
    "uncond_ratio": "loss.condition_mask_probability",
    "ref_ckpt": "model.weights",
    "num_classes": "model.overrides.num_classes",
    "code_path": "data.codes",
    "data_path": "data.source",
    "keep_dropout": "model.dropout",
    "lr": "optimizer.learning_rate",
    "tblr": "optimizer.learning_rate",
    "global_batch_size": "batch.global_size",
    "bs": "batch.global_size",
    "epochs": "batch.epochs",
    "ep": "batch.epochs",
    "max_grad_norm": "optimizer.grad_clip",
    "global_seed": "seed",
}


def canonical_model(name: str) -> str:
    """A model's name as the presets and recipes spell it: "GPT-3B" and "c2i_3B" are "llamagen-3b", "d30" is "var-d30".

    Any other name comes back in lower case with hyphens; whether it is known is the caller's question.
    """
    plain = re.sub(r"[_\s]+", "-", name.strip().lower())
    plain = re.sub(r"^(gpt|c2i)-", "llamagen-", plain)
    return f"var-{plain}" if re.fullmatch(r"d\d+", plain) else plain
