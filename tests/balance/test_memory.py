"""The memory model: by hand, against measured peaks, and the same for planning and for measuring."""

from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from cca_ds.balance.measure import Workload
from cca_ds.balance.memory import Sharding, activation_bytes, gathered_bytes, memory_of
from cca_ds.config.deepspeed_file import read_ds_config
from cca_ds.config.recipes import load_recipe
from cca_ds.models import LlamaGenConfig, create_model
from cca_ds.models.cost import model_cost
from cca_ds.models.var.model import VARConfig
from cca_ds.ops import adaln
from cca_ds.planning.job import Job, job_of, placement_of
from cca_ds.reference.placements import PLACEMENTS
from cca_ds.training.workload import workload_of
from cca_ds.vq import create_tokenizer

DS_CONFIGS = Path(__file__).parents[2] / "ds_configs"
ZERO3, OFFLOAD, HIERARCHICAL = (
    Sharding.of(read_ds_config(DS_CONFIGS / f"{name}.json"))
    for name in ("zero3", "zero3_offload", "zero3_hierarchical")
)


def job(preset, sharding=ZERO3, **rest):
    return Job(model_cost(preset), sharding, pairs=256, images=1000, **rest)


def test_memory_by_hand():
    """LlamaGen-3B at stage 3 on 8 ranks; 3,096,659,200 parameters."""
    size = 3_096_659_200
    memory = job("llamagen-3b").memory(PLACEMENTS["inference"], 8, True)
    assert memory.weights == size * 2 / 8
    assert memory.gradients == size * 4 / 8  # accumulated in float32, as zero3.json asks
    assert memory.optimizer == size * 12 / 8
    assert memory.reference == size * 2
    assert memory.buffers == 2e8 * 2 + 1e9 * 2  # reduce bucket, live weights
    assert memory.head == 2**24 * 6 + 4 * 16384 * 3200
    assert memory.fixed == pytest.approx(sum((2.25 * size, 2.4e9, memory.head, 1.5 * 2**30)) + size * 2, rel=1e-9)


@pytest.mark.parametrize(("stage", "parts"), [(0, (2, 2, 12)), (1, (2, 2, 3)), (2, (2, 0.5, 3)), (3, (0.5, 0.5, 3))])
def test_each_stage_shards_one_part_more(stage, parts):
    model = model_cost("llamagen-b")
    sharding = Sharding.of({"zero_optimization": {"stage": stage}})
    memory = memory_of(model, sharding, 4, False, reference_bytes=0.0)
    found = [getattr(memory, part) / model.parameters for part in ("weights", "gradients", "optimizer")]
    assert found == pytest.approx(parts)
    assert memory.reference == 0


def test_offload_and_placements():
    model = model_cost("llamagen-3b")
    memory = job("llamagen-3b", OFFLOAD, reference_offload=True).memory(PLACEMENTS["zero3"], 2, True)
    assert memory.weights == memory.optimizer == 0
    assert memory.reference == 5e8 * 2  # live weights only
    sharded = job("llamagen-3b").memory(PLACEMENTS["zero3"], 2, True).reference
    assert sharded == model.parameters * 2 / 2 + 1e9 * 2
    stored = job("llamagen-3b", HIERARCHICAL).memory(PLACEMENTS["cached"], 16, True)
    assert stored.weights == model.parameters * 2 * (1 / 16 + 1 / 8)
    assert job("llamagen-3b").memory(PLACEMENTS["streamed"], 2, True).reference == 0
    one = memory_of(model, ZERO3, 2, True, reference_bytes=0.0, rows_per_pair=1).activations_per_pair
    two = memory_of(model, ZERO3, 2, True, reference_bytes=0.0).activations_per_pair
    assert two == 2 * one


def test_gradients_are_as_wide_as_the_weights_at_least():
    """Without data_types in DeepSpeed's file, gradients accumulate in the weights' own type."""
    model, plain = model_cost("digits"), Sharding.of({"zero_optimization": {"stage": 0}})
    for element, width in ((2, 2), (4, 4)):
        memory = memory_of(model, plain, 1, False, reference_bytes=0.0, element_bytes=element)
        assert memory.gradients == width * model.parameters


@pytest.mark.parametrize("placement", [*PLACEMENTS, None])
@pytest.mark.parametrize("sharding", ["zero2", "zero3", "zero3_a40", "zero3_hierarchical", "zero3_offload"])
def test_measuring_and_planning_count_the_same_bytes(placement, sharding):
    """A measured run's limit follows from the planner's fixed bytes, without what CUDA itself has already taken."""
    choice = ["loss.name=mle"] if placement is None else [f"reference.placement={placement}", "reference.cache=C"]
    run = load_recipe("llamagen-3b", ["precision=bf16", *choice])
    ds = read_ds_config(DS_CONFIGS / f"{sharding}.json")
    workload = workload_of(run, ds, 16, "bf16")
    planned = job_of(run, workload.model, Sharding.of(ds), 1000).memory(placement_of(run), 16, False)
    assert workload.fixed_bytes(16) == planned.allocated == planned.fixed - 1.5 * 2**30
    parts = ("weights", "gradients", "optimizer", "buffers", "reference", "head")
    assert workload.fixed_bytes(16) == pytest.approx(sum(getattr(planned, part) for part in parts))


def test_a_measured_rank_counts_reference_hpz_and_buckets_by_hand():
    """P parameters in bf16 on 16 ranks, hpZ over 8: shards, second copy, gathered weights, bucket, ZeRO-3 reference."""
    model = model_cost("llamagen-3b")
    sharding = Sharding.of(read_ds_config(DS_CONFIGS / "zero3_hierarchical.json"))
    gathered = gathered_bytes(model, sharding, 2)
    reference = PLACEMENTS["zero3"].resident_bytes(model.parameters * 2.0, gathered, 16, False)
    workload = Workload(model, lambda: None, "bf16", 2, sharding, reference)
    p, bucket, live = 3_096_659_200, sharding.reduce_bucket, min(3_096_659_200, sharding.live_weights)
    states = p * (2 + 4 + 12) / 16 + p * 2 / 8
    assert workload.fixed_bytes(16) == pytest.approx(
        states + 2 * bucket + 2 * live + (2 * p / 16 + 2 * live) + 2**24 * 6 + 4 * 16384 * 3200
    )


def measured_peak(model, images):
    """Most bytes allocated above the start in a forward and backward on the CPU, from the allocator's own
    events."""
    codes_BL = torch.zeros(images, model.sequence_length, dtype=torch.int64)
    labels_B = torch.zeros(images, dtype=torch.int64)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    model(codes_BL, labels_B).sum().backward()  # allocates scratch memory that later passes use again
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
    predicted = codes * activation_bytes(model_cost("llamagen-b", overrides), checkpointing, element_bytes=4)
    # a CPU computes SwiGLU's product again and keeps the heads once; a GPU keeps both
    assert 0.9 * each <= predicted <= 1.4 * each


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_against_the_measured_peak_of_var(checkpointing, monkeypatch):
    """Between the measured peak and 1.4 times it, with the plain adaLN, as on a GPU; the CPU kernels keep less."""
    monkeypatch.setattr(adaln, "has_kernel", lambda x: False)
    scales = (1, 2, 3, 4, 5, 6, 8)
    tokenizer = create_tokenizer(
        "var-vqvae", channels=32, channel_multipliers=[1, 1, 1, 1, 2], z_channels=32, codebook_size=64, scales=scales
    )
    overrides = {"depth": 3, "num_classes": 10, "vocab_size": 64, "scales": scales, "drop_path": 0.0}
    model = create_model(VARConfig(**overrides), tokenizer=tokenizer).train()
    model.set_activation_checkpointing(checkpointing)
    each = (measured_peak(model, 4) - measured_peak(model, 1)) / 3
    cost = model_cost("var-d16", overrides)
    predicted = cost.codes * activation_bytes(cost, checkpointing, element_bytes=4)
    assert each <= predicted <= 1.4 * each


def test_what_deepspeed_takes_where_its_file_says_nothing():
    nothing = Sharding(
        stage=0, offload_optimizer=False, offload_weights=False, reduce_bucket=500_000_000, live_weights=10**9,
        hierarchical=1, gradient_bytes=2,
    )  # fmt: skip
    assert Sharding.of({}) == Sharding.of({"zero_optimization": {"reduce_bucket_size": "auto"}}) == nothing
    model = model_cost("llamagen-3b")
    plain = memory_of(model, nothing, 4, True, reference_bytes=0.0)
    assert plain == memory_of(model, nothing, 4, True, reference_bytes=0.0, rows_per_pair=2, element_bytes=2)
    assert plain.buffers == 5e8 * 2  # the bucket alone: below stage 3 nothing is gathered
    assert plain.weights == 2 * model.parameters and plain.gradients == 2 * model.parameters
    assert gathered_bytes(model, nothing) == 2 * 10**9


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_of_a_pair_by_hand(checkpointing):
    """LlamaGen-3B in bf16 with dropout: D = 3200, F = 8704, 24 blocks, 576 codes, two rows a pair."""
    model = model_cost("llamagen-3b")
    block = 2 * (10 * 3200 + 3 * 8704) + 2 * 3200
    each = (24 * 3200 * 2 + block if checkpointing else 24 * block) + 8 * 3200 * 2
    assert activation_bytes(model, checkpointing) == each
    found = memory_of(model, ZERO3, 8, checkpointing, reference_bytes=0.0).activations_per_pair
    assert found == 2 * 576 * (each + 2 * 16384)
