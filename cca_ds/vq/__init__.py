"""Image tokenizers, frozen: images <-> codes."""

from cca_ds.vq import digits, llamagen_vq, var_vqvae  # noqa: F401 (each registers its tokenizer)
from cca_ds.vq.tokenizer import TOKENIZERS, TokenizerSpec, builtin_images, create_tokenizer

__all__ = ["TOKENIZERS", "TokenizerSpec", "builtin_images", "create_tokenizer"]
