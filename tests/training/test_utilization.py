"""MFU: the operations that a step's pairs cost the trainers, over what all GPUs could do in its seconds."""

import pytest

from cca_ds.config.recipes import load_recipe
from cca_ds.training.utilization import Utilization
from cca_ds.training.workload import trained_flops, workload_of

H100, A40 = "NVIDIA H100 80GB HBM3", "NVIDIA A40"


def test_share_of_known_seconds():
    """A pair of 1e15 operations; 2 H100 and 1 A40 do 2 x 989e12 + 150e12 a second."""
    share = Utilization(1e15, [H100, A40, H100])
    assert share.tags(pairs=256, seconds=200.0) == {"throughput/mfu": pytest.approx(256e15 / 200 / 2128e12)}
    assert Utilization(989e12, [H100]).tags(pairs=3, seconds=3.0) == {"throughput/mfu": 1.0}


@pytest.mark.parametrize("devices", [["cpu"], [H100, "cpu"], [H100, "NVIDIA GeForce RTX 4090"]])
def test_nothing_without_every_peak(devices):
    assert Utilization(1e15, devices).tags(256, 10.0) == {}


@pytest.mark.parametrize(
    ("settings", "forwards"),
    [
        (["reference.placement=inference"], 8),  # 2 rows, each 3 of the policy and 1 of the reference
        (["reference.placement=zero3"], 8),
        (["reference.placement=cached", "reference.cache=C"], 6),  # read, not computed
        (["reference.placement=streamed", "reference.cache=C"], 6),
        (["loss.name=mle"], 3),
        (["model.activation_checkpointing=true"], 8),  # what is computed again does not count
    ],
)
def test_forwards_of_a_pair(settings, forwards):
    """LlamaGen-3B's forward by hand: 2 a weight outside the embeddings and code, and 4 L^2 D a layer of attention."""
    run = load_recipe("llamagen-3b", settings)
    weights = 24 * (4 * 3200**2 + 3 * 3200 * 8704) + 16384 * 3200
    forward = 2 * weights * 576 + 24 * 4 * 576**2 * 3200
    assert trained_flops(run, workload_of(run, {}, 8, "bf16")) == forwards * forward
