"""What a decoding step runs through: `torch`'s own functions, and on a CPU the kernels of csrc/decoding_cpu.cpp.

Letters: D width, F output width, R rows, H heads, S live slots of the cache, C channels of a head.
"""

import torch
from torch import Tensor

from cca_ds.ops.library import backend

_FEW_ROWS = 16
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _has_kernel(x: Tensor, other: Tensor) -> bool:
    here = (
        x.device.type == "cpu"
        and backend() != "torch"
        and x.dtype == other.dtype
        and x.dtype in _KERNEL_DTYPES
    )
    return here and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


def linear(x: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`: [..., D] -> [..., F]; faster on a CPU where a decoding step has up to 16 rows.

    There, without gradients, a kernel reads the weight once; sums run in float32, and a row's result does not depend
    on the rows beside it.
    """
    if 0 < x.numel() <= _FEW_ROWS * x.shape[-1] and _has_kernel(x, weight_FD):
        return torch.ops.cca_ds.few_rows_linear(x, weight_FD, bias_F)
    return torch.nn.functional.linear(x, weight_FD, bias_F)


def one_query_attention(query_RH1C: Tensor, keys_RHSC: Tensor, values_RHSC: Tensor) -> Tensor:
    """Attention of one position to all S slots, [R, H, 1, C]; a head's slots must lie one after another in memory.

    On a CPU, without gradients, the cache is read once and the sums run in float32.
    """
    if _has_kernel(query_RH1C, keys_RHSC):
        return torch.ops.cca_ds.one_query_attention(query_RH1C, keys_RHSC, values_RHSC)
    return torch.nn.functional.scaled_dot_product_attention(query_RH1C, keys_RHSC, values_RHSC)


if backend() != "torch":
    torch.library.register_fake(
        "cca_ds::few_rows_linear", lambda x, weight, bias: x.new_empty((*x.shape[:-1], weight.shape[0]))
    )
    torch.library.register_fake(
        "cca_ds::one_query_attention", lambda query, keys, values: keys.new_empty(query.shape)
    )
