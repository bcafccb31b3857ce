"""The planner's memory: by hand, against measured peaks, and what fits of it."""

import json
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from cca_ds.models import LlamaGenConfig, create_model
from cca_ds.models.var.model import VARConfig
from cca_ds.ops import adaln as var_functions
from cca_ds.planning.architecture import architecture_of
from cca_ds.planning.memory import Sharding, activation_bytes, memory_of
from cca_ds.planning.nodes import GIB, parse_nodes
from cca_ds.planning.outcomes import Job, outcome
from cca_ds.planning.report import best_of
from cca_ds.planning.step_time import micro_caps
from cca_ds.vq import create_tokenizer

ROOT = Path(__file__).parents[2]
ZERO3 = Sharding.of(json.loads((ROOT / "ds_configs" / "zero3.json").read_text()))


def job_of(preset="llamagen-3b", pairs=256, sharding=ZERO3, **rest):
    return Job(architecture_of(preset), sharding, pairs, 1_281_167, **rest)


def test_memory_by_hand():
    """LlamaGen-3B at stage 3 on 8 ranks; 3,096,659,200 parameters."""
    size = 3_096_659_200
    memory = memory_of(architecture_of("llamagen-3b"), ZERO3, 8, "inference", True)
    assert memory.weights == size * 2 / 8
    assert memory.gradients == size * 4 / 8  # accumulated in float32, as zero3.json asks
    assert memory.optimizer == size * 12 / 8
    assert memory.reference == size * 2
    assert memory.buffers == 2e8 * 2 + 1e9 * 2  # reduce bucket, live weights
    assert memory.head == 2**24 * 6 + 4 * 16384 * 3200
    assert memory.fixed == pytest.approx(
        sum((2.25 * size, 2.4e9, memory.head, 1.5 * GIB)) + size * 2, rel=1e-9
    )


@pytest.mark.parametrize(
    ("stage", "parts"), [(0, (2, 2, 12)), (1, (2, 2, 3)), (2, (2, 0.5, 3)), (3, (0.5, 0.5, 3))]
)
def test_each_stage_shards_one_part_more(stage, parts):
    model = architecture_of("llamagen-b")
    memory = memory_of(model, Sharding.of({"zero_optimization": {"stage": stage}}), 4, "cached", False)
    found = [getattr(memory, part) / model.parameters for part in ("weights", "gradients", "optimizer")]
    assert found == pytest.approx(parts)
    assert memory.reference == 0


def test_offload_and_placements():
    model = architecture_of("llamagen-3b")
    offload = Sharding.of(json.loads((ROOT / "ds_configs" / "zero3_offload.json").read_text()))
    memory = memory_of(model, offload, 2, "zero3", True, reference_offload=True)
    assert memory.weights == memory.optimizer == 0
    assert memory.reference == 5e8 * 2  # live weights only
    sharded = memory_of(model, ZERO3, 2, "zero3", True).reference
    assert sharded == model.parameters * 2 / 2 + 1e9 * 2
    halves = memory_of(model, ZERO3, 2, "inference", True, tensor_parallel=2).reference
    assert halves == model.parameters
    hierarchical = Sharding.of(json.loads((ROOT / "ds_configs" / "zero3_hierarchical.json").read_text()))
    assert memory_of(model, hierarchical, 16, "cached", True).weights == model.parameters * 2 * (
        1 / 16 + 1 / 8
    )
    assert memory_of(model, ZERO3, 2, "streamed", True).reference == 0
    one = memory_of(model, ZERO3, 2, "none", True, sequences_per_pair=1).activations_per_pair
    assert memory_of(model, ZERO3, 2, "none", True).activations_per_pair == 2 * one


def measured_peak(model, images):
    """Most bytes allocated above the start in a forward and backward on the CPU, from the allocator's own
    events."""
    codes_BL = torch.zeros(images, model.sequence_length, dtype=torch.int64)
    labels_B = torch.zeros(images, dtype=torch.int64)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    model(codes_BL, labels_B).sum().backward()  # scratch, which is kept, counts for nothing
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        model(codes_BL, labels_B).sum().backward()
    now = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("shape", [(6, 128, 144), (3, 64, 324)])
def test_activations_against_the_measured_peak_of_llamagen(checkpointing, shape):
    layers, width, codes = shape
    overrides = {"n_layer": layers, "dim": width, "n_head": 4, "vocab_size": 64, "sequence_length": codes}
    overrides |= {"num_classes": 10, "token_dropout": 0.0, "resid_dropout": 0.0, "ffn_dropout": 0.0}
    model = create_model(LlamaGenConfig(**overrides)).train()
    model.set_activation_checkpointing(checkpointing)
    each = (measured_peak(model, 4) - measured_peak(model, 1)) / 3
    predicted = codes * activation_bytes(
        architecture_of("llamagen-b", overrides), checkpointing, element_bytes=4
    )
    # on a CPU the gated product is computed again and attention keeps its turned inputs once; on a GPU both are kept
    assert 0.9 * each <= predicted <= 1.4 * each


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_against_the_measured_peak_of_var(checkpointing, monkeypatch):
    """Between the measured peak and 1.4 times it, with the blocks' passes as a GPU has them: a CPU's own keep less."""
    monkeypatch.setattr(var_functions, "_on_cpu", lambda x: False)
    scales = (1, 2, 3, 4, 5, 6, 8)
    tokenizer = create_tokenizer(
        "var-vqvae",
        channels=32,
        channel_multipliers=[1, 1, 1, 1, 2],
        z_channels=32,
        codebook_size=64,
        scales=scales,
    )
    overrides = {"depth": 3, "num_classes": 10, "vocab_size": 64, "scales": scales, "drop_path": 0.0}
    model = create_model(VARConfig(**overrides), tokenizer=tokenizer).train()
    model.set_activation_checkpointing(checkpointing)
    each = (measured_peak(model, 4) - measured_peak(model, 1)) / 3
    architecture = architecture_of("var-d16", overrides)
    predicted = architecture.codes * activation_bytes(architecture, checkpointing, element_bytes=4)
    assert each <= predicted <= 1.4 * each


def test_what_does_not_fit_is_said():
    job, groups = job_of(sharding=Sharding.of({"zero_optimization": {"stage": 0}})), parse_nodes("1xa40:8")
    found = outcome(job, groups, "inference", True)
    assert found.balanced is None and found.even is None and found.caps == [0]
    assert best_of([found]) is None


def test_micro_batches_fill_the_memory_and_no_more():
    job, groups = job_of("llamagen-xxl", pairs=4096), parse_nodes("1xh100:8,1xa40:8")
    memory = memory_of(job.model, ZERO3, 16, "inference", False)
    for group, cap in zip(groups, micro_caps(groups, [memory, memory], job.pairs), strict=True):
        usable = 0.94 * group.device.memory_bytes
        assert memory.fixed + cap * memory.activations_per_pair <= usable
        assert memory.fixed + (cap + 1) * memory.activations_per_pair > usable
