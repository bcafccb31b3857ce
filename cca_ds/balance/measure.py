"""What a pair costs on this rank alone: time and memory of the run's own model, without any collective.

Letters: B rows of a forward, L codes per image, P parameters, W ranks.

ZeRO-3's forward is collective, and ranks that wait for one another all measure the slowest one's speed. So the
recipe's model is built here a second time, unsharded, with four blocks at most; a deeper model's time and memory
follow from those with four and with one, block by block. It is built anew for every measurement and dropped after.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn

from cca_ds.balance.partition import largest_micro, measure_speed
from cca_ds.balance.slowdown import Slowdown
from cca_ds.cluster.failures import is_out_of_memory
from cca_ds.config.deepspeed_file import zero_stage
from cca_ds.config.schema import RunConfig
from cca_ds.models import DTYPES, model_config
from cca_ds.training.policy import build_module

_MOST_BLOCKS = 4
_REPEATS = 3
_USABLE = 0.94  # of a GPU's memory; the rest goes to fragmentation
_EXCHANGE_ELEMENTS = 2**21  # of the timed all-gather


class Probe:
    """The recipe's model, shortened, on this rank's device.

    Args:
        device: e.g. "cuda:0" or "cpu".
        precision: "bf16", "fp16" or "fp32".
        tokenizer: VAR's.
        slowdown: slows it as the policy is slowed.
    """

    def __init__(
        self,
        run: RunConfig,
        device: str,
        precision: str,
        tokenizer: nn.Module | None,
        slowdown: Slowdown | None = None,
    ):
        self.device, self.rows_per_pair = torch.device(device), rows_per_pair(run)
        self.depth = model_config(run.model.preset, **run.model.overrides).n_layer
        with _own_randomness(self.device), self.device:
            module = build_module(_shortened(run), tokenizer)
        self.module = module.to(self.device, DTYPES[precision]).train()
        self.conditioned = run.model.lambda_conditioning
        if slowdown is not None:
            slowdown.attach(self.module)
        self._blocks_name = "layers" if self.module.family == "llamagen" else "blocks"
        self._blocks = getattr(self.module, self._blocks_name)

    def seconds_per_pair(self, pairs: int) -> float:
        """Seconds of a forward and backward of `pairs` pairs over their number: the median of a few passes.

        The pass's own overhead is in it, as it is in the run's. Where memory is short, fewer pairs are timed.
        """
        return self._whole(lambda: self._time(pairs))

    def bytes_per_pair(self, pairs: int) -> float:
        """CUDA memory that a pair more needs at the peak of a pass of about `pairs` pairs."""
        larger = max(2, pairs)
        smaller = larger // 2
        peaks = lambda: (self._peak(larger) - self._peak(smaller)) / (larger - smaller)  # noqa: E731
        return max(self._whole(peaks), 1.0)

    def _whole(self, measure: Any) -> float:
        """`measure` of the whole depth: of the model as it is, or extended from all its blocks and from one."""
        own = len(self._blocks)
        several = measure()
        if own == self.depth:
            return several
        setattr(self.module, self._blocks_name, self._blocks[:1])
        try:
            one = measure()
        finally:
            setattr(self.module, self._blocks_name, self._blocks)
        block = (several - one) / (own - 1)
        if block <= 0:  # lost in noise
            return several * self.depth / own
        return one + (self.depth - 1) * block

    def _time(self, pairs: int) -> float:
        while True:
            try:
                with _own_randomness(self.device):
                    return measure_speed(self._step, [pairs], _REPEATS)
            except RuntimeError as error:
                if not is_out_of_memory(error) or pairs == 1:
                    raise
                pairs //= 2

    def _peak(self, pairs: int) -> float:
        torch.cuda.reset_peak_memory_stats(self.device)
        with _own_randomness(self.device):
            self._step(pairs)
        return float(torch.cuda.max_memory_allocated(self.device))

    def _step(self, pairs: int) -> None:
        self.module(*self._inputs(pairs)).sum().backward()
        self.module.zero_grad(set_to_none=True)

    def _inputs(self, pairs: int) -> tuple[Tensor, ...]:
        rows = pairs * self.rows_per_pair
        shape = (rows, self.module.sequence_length)
        codes_BL = torch.randint(self.module.vocab_size, shape, device=self.device)
        labels_B = torch.randint(self.module.num_classes, (rows,), device=self.device)
        return (codes_BL, labels_B, *([torch.zeros(rows, device=self.device)] if self.conditioned else []))


def rows_per_pair(run: RunConfig) -> int:
    """Rows of a forward that make a pair: the image under its own label, and under the negative."""
    return 1 if run.loss.name == "mle" else 2


def count_parameters(run: RunConfig) -> int:
    """P of the whole model, from its shapes alone."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_module(run).parameters())


def micro_that_fits(
    run: RunConfig, ds: dict[str, Any], world_size: int, precision: str, probe: Probe, pairs: int
) -> int:
    """Most pairs of a forward that fit in this rank's GPU beside the model's states; at most `pairs`.

    What a pair needs is measured; the states, which are not there yet, are reckoned.
    """
    parameters, element = count_parameters(run), element_bytes(precision)
    replica = run.loss.name != "mle" and run.reference.placement == "inference"
    fixed = state_bytes(parameters, ds, world_size, element) + (parameters * element if replica else 0)
    free, _ = torch.cuda.mem_get_info(probe.device)
    return min(pairs, largest_micro(free * _USABLE, fixed, probe.bytes_per_pair(pairs)))


def element_bytes(precision: str) -> int:
    """Bytes of a weight."""
    return torch.finfo(DTYPES[precision]).bits // 8


def state_bytes(parameters: int, ds: dict[str, Any], world_size: int, element: int) -> float:
    """GPU bytes of P weights, their fp32 gradients, fp32 master copies and Adam's moments, each shared by the W
    ranks from the ZeRO stage on that shards it; at stage 3 also of the weights gathered at a time.
    """
    stage, zero = zero_stage(ds), ds.get("zero_optimization", {})
    share = lambda first_stage: parameters / (world_size if stage >= first_stage else 1)  # noqa: E731
    offloaded = {
        name: zero.get(name, {}).get("device", "none") != "none"
        for name in ("offload_param", "offload_optimizer")
    }
    weights = 0.0 if offloaded["offload_param"] else share(3) * element
    optimizer = 0.0 if offloaded["offload_optimizer"] else share(1) * 12
    live = min(parameters, int(zero.get("stage3_max_live_parameters", 10**9))) * element if stage == 3 else 0
    return weights + share(2) * 4 + optimizer + live


def seconds_per_forward(parameters_bytes: float, stage: int, world_size: int, device: str) -> float:
    """What a forward more costs a rank in exchanges: at stage 3 two gathers of all weights and one reduction of
    their gradients, at stage 2 the reduction, below nothing. From one timed all-gather; collective.
    """
    exchanges = {3: 3, 2: 1}.get(stage, 0)
    if world_size == 1 or not exchanges:
        return 0.0
    part = torch.zeros(-(-_EXCHANGE_ELEMENTS // world_size), device=device)
    whole = torch.empty(world_size * len(part), device=device)
    times = []
    for _ in range(1 + _REPEATS):
        start = time.perf_counter()
        torch.distributed.all_gather_into_tensor(whole, part)
        whole[-1].item()  # a GPU is done when its numbers can be read
        times.append(time.perf_counter() - start)
    return exchanges * statistics.median(times[1:]) * parameters_bytes / (4 * len(whole))


def _shortened(run: RunConfig) -> RunConfig:
    """The recipe with a model of a few blocks, otherwise of its own shape."""
    config = model_config(run.model.preset, **run.model.overrides)
    blocks = min(config.n_layer, _MOST_BLOCKS)
    if hasattr(config, "depth"):  # VAR: width, heads and stochastic depth follow the depth unless given
        shape = {
            "depth": blocks,
            "width": config.dim,
            "heads": config.n_head,
            "drop_path": config.drop_path_rate,
        }
    else:
        shape = {"n_layer": blocks}
    model = run.model.model_copy(update={"overrides": {**run.model.overrides, **shape}})
    return run.model_copy(update={"model": model})


def _own_randomness(device: torch.device) -> Any:
    """Leave the run's random state as it is: measuring must not change the trajectory."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
