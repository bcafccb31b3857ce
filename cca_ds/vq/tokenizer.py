"""Tokenizers by name (`TOKENIZERS`), the hash of their weights, and the check of the codes that they decode.

Letters: B images, L codes per image, V codes.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cca_ds.config.variants import Registry
from cca_ds.models.weight_files import WeightsKind, state_hash
from cca_ds.models.weights import load_weights


@dataclass(frozen=True)
class TokenizerSpec:
    """A tokenizer. Everything outside `vq/` asks this record and never compares the name.

    Attributes:
        name: in recipes and tables of codes.
        build: (**options) -> the module with random weights; its parameters are the options that recipes can set.
        needs_weights: whether it is of use only with a file of weights.
        family: name of the family of models that its codes are for, written into tables of codes.
        image_mode: PIL's name of the images that it takes: "L" or "RGB".
        builtin_codes: (folder) -> the folder of its table of codes, written into `folder` at the first call, from
            images that need no source; None: it has none.
        builtin_images: images of that table.
        imports_npy: whether the original program stores its codes as the .npy files that `encode --import_npy` reads.
        weights: how to recognise its weights files; None: they are not recognised.
    """

    name: str
    build: Callable[..., nn.Module]
    needs_weights: bool
    family: str
    image_mode: str = "RGB"
    builtin_codes: Callable[[Path], Path] | None = None
    builtin_images: int | None = None
    imports_npy: bool = False
    weights: WeightsKind | None = None

    def options(self) -> list[str]:
        """Names of the options that `build` takes."""
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        return [name for name, option in inspect.signature(self.build).parameters.items() if option.kind in named]


TOKENIZERS: Registry[TokenizerSpec] = Registry("tokenizer.name")


def builtin_images(codes: str) -> int | None:
    """Images of the built-in table that `data.codes` names; None where it names a folder."""
    return TOKENIZERS[codes].builtin_images if codes in TOKENIZERS else None


def create_tokenizer(name: str, weights: str | Path | None = None, **shape: Any) -> nn.Module:
    """A frozen tokenizer in eval mode: "digits", "llamagen-vq16" or "var-vqvae".

    All have `encode(images_BCHW in [-1, 1]) -> codes_BL int64`, `decode(codes_BL) -> images_BCHW in [-1, 1]`,
    `vocab_size`, `sequence_length(image_size)` and `hash()`.

    Args:
        weights: a published file; without it the weights are random.
        shape: overrides of the published shape: channels, channel_multipliers, z_channels, codebook_size, and scales
            for VAR's.

    Raises:
        ValueError: an unknown name or option; WeightsError: a file that does not fit.
    """
    spec = TOKENIZERS[name]
    _check_options(spec, weights, shape)
    tokenizer = spec.build(**shape)
    if weights is not None:
        load_weights(tokenizer, weights)
        tokenizer.hash()  # kept by the module from here on, so that a later cast to bf16 does not change it
    return tokenizer.eval().requires_grad_(False)


def _check_options(spec: TokenizerSpec, weights: str | Path | None, shape: dict[str, Any]) -> None:
    known = spec.options()
    if not known and not spec.needs_weights and (weights is not None or shape):
        given = ", ".join([*(["weights"] if weights is not None else []), *shape])
        raise ValueError(f"the {spec.name} tokenizer has neither weights nor shapes to set: leave out {given}")
    if weights is not None and not spec.needs_weights:
        raise ValueError(f"the {spec.name} tokenizer has no weights: leave out weights={weights}")
    unknown = [f"{key}={value!r}" for key, value in shape.items() if key not in known]
    if unknown:
        raise ValueError(f"the {spec.name} tokenizer has no {', '.join(unknown)}: its options are {', '.join(known)}")


class LearnedTokenizer(nn.Module):
    """Has weights, whose hash identifies the tokenizer that made a table of codes."""

    _hash: str | None = None

    def hash(self) -> str:
        """SHA-256 of the weights, in hexadecimal; kept once the weights are frozen, so that no cast changes it."""
        if self._hash is None or any(parameter.requires_grad for parameter in self.parameters()):
            self._hash = state_hash(dict(self.named_parameters()))
        return self._hash


def checked_codes(codes_BL: Tensor, vocab_size: int) -> Tensor:
    """The codes [B, L], of any integer dtype, as int64. Raises ValueError where one is not in [0, V)."""
    codes_BL = codes_BL.long()
    if codes_BL.numel():
        least, most = int(codes_BL.min()), int(codes_BL.max())
        if least < 0 or most >= vocab_size:
            worst = most if most >= vocab_size else least
            raise ValueError(f"code {worst} is outside the tokenizer's codebook 0..{vocab_size - 1}")
    return codes_BL
