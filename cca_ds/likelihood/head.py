"""The output head: logits for sampling, log-likelihoods for training.

Letters: B sequences, L codes a sequence, V vocabulary, D width.
"""

from torch import Tensor, nn

from cca_ds.likelihood.sequence_logp import linear_sequence_logp
from cca_ds.ops.linear import linear


class LikelihoodHead(nn.Linear):
    """A `nn.Linear` from width to vocabulary that also computes log p without returning logits.

    It is a module of its own so that ZeRO-3's hooks gather its weight around its forward, and again in its backward.
    """

    accumulate = "fp32"
    chunk_rows: int | None = None

    def forward(self, hidden_BLD: Tensor, targets_BL: Tensor | None = None, *mixed: Tensor) -> Tensor:
        """Logits [B, L, V] in the weight's dtype; given targets [B, L], log p [B] in float32 instead.

        `mixed`: (other [B, L, D], share [B]) for the mixed log-likelihood of `linear_sequence_logp`.
        """
        if targets_BL is None:
            return linear(hidden_BLD, self.weight, self.bias)
        return linear_sequence_logp(
            hidden_BLD, self.weight, targets_BL, self.bias, mixed or None,
            accumulate=self.accumulate, chunk_rows=self.chunk_rows,
        )  # fmt: skip
