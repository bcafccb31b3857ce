"""What the tokenizers share: the hash of their weights, and the check of the codes that they are given.

Letters: B images, L codes per image, V codes.
"""

from torch import Tensor, nn

from cca_ds.vq import weights_hash


class LearnedTokenizer(nn.Module):
    """Has weights, whose hash says which tokenizer made a table of codes."""

    _hash: str | None = None

    def hash(self) -> str:
        """SHA-256 of the weights, in hexadecimal; kept once the weights are frozen, so that no cast changes it."""
        if self._hash is None or any(parameter.requires_grad for parameter in self.parameters()):
            self._hash = weights_hash(self)
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
