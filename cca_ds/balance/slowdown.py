"""Slowing a rank on purpose, for tests and benchmarks of unequal ranks where all devices are equal."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn


class Slowdown:
    """Makes a rank `factor` times slower: it sleeps (factor - 1) times `pair_seconds` for every pair it computes.

    The sleep stands before a forward that will have a backward, in proportion to its rows, so that the measured
    and the true pass are slowed alike; forwards without gradient are not.

    Args:
        factor: at least 1.
        pair_seconds: what a pair takes, forward and backward, where nothing is slowed.
        rows_per_pair: rows of a forward that make a pair.
    """

    def __init__(
        self,
        factor: float,
        pair_seconds: float,
        rows_per_pair: int,
        sleep: Callable[[float], None] = time.sleep,
    ):
        assert factor >= 1.0 and pair_seconds > 0.0
        self.factor, self.row_seconds, self._sleep = factor, pair_seconds / rows_per_pair, sleep

    def attach(self, module: nn.Module) -> None:
        """Slow every forward of `module` from now on."""
        if self.factor > 1.0:
            module.register_forward_pre_hook(self._wait)

    def _wait(self, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if not torch.is_grad_enabled():
            return
        if inputs[0].is_cuda:
            torch.cuda.synchronize()  # else the sleep would hide behind work that is queued
        self._sleep((self.factor - 1.0) * self.row_seconds * len(inputs[0]))
