"""`cca_ds/train.py` on ranks that are slowed on purpose, for tests and benchmarks where all devices are equal.

    SLOWED_ROW_SECONDS=0.025,0.075 torchrun --nproc_per_node 2 tests/support/slowed_train.py --ds_config ...

Rank r sleeps the r-th number of seconds for every row (sequence) of a model's forward that will have a backward. So
the measured pass and the trained one are slowed alike, and forwards without gradient are not slowed.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from cca_ds.models.base import CodeModel

VARIABLE = "SLOWED_ROW_SECONDS"


def slow_models(row_seconds: float, sleep: Callable[[float], None] = time.sleep) -> RemovableHandle:
    """Sleep `row_seconds` a row before every forward with gradient of any model of codes in this process."""

    def wait(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if not isinstance(module, CodeModel) or not torch.is_grad_enabled():
            return
        if inputs[0].is_cuda:
            torch.cuda.synchronize()  # else the sleep would overlap with work that is queued
        sleep(row_seconds * len(inputs[0]))

    return nn.modules.module.register_module_forward_pre_hook(wait)


def main() -> int:
    """Slow this rank, then train with the command line's arguments."""
    from cca_ds import train

    row_seconds = [float(text) for text in os.environ[VARIABLE].split(",")][int(os.environ["RANK"])]
    print(f"this rank sleeps {row_seconds:g} s a row, for a test or a benchmark", file=sys.stderr)
    slow_models(row_seconds)
    return train.main()


if __name__ == "__main__":
    sys.exit(main())
