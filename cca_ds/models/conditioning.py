"""A number of each image that a model may be conditioned on besides the label: log lambda, or GFT's beta."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from cca_ds.models.layers import GFTBetaEmbedding, LambdaEmbedding


@dataclass(frozen=True)
class Conditioning:
    """One kind of conditioning.

    Attributes:
        argument: of `model(...)` and `generate(...)`, the number itself.
        switch: the field of a family's config, and of a recipe's `model` section, that switches it on.
        module: the model's attribute that embeds the number.
        embedding: width -> that module, zero until it is trained.
        title: in messages.
    """

    argument: str
    switch: str
    module: str
    embedding: Callable[[int], nn.Module]
    title: str

    @property
    def prefix(self) -> str:
        """Begins the names of the embedding's tensors, in weights files too."""
        return f"{self.module}."


LAMBDA = Conditioning("log_lambda", "lambda_conditioning", "lambda_embedding", LambdaEmbedding, "lambda")
GFT_BETA = Conditioning("gft_beta", "gft_conditioning", "t_embedder", GFTBetaEmbedding, "GFT's beta")
CONDITIONINGS = (LAMBDA, GFT_BETA)


def conditioning_of(settings: object) -> Conditioning | None:
    """The kind that a family's config or a recipe's `model` section switches on; None for a plain model.

    Raises:
        ValueError: more than one is on.
    """
    found = [kind for kind in CONDITIONINGS if getattr(settings, kind.switch, False)]
    if len(found) > 1:
        raise ValueError(f"{' and '.join(f'{kind.switch}=true' for kind in found)} exclude each other: leave one out")
    return found[0] if found else None
