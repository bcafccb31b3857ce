"""Image tokenizers, frozen: images <-> codes."""

import hashlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from cca_ds.config.registry import Registry


@dataclass(frozen=True)
class TokenizerSpec:
    """What the other stages ask of a tokenizer instead of comparing its name."""

    name: str
    build: Callable[..., nn.Module]
    needs_weights: bool
    family: str
    image_mode: str = "RGB"
    builtin_codes: Callable[[Path], Path] | None = None
    imports_npy: bool = False


def _build(module: str, name: str) -> Callable[..., nn.Module]:
    return lambda **options: getattr(importlib.import_module(f"cca_ds.vq.{module}"), name)(**options)


TOKENIZERS: Registry[TokenizerSpec] = Registry("tokenizer.name")
TOKENIZERS.register(TokenizerSpec("digits", _build("digits", "DigitsTokenizer"), False, "llamagen", "L"))
TOKENIZERS.register(
    TokenizerSpec("llamagen-vq16", _build("llamagen_vq", "LlamaGenVQ"), True, "llamagen", imports_npy=True)
)
TOKENIZERS.register(TokenizerSpec("var-vqvae", _build("var_vqvae", "VARTokenizer"), True, "var"))


def create_tokenizer(name: str, weights: str | Path | None = None, **shape) -> nn.Module:
    """A frozen tokenizer in eval mode: "digits", "llamagen-vq16" or "var-vqvae".

    `weights` is a published file; without it the weights are random. `shape` overrides the published shape:
    channels, channel_multipliers, z_channels, codebook_size, and scales for VAR's. All have
    `encode(images_BCHW in [-1, 1]) -> codes_BL int64`, `decode(codes_BL) -> images_BCHW in [-1, 1]`,
    `vocab_size`, `sequence_length(image_size)` and `hash()`. Raises ValueError for an unknown name and
    WeightsError for a file that does not fit.
    """
    if name not in TOKENIZERS:
        raise ValueError(f"tokenizer {name!r} is unknown: choose one of {', '.join(TOKENIZERS)}")
    if name == "digits":
        from cca_ds.vq.digits import DigitsTokenizer

        if weights is not None or shape:
            given = ", ".join([*(["weights"] if weights is not None else []), *shape])
            raise ValueError(f"the digits tokenizer has neither weights nor shapes to set: leave out {given}")
        tokenizer: nn.Module = DigitsTokenizer()
    elif name == "llamagen-vq16":
        from cca_ds.vq.llamagen_vq import LlamaGenVQ

        tokenizer = LlamaGenVQ(**shape)
    else:
        from cca_ds.vq.var_vqvae import VARTokenizer

        tokenizer = VARTokenizer(**shape)
    if weights is not None:
        from cca_ds.models.weights import load_weights

        load_weights(tokenizer, weights)
        tokenizer.hash()  # kept by the module from here on, so that a later cast to bf16 does not change it
    return tokenizer.eval().requires_grad_(False)


def weights_hash(module: nn.Module) -> str:
    """SHA-256 in hexadecimal over the names, shapes and float32 values of a module's parameters, in name
    order.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters()):
        digest.update(f"{name}{list(parameter.shape)}".encode())
        digest.update(parameter.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()
