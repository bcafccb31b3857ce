"""Which share of the GPUs' peak a run turns into the model's own operations (MFU, as PaLM counts it)."""

from __future__ import annotations

import torch

from cca_ds.cluster.launch import Ranks
from cca_ds.config.schema import RunConfig
from cca_ds.planning.architecture import architecture_of
from cca_ds.planning.nodes import DEVICES


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 operations a second of a GPU by its full name, e.g. "NVIDIA H100 80GB HBM3"; None if unknown."""
    words = device_name.lower().replace("-", " ").split()
    return next((device.peak_flops for name, device in DEVICES.items() if name in words), None)


class Utilization:
    """Model operations a second over the peak of all ranks' GPUs. Collective to build.

    Without GPUs, or with one whose peak is not known, there is nothing to log.
    """

    def __init__(self, run: RunConfig, ranks: Ranks):
        name = torch.cuda.get_device_name() if ranks.device.startswith("cuda") else ""
        peaks: list[float | None] = [None] * ranks.world_size
        torch.distributed.all_gather_object(peaks, peak_flops(name))
        self.peak = None if None in peaks else sum(peak for peak in peaks if peak)
        self.flops_per_pair = 0.0
        if self.peak:
            contrastive = run.loss.name != "mle"
            model = architecture_of(run.model.preset, run.model.overrides)
            # forward and backward are three forwards; recomputed activations are no work of the model's
            passes = 3 + (contrastive and run.reference.placement in ("inference", "zero3"))
            self.flops_per_pair = (1 + contrastive) * passes * model.forward_flops()

    def tags(self, pairs: int, seconds: float) -> dict[str, float]:
        """`throughput/mfu` of a step, or nothing."""
        return {"throughput/mfu": pairs * self.flops_per_pair / seconds / self.peak} if self.peak else {}
