"""The recorded tokenizers of 32 channels: the options that build them, and their weights."""

from pathlib import Path

from torch import nn

from cca_ds.vq import create_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"
VQ16_WEIGHTS, VQ16_OPTIONS = (
    GOLDEN / "vq16_ch32.pt",
    {"channels": 32, "channel_multipliers": [1, 1, 1, 1, 2], "z_channels": 32, "codebook_size": 64},
)
VQVAE_WEIGHTS, VQVAE_OPTIONS = (
    GOLDEN / "var_vae_ch32.pth",
    {"channels": 32, "channel_multipliers": [1, 1, 1, 1, 2], "codebook_size": 64, "scales": [1, 2, 3, 4]},
)


def vq16() -> nn.Module:
    """LlamaGen's tokenizer."""
    return create_tokenizer("llamagen-vq16", weights=VQ16_WEIGHTS, **VQ16_OPTIONS)


def vqvae() -> nn.Module:
    """VAR's tokenizer."""
    return create_tokenizer("var-vqvae", weights=VQVAE_WEIGHTS, **VQVAE_OPTIONS)
