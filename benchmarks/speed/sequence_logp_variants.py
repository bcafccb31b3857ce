"""The ways to get log p and its gradient that benchmarks/speed/sequence_logp.py compares."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from cca_ds.likelihood import linear_sequence_logp, sequence_logp

WITHOUT_MEMORY = ("matmuls alone", "copy", "forward only")


def eager(logits: Tensor, targets: Tensor) -> Tensor:
    """As in the public CCA program: float32 logits, log-softmax, gather, sum."""
    return F.log_softmax(logits.float(), -1).gather(-1, targets.unsqueeze(-1)).squeeze(-1).sum(-1)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """PyTorch's own loss, per token."""
    flat = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return -flat.view(targets.shape).float().sum(-1)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> Tensor:
    """PyTorch's fused head and loss (2.13 and newer), summed over all tokens."""
    flat = F.linear_cross_entropy(hidden.flatten(0, 1), weight, targets.flatten(), linear_bias=bias, reduction="sum")
    return -flat.reshape(1).float()


def liger(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> Tensor:
    """Liger's fused head and loss."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    flat = liger_fused_linear_cross_entropy(hidden.flatten(0, 1), weight, targets.flatten(), bias, reduction="sum")
    return -flat.reshape(1).float()


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> Tensor:
    """PyTorch's fused head and loss by chunks of rows, with its own choice of how."""
    options = torch.nn.LinearCrossEntropyOptions()
    flat = F.linear_cross_entropy(
        hidden.flatten(0, 1), weight, targets.flatten(), linear_bias=bias, reduction="sum", options=options
    )
    return -flat.reshape(1).float()


def liger_hopper(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> Tensor:
    """Liger's kernels for Hopper in CuTe's language; they take no bias."""
    from liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90 import LigerFusedLinearCrossEntropySM90Function

    _no_bias(bias)
    flat = LigerFusedLinearCrossEntropySM90Function.apply(hidden.flatten(0, 1), weight, targets.flatten(), -100, "sum")
    return -flat.reshape(1).float()


def quack(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> Tensor:
    """QuACK's chunked head and loss; it takes no bias."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    _no_bias(bias)
    flat = chunked_linear_cross_entropy(hidden.flatten(0, 1), weight, targets.flatten(), reduction="sum")
    return -flat.reshape(1).float()


def _no_bias(bias: Tensor | None) -> None:
    if bias is not None:
        raise ValueError("this kernel takes no bias")


def apple(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> Tensor:
    """Apple's cut cross-entropy."""
    from cut_cross_entropy import linear_cross_entropy as cut

    flat = cut(hidden.flatten(0, 1), weight, targets.flatten(), bias=bias, reduction="none")
    return -flat.view(targets.shape).float().sum(-1)


def over_head(loss: Callable) -> Callable:
    """A loss from logits as one from hidden states."""
    return lambda hidden, weight, targets, bias: loss(F.linear(hidden, weight, bias), targets)


FROM_LOGITS = {
    "cca_ds": sequence_logp,
    "eager": eager,
    "cross_entropy": cross_entropy,
    "compiled eager": torch.compile(eager),
    "compiled cross_entropy": torch.compile(cross_entropy),
}
FROM_HIDDEN = {
    "cca_ds": linear_sequence_logp,
    "cca_ds native": lambda h, w, t, b: linear_sequence_logp(h, w, t, b, accumulate="native"),
    "cca_ds lean": lambda h, w, t, b: linear_sequence_logp(
        h, w, t, b, chunk_rows=1 << 24 >> w.shape[0].bit_length() - 1
    ),
    "cca_ds lean, 512 rows": lambda h, w, t, b: linear_sequence_logp(h, w, t, b, chunk_rows=512),
    "eager": over_head(eager),
    "cross_entropy": over_head(cross_entropy),
    "compiled eager": torch.compile(over_head(eager)),
    "compiled cross_entropy": torch.compile(over_head(cross_entropy)),
    "linear_cross_entropy": linear_cross_entropy,
    "linear_cross_entropy, chunked": chunked_cross_entropy,
}
ON_GPU = {"liger": liger, "liger for Hopper": liger_hopper, "quack": quack, "cut_cross_entropy": apple}


def names(entry: str, device: str) -> list[str]:
    """The variants of an entry point, the bounds last."""
    if entry == "logits":
        return [*FROM_LOGITS, *(["copy"] if device == "cuda" else [])]
    return [*FROM_HIDDEN, *(ON_GPU if device == "cuda" else ()), "forward only", "matmuls alone"]


def free_gradients(case: dict) -> None:
    """Free the gradients of the last run."""
    for tensor in case.values():
        if tensor is not None:
            tensor.grad = None


def matmuls_alone(case: dict) -> Callable[[], None]:
    """The three matmuls that every variant needs: logits, and the gradients of hidden states and weight."""
    hidden, weight = case["hidden"].detach().flatten(0, 1), case["weight"].detach()
    residual = torch.randn(hidden.shape[0], weight.shape[0], device=hidden.device).to(hidden.dtype)

    def run() -> None:
        hidden @ weight.t()
        residual @ weight
        residual.t() @ hidden

    return run


def make(entry: str, name: str, case: dict) -> Callable[[], None]:
    """One forward and backward of a variant on the case's tensors."""
    if name == "matmuls alone":
        return matmuls_alone(case)
    if name == "copy":
        from_, to = case["logits"].detach(), torch.empty_like(case["logits"])
        return lambda: to.copy_(from_)
    if name == "forward only":
        with_no_grad = torch.no_grad()(linear_sequence_logp)
        return lambda: with_no_grad(case["hidden"], case["weight"], case["targets"], case["bias"])

    def run() -> None:
        if entry == "logits":
            logp = FROM_LOGITS[name](case["logits"], case["targets"])
        else:
            logp = {**FROM_HIDDEN, **ON_GPU}[name](case["hidden"], case["weight"], case["targets"], case["bias"])
        logp.sum().backward()
        free_gradients(case)  # otherwise each variant pays for freeing the pages of the one before it

    return run
