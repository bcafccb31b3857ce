"""What both families of models of codes are to those who use them.

Legend: B images, L codes per image, V vocabulary, D width.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class CodeModel(nn.Module, ABC):
    """`model(codes_BL, labels_B)` gives the log-likelihoods [B] float32; `logits` the distributions behind
    them.

    A family gives `embed_class`, `hidden` and `read_out`, and a `lambda_embedding` where its config has
    `lambda_conditioning`.
    """

    family: str

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False

    @abstractmethod
    def embed_class(self, labels_B: Tensor) -> Tensor:
        """The labels' embeddings, [B] -> [B, D]."""

    @abstractmethod
    def hidden(self, codes_BL: Tensor, labels_B: Tensor, log_lambda_B: Tensor | None = None) -> Tensor:
        """The output layer's input, [B, L, D]; arguments as in `forward`."""

    @abstractmethod
    def read_out(self, hidden_BLD: Tensor, codes_BL: Tensor | None = None) -> Tensor:
        """The output layer: logits [B, L, V], or with codes their log-likelihoods [B]."""

    @property
    def num_classes(self) -> int:
        """Real classes; labels are 0 to num_classes - 1."""
        return self.config.num_classes

    @property
    def null_class(self) -> int:
        """The label of no condition."""
        return self.config.num_classes

    @property
    def sequence_length(self) -> int:
        """Codes per image (over all scales), L."""
        return self.config.sequence_length

    @property
    def vocab_size(self) -> int:
        """Number of codes, V."""
        return self.config.vocab_size

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Keep only what passes between blocks while training; the backward computes each block again."""
        self.activation_checkpointing = enabled

    def condition(self, labels_B: Tensor, log_lambda_B: Tensor | None = None) -> Tensor:
        """The class embedding [B, D], plus that of log lambda in a model conditioned on it."""
        class_BD = self.embed_class(labels_B)
        if not self.config.lambda_conditioning:
            if log_lambda_B is not None:
                raise ValueError("log_lambda given to a model without lambda conditioning: leave it out")
            return class_BD
        if log_lambda_B is None:
            raise ValueError("this model is conditioned on lambda: log_lambda must be given")
        return class_BD + self.lambda_embedding(log_lambda_B)

    def run_blocks(self, blocks: Iterable[nn.Module], x_BLD: Tensor, shared: Tensor) -> Tensor:
        """`block(x_BLD, shared)` of one block after another, [B, L, D] -> [B, L, D]."""
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        for block in blocks:
            if recompute:
                # no determinism check: under ZeRO-3 a weight's shape is its shard's outside its module
                x_BLD = checkpoint(block, x_BLD, shared, use_reentrant=False, determinism_check="none")
            else:
                x_BLD = block(x_BLD, shared)
        return x_BLD

    def logits(self, codes_BL: Tensor, labels_B: Tensor, log_lambda_B: Tensor | None = None) -> Tensor:
        """Logits [B, L, V] in the weights' dtype; arguments as in `forward`."""
        return self.read_out(self.hidden(codes_BL, labels_B, log_lambda_B))

    def forward(self, codes_BL: Tensor, labels_B: Tensor, log_lambda_B: Tensor | None = None) -> Tensor:
        """log p(codes | label) in nats, [B] float32.

        `codes_BL` of any integer dtype, in [0, V), of several scales one after another; `labels_B` int64 in
        [0, num_classes], the last being the null class; `log_lambda_B` natural logarithms of lambda for a
        model conditioned on it, and only for one.
        """
        codes_BL = codes_BL.long()
        return self.read_out(self.hidden(codes_BL, labels_B, log_lambda_B), codes_BL)
