"""`train.py --dry_run`: what a run would be, without weights, ranks or a GPU.

The model is built on the meta device, which holds shapes alone; the memory follows from `balance.memory`.
"""

from __future__ import annotations

import os
from dataclasses import fields, replace
from typing import Any

import torch

from cca_ds.alignment.losses import LOSSES
from cca_ds.balance.memory import Sharding
from cca_ds.balance.partition import partition_batch
from cca_ds.cluster.devices import GIB
from cca_ds.config.recipes import dump_recipe
from cca_ds.config.schema import Loss, RunConfig
from cca_ds.data.batches import total_steps
from cca_ds.data.manifest import MANIFEST_NAME, expected_images, fewer_classes_note, read_manifest
from cca_ds.files import expand
from cca_ds.models import model_config
from cca_ds.models.cost import ModelCost, cost_of_module, meta_model
from cca_ds.planning.job import job_of, placement_of, usual_micro
from cca_ds.vq import builtin_images

USUAL_RANKS = 8
MIB = 2**20
# titles of Memory's fields, in the order of the table
PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer and master weights",
    "buffers": "gathered weights, buckets",
    "reference": "reference",
    "head": "logits of one chunk",
    "activations": "activations of a micro-batch",
    "reserved": "CUDA, libraries",
}


def describe(run: RunConfig, ds: dict[str, Any]) -> str:
    """Resolved configuration, parameters, sequence, batch, steps, and memory by part and ZeRO stage.

    Args:
        run: a checked recipe.
        ds: DeepSpeed's file as read.

    Raises:
        ValueError: a model that cannot be built.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "0")) or USUAL_RANKS
    module = meta_model(run.model.preset, run.model.shape)
    model = cost_of_module(module, run.model.preset, run.model.dropout)
    parts = [
        f"# resolved recipe\n{dump_recipe(run)}",
        "\n".join(["# model", *model_lines(run, module)]),
        "\n".join(["# batch and steps", *batch_lines(run, ranks)]),
        "\n".join(["# memory", *memory_lines(run, ds, model, ranks)]),
    ]
    return "\n\n".join(part.rstrip() for part in parts)


def count_parameters(module: torch.nn.Module) -> int:
    """Numbers in all its parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def model_lines(run: RunConfig, module: torch.nn.Module) -> list[str]:
    """Parameters, by the module's own parts, and the sequence."""
    by_part = {name: count_parameters(part) for name, part in module.named_children()}
    by_part["(own)"] = count_parameters(module) - sum(by_part.values())
    shown = ", ".join(f"{name} {_short(count)}" for name, count in by_part.items() if count)
    scales = getattr(module.config, "scales", None)
    pyramid = f" over {len(scales)} scales up to {scales[-1]} x {scales[-1]}" if scales else ""
    return [
        f"{run.model.preset}: {count_parameters(module):,} parameters ({shown})",
        f"sequence: {module.sequence_length} codes{pyramid}, vocabulary {module.vocab_size:,}, "
        f"{module.num_classes:,} classes and the null class",
        f"weights: {run.model.weights or 'none named, so drawn at random'}",
    ]


def batch_lines(run: RunConfig, ranks: int) -> list[str]:
    """The global batch, its partition over equal ranks, and the steps."""
    batch, (images, origin) = run.batch, expected_images(run.data.codes, builtin_images(run.data.codes))
    an_epoch = images // batch.global_size
    even = partition_batch(batch.global_size, [1.0] * ranks, [usual_micro(run)] * ranks)
    sequences = batch.global_size * LOSSES[run.loss.name].rows_per_pair
    lines = [
        f"batch: {batch.global_size} pairs a step, {sequences} sequences through the policy",
        f"cost: {cost_line(run.loss.name)}",
        *([f"generated images: {run.data.generated}"] if run.data.generated else []),
        f"on {ranks} equal ranks: at most {max(even.pairs)} pairs each, in {even.forwards} forwards of at most "
        f"{max(max(sizes) for sizes in even.micro_sizes)}",
        f"epoch: {images:,} images ({origin}), {an_epoch:,} steps",
    ]
    if (table := expand(run.data.codes) / MANIFEST_NAME).is_file():
        model = model_config(run.model.preset, **run.model.overrides).num_classes
        lines += fewer_classes_note(read_manifest(table.parent).classes, model)
    if an_epoch == 0:
        note = f"batch.global_size={batch.global_size} is more than the {images:,} images: lower it, or training ends"
        return [*lines, f"note: {note}"]
    steps, whole = total_steps(batch, an_epoch), total_steps(batch.model_copy(update={"max_steps": None}), an_epoch)
    limited = f" (batch.max_steps; {whole:,} without)" if steps < whole else ""
    return [*lines, f"run: {batch.epochs:g} epoch(s), {steps:,} steps{limited}"]


def cost_line(loss: str) -> str:
    """Forwards of one pair, a backward being two, and their ratio to those of the default loss."""
    spec, usual = LOSSES[loss], LOSSES[Loss().name]
    own, other = (one.rows_per_pair * one.passes for one in (spec, usual))
    parts = ["forward and backward (3)", *(["reference (1)"] if spec.needs_reference else [])]
    parts += [f"without gradient ({spec.extra_forwards})"] if spec.extra_forwards else []
    beside = f", as many as {usual.name}" if own == other else f", {own / other:.2f} times {usual.name}'s {other}"
    beside = "" if spec is usual else beside
    drawn = "; an image is drawn for each pair besides" if spec.negatives == "generated" else ""
    return f"{own} forwards a pair: {spec.rows_per_pair} x {' + '.join(parts)}{beside}{drawn}"


def memory_lines(run: RunConfig, ds: dict[str, Any], model: ModelCost, ranks: int) -> list[str]:
    """A table of bytes a GPU: parts by ZeRO stage on `ranks` GPUs, then the file's stage on other numbers of them."""
    sharding = Sharding.of(ds)
    columns = [_bytes(run, model, _at_stage(sharding, stage), ranks) for stage in range(4)]
    heads = [f"stage {stage}{' *' if stage == sharding.stage else ''}" for stage in range(4)]
    unit, name = (GIB, "GiB") if columns[0]["total"] > 4 * GIB else (MIB, "MiB")
    placement = placement_of(run)
    lines = [
        f"{name} a GPU on {ranks} of them, reference {placement.name if placement else 'none'}, "
        "* is the ds_config's stage",
        f"{'':<30}" + "".join(f"{head:>12}" for head in heads),
    ]
    for key, title in [*PARTS.items(), ("total", "total")]:
        lines.append(f"{title:<30}" + "".join(f"{column[key] / unit:>12.2f}" for column in columns))
    totals = [f"{n}: {_bytes(run, model, sharding, n)['total'] / unit:.1f}" for n in (1, 8, 64)]
    lines.append(f"total at stage {sharding.stage} by number of GPUs: {', '.join(totals)} {name}")
    if run.model.activation_checkpointing == "auto":
        again = _bytes(run, model, sharding, ranks, checkpointing=True)["total"] / unit
        lines.append(
            f"activation checkpointing: auto, off in this table; a GPU too small for it computes activations again, "
            f"total at stage {sharding.stage} {again:.2f} {name}"
        )
    if run.batch.micro_size == "auto":
        lines.append(f"micro-batch: auto, {usual_micro(run)} pairs in this table; a GPU takes as many as fit")
    offloaded = {"optimizer": sharding.offload_optimizer, "weights": sharding.offload_weights}
    if any(offloaded.values()):
        kept = ", ".join(part for part, on in offloaded.items() if on)
        lines.append(f"kept in host memory, as the ds_config sets: {kept}")
    return lines


def _at_stage(sharding: Sharding, stage: int) -> Sharding:
    """The same file at another stage; stage 0 offloads nothing, and only stage 3 the weights."""
    return replace(
        sharding,
        stage=stage,
        offload_optimizer=sharding.offload_optimizer and stage > 0,
        offload_weights=sharding.offload_weights and stage == 3,
    )


def _bytes(
    run: RunConfig, model: ModelCost, sharding: Sharding, ranks: int, checkpointing: bool | None = None
) -> dict[str, float]:
    """Bytes by the keys of PARTS, and their total; without recomputation where the devices' memory decides on it."""
    job = job_of(run, model, sharding, images=run.batch.global_size)
    own = run.model.activation_checkpointing is True if checkpointing is None else checkpointing
    memory = job.memory(placement_of(run), ranks, own)
    share = -(-run.batch.global_size // ranks)  # pairs of a rank
    found = {field.name: getattr(memory, field.name) for field in fields(memory)}
    found["activations"] = found.pop("activations_per_pair") * min(usual_micro(run), share)
    return found | {"total": sum(found.values())}


def _short(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count < 1e9 else f"{count / 1e9:.2f} B"
