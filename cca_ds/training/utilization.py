"""Which share of the GPUs' peak a run turns into the model's own operations (MFU, as PaLM counts it)."""

from __future__ import annotations

from collections.abc import Sequence

from cca_ds.cluster.devices import peak_flops
from cca_ds.models.cost import ModelCost


def pair_flops(model: ModelCost, rows_per_pair: int, reference_on_trainers: bool, extra_forwards: int = 0) -> float:
    """Operations that one pair costs the trainers: forward and backward of the policy, which are three forwards, the
    reference's forward where the trainers compute it, and the forwards that the loss adds (`LossSpec.extra_forwards`).
    Activations that are computed again do not count.
    """
    return rows_per_pair * (3 + reference_on_trainers + extra_forwards) * model.forward_flops()


class Utilization:
    """Model operations a second over the sum of all ranks' peaks.

    Args:
        flops_per_pair: see `pair_flops`.
        device_names: every rank's device by its maker's name; with a CPU or an unknown GPU among them, nothing is
            logged.
    """

    def __init__(self, flops_per_pair: float, device_names: Sequence[str]):
        peaks = [peak_flops(name) for name in device_names]
        self.flops_per_pair = flops_per_pair
        self.peak = None if None in peaks else sum(peak for peak in peaks if peak)

    def tags(self, pairs: int, seconds: float) -> dict[str, float]:
        """`throughput/mfu` of a step of `pairs` pairs over all ranks that took `seconds`; empty without a peak."""
        return {"throughput/mfu": pairs * self.flops_per_pair / seconds / self.peak} if self.peak else {}
