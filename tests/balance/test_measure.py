"""What a pair costs: a short model measured, extended to the whole depth, on ranks slowed on purpose too."""

import math

import pytest
import torch

from cca_ds.balance import measure
from cca_ds.balance.measure import MeasuredModel
from cca_ds.config.recipes import load_recipe
from cca_ds.models import create_model
from cca_ds.models.from_recipe import build_shortened
from cca_ds.training.workload import workload_of
from tests.support.slowed_train import slow_models


def workload(run, precision="fp32", ds=None):
    return workload_of(run, ds or {"zero_optimization": {"stage": 3}}, 1, precision)


def tiny_run(*overrides):
    return load_recipe(
        "digits", ["model.weights=null", "model.from_scratch=true", "model.overrides={dim: 32, n_layer: 9}", *overrides]
    )


def test_a_deep_model_is_measured_by_four_blocks_and_one(device, monkeypatch):
    measured = MeasuredModel(workload(tiny_run()), device)
    seen = []

    def cost(step, pairs, repeats):
        seen.append((len(measured.module.layers), pairs))
        return 2.0 + 3.0 * len(measured.module.layers)

    monkeypatch.setattr(measure, "measure_speed", cost)
    assert measured.seconds_per_pair(5) == pytest.approx(2.0 + 3.0 * 9)
    assert seen == [(4, 5), (1, 5)] and len(measured.module.layers) == 4
    monkeypatch.setattr(measure, "measure_speed", lambda step, pairs, repeats: 4.0)
    assert measured.seconds_per_pair(5) == pytest.approx(4.0 * 9 / 4)  # blocks lost in noise


def test_measuring_is_real_slowed_alike_and_leaves_the_random_state(device):
    naps = []
    before = torch.get_rng_state()
    run = tiny_run("model.overrides.n_layer=2", "model.dropout=true")
    hook = slow_models(0.5, sleep=naps.append)
    try:
        seconds = MeasuredModel(workload(run), device).seconds_per_pair(3)
    finally:
        hook.remove()
    assert 0 < seconds < math.inf
    assert naps == [3.0] * 4  # six rows; one pass to warm up, three timed
    assert torch.equal(before, torch.get_rng_state())


def test_a_slowed_model_sleeps_for_the_rows_of_passes_with_a_gradient_only():
    naps = []
    run = tiny_run("model.overrides.n_layer=1")
    model = create_model("digits", **run.model.shape)
    hook = slow_models(0.25, sleep=naps.append)
    try:
        for rows in (8, 2):
            model(torch.zeros(rows, 64, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64))
        with torch.no_grad():
            model(torch.zeros(8, 64, dtype=torch.int64), torch.zeros(8, dtype=torch.int64))
        torch.nn.Linear(2, 1)(torch.zeros(8, 2))
    finally:
        hook.remove()
    assert naps == [2.0, 0.5]


def test_memory_too_short_for_the_micro_batch_times_fewer_pairs(device, monkeypatch):
    measured = MeasuredModel(workload(tiny_run("model.overrides.n_layer=1")), device)
    tried = []

    def cost(step, pairs, repeats):
        tried.append(pairs)
        if pairs > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 1.0

    monkeypatch.setattr(measure, "measure_speed", cost)
    assert measured.seconds_per_pair(9) == 1.0 and tried == [9, 4, 2]


def test_memory_too_short_for_the_micro_batch_measures_the_bytes_of_smaller_passes(monkeypatch):
    measured, asked = MeasuredModel(workload(tiny_run("model.overrides.n_layer=1")), "cpu"), []

    def peak(pairs):
        asked.append(pairs)
        if pairs > 20:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return 1000.0 + 30.0 * pairs

    monkeypatch.setattr(measured, "_peak", peak)
    assert measured.bytes_per_pair(64) == 30.0 and asked == [64, 32, 16, 8]
    monkeypatch.setattr(measured, "_peak", lambda pairs: peak(21))
    with pytest.raises(torch.cuda.OutOfMemoryError):
        measured.bytes_per_pair(64)


def test_a_short_var_keeps_its_width():
    run = load_recipe("var-d30", ["model.weights=null", "model.from_scratch=true"])
    with torch.device("meta"):
        module = build_shortened(run.model, 4)
    assert len(module.blocks) == 4 and module.config.dim == 1920 and module.config.n_head == 30


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_bytes_per_pair_hold_for_a_larger_pass():
    run = tiny_run("model.overrides={dim: 256, n_layer: 4}")
    sizes = workload(run, "bf16")
    measured = MeasuredModel(sizes, "cuda:0")
    each = measured.bytes_per_pair(16)
    predicted = measured._peak(16) + 48 * each
    assert measured._peak(64) == pytest.approx(predicted, rel=0.2)
    assert measure.micro_that_fits(sizes, 1, measured, 16) == 16
