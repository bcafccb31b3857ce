"""MFU: known GPUs by their full names, and the share by hand."""

import pytest

from cca_ds.config.recipes import load_recipe
from cca_ds.planning.architecture import architecture_of
from cca_ds.training.utilization import Utilization, peak_flops


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A40", 150e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GeForce RTX 4090", None),
        ("", None),
    ],
)
def test_peaks_by_name(name, peak):
    assert peak_flops(name) == peak


def test_share_by_hand():
    """3B, one pair: 2 sequences x (3 passes of the policy + 1 of the reference) of the forward's operations."""
    share = Utilization.__new__(Utilization)
    share.peak = 32 * 989e12
    run = load_recipe("llamagen-3b")
    forward = architecture_of(run.model.preset).forward_flops()
    share.flops_per_pair = 2 * 4 * forward
    assert share.tags(256, 10.0)["throughput/mfu"] == pytest.approx(256 * 8 * forward / 10 / (32 * 989e12))
    share.peak = None
    assert share.tags(256, 10.0) == {}
