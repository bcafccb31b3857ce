"""A plan as text (`report`) and as JSON (`as_json`)."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from cca_ds.cluster.devices import GIB
from cca_ds.planning.drawing import drawing_seconds
from cca_ds.planning.explanation import COST_MODEL
from cca_ds.planning.job import Job
from cca_ds.planning.nodes import NodeGroup
from cca_ds.planning.outcomes import Outcome
from cca_ds.planning.step_parts import StepParts, explain_lines, step_parts
from cca_ds.planning.step_time import rank_devices


def best_of(outcomes: Sequence[Outcome]) -> Outcome | None:
    """The quickest epoch among those that fit; the one with fewer moving parts where two are within 2%."""
    fitting = [outcome for outcome in outcomes if outcome.balanced]
    if not fitting:
        return None
    quickest = min(outcome.epoch_seconds for outcome in fitting)
    return next(outcome for outcome in fitting if outcome.epoch_seconds <= 1.02 * quickest)


def pairs_by_device(outcome: Outcome) -> dict[str, tuple[int, int]]:
    """Fewest and most pairs a step on a GPU of each kind, balanced."""
    assert outcome.balanced is not None
    ranges: dict[str, tuple[int, int]] = {}
    for device, pairs in zip(rank_devices(outcome.trainers), outcome.balanced.partition.pairs, strict=True):
        low, high = ranges.get(device.name, (pairs, pairs))
        ranges[device.name] = (min(low, pairs), max(high, pairs))
    return ranges


def explain(job: Job, shown: Outcome, compiled: bool) -> list[StepParts]:
    """The parts of an outcome's step on the busiest GPU of each kind; none where it does not fit."""
    if shown.balanced is None:
        return []
    devices = {group.device.name: group.device for group in shown.trainers}
    forwards = shown.balanced.partition.forwards
    return [
        step_parts(job, shown.trainers, devices[name], most, forwards, shown.placement, shown.checkpointing, compiled)
        for name, (_, most) in pairs_by_device(shown).items()
    ]


def recommendation(job: Job, outcomes: Sequence[Outcome], leaner: Outcome | None = None) -> list[str]:
    """Which nodes to request and what to set, one sentence each.

    Args:
        outcomes: of every placement.
        leaner: the recipe's placement on fewer nodes, where that is quicker (`leaner_outcome`).
    """
    best = best_of(outcomes)
    if best is None:
        return ["Nothing fits: use ds_configs/zero3_offload.json, more GPUs, or a smaller model."]
    assert best.balanced is not None
    settings = [f"reference.placement={best.placement.name}"] if best.placement else []
    settings.append(f"model.activation_checkpointing={best.checkpointing}".lower())
    if len({device.name for device in rank_devices(best.trainers)}) > 1:
        settings.append("balance.mode=measured")
    if best.placement and best.placement.stored:
        settings.append("reference.cache=FOLDER")
    settings.append(f"batch.micro_size={max(max(sizes) for sizes in best.balanced.partition.micro_sizes)}")
    lines = [
        f"Take --set {' '.join(settings)}: {_duration(best.epoch_seconds)} an epoch, {best.gpu_hours:.3g} GPU hours."
    ]
    if leaner:
        lines.append(
            f"With the recipe's own placement, {_names(leaner.trainers)} alone would be quicker than all nodes: "
            f"{_duration(leaner.epoch_seconds)} an epoch, {leaner.gpu_hours:.3g} GPU hours."
        )
    if best.producers:
        lines.append(f"Train on {_names(best.trainers)}; stream the reference from {_names(best.producers)}.")
    idle = sum(1 for pairs in best.balanced.partition.pairs if not pairs)
    if idle:
        lines.append(
            f"{job.pairs} pairs leave {idle} GPUs without one: ask for fewer nodes, or raise batch.global_size "
            "and the learning rate with it."
        )
    if best.balanced.seconds - best.balanced.compute_seconds > 0.2 * best.balanced.seconds:
        lines.append(
            "The links hold up more than a fifth of the step: ds_configs/zero3_hierarchical.json gathers within nodes, "
            "and leaving out the nodes with the slowest network may be quicker."
        )
    return lines


def report(
    job: Job,
    groups: Sequence[NodeGroup],
    outcomes: Sequence[Outcome],
    shown: Outcome,
    leaner: Outcome | None = None,
    explained: Sequence[StepParts] = (),
) -> str:
    """The whole plan as text; `shown` is the recipe's own placement, whose memory and links are shown part by part.

    `explained` are the parts of a step on each kind of GPU.
    """
    flops = job.model.forward_flops() * job.rows_per_pair * job.passes * job.images
    gpus = sum(group.ranks for group in groups)
    lines = [
        f"{job.model.name}: {job.model.parameters / 1e9:.3g} B parameters, {job.model.codes} codes an image; "
        f"{job.images:,} images, {job.pairs} pairs a step, {job.steps:,} steps; {flops:.2g} FLOPs an epoch",
        f"{gpus} GPUs: {_names(groups)}",
        "",
        *_device_lines(groups),
        "",
        *_memory_lines(shown),
        "",
        *_placement_lines(outcomes, shown),
        "",
        *_link_lines(shown),
        *_drawing_lines(job, groups, shown),
        "",
        *([*explain_lines(explained), ""] if explained else []),
        "Recommendation",
        *(f"  {line}" for line in recommendation(job, outcomes, leaner)),
        "",
        COST_MODEL,
    ]
    return "\n".join(lines)


def as_json(
    job: Job,
    groups: Sequence[NodeGroup],
    outcomes: Sequence[Outcome],
    leaner: Outcome | None = None,
    explained: Sequence[StepParts] = (),
) -> str:
    """The whole plan as JSON: bytes, seconds, FLOPs."""
    tree = {
        "model": asdict(job.model) | {"forward_flops": job.model.forward_flops()},
        "nodes": [asdict(group) for group in groups],
        "pairs": job.pairs,
        "images": job.images,
        "steps": job.steps,
        "drawing": asdict(job.drawing) if job.drawing else None,
        "outcomes": [_outcome_tree(outcome) for outcome in outcomes],
        "recommendation": recommendation(job, outcomes, leaner),
    }
    if explained:
        tree["step_parts"] = [asdict(step) for step in explained]
    return json.dumps(tree, indent=1)


def _outcome_tree(outcome: Outcome) -> dict[str, Any]:
    tree: dict[str, Any] = {
        "placement": outcome.placement_name,
        "activation_checkpointing": outcome.checkpointing,
        "trainers": _names(outcome.trainers),
        "producers": _names(outcome.producers),
        "memory": {
            group.device.name: asdict(memory) | {"fixed": memory.fixed}
            for group, memory in zip(outcome.trainers, outcome.memories, strict=True)
        },
        "largest_micro": {g.device.name: cap for g, cap in zip(outcome.trainers, outcome.caps, strict=True)},
        "fits": outcome.balanced is not None,
    }
    if outcome.balanced:
        step = outcome.balanced
        tree |= {
            "pairs": pairs_by_device(outcome),
            "forwards": step.partition.forwards,
            "step_seconds": outcome.step_seconds,
            "drawing_seconds": outcome.drawing_seconds,
            "compute_seconds": step.compute_seconds,
            "link_seconds": step.link_seconds,
            "link_bytes": step.link_bytes,
            "epoch_seconds": outcome.epoch_seconds,
            "gpu_hours": outcome.gpu_hours,
            "efficiency": outcome.efficiency,
            "even_step_seconds": outcome.even_step_seconds if outcome.even else None,
            "even_efficiency": outcome.even_efficiency,
        }
    return tree


def _device_lines(groups: Sequence[NodeGroup]) -> list[str]:
    lines = ["GPU          memory  peak bf16  efficiency  GPU link  node link"]
    for device in dict.fromkeys(group.device for group in groups):
        lines.append(
            f"{device.name:<11} {device.memory_bytes / GIB:4.0f} GiB  {device.peak_flops / 1e12:4.0f} TF/s  "
            f"{device.efficiency:10.0%}  {device.gpu_link / 1e9:3.0f} GB/s  {device.node_link / 1e9:4.0f} GB/s"
        )
    return lines


def _memory_lines(shown: Outcome) -> list[str]:
    mode = "with" if shown.checkpointing else "without"
    lines = [f"Memory of a GPU, GiB: reference {shown.placement_name}, {mode} activation checkpointing"]
    parts = ("weights", "gradients", "optimizer", "buffers", "reference", "head", "reserved")
    lines.append("GPU         " + "".join(f"{part:>10}" for part in parts) + "  a pair  micro fits  micro used")
    used = _largest_used(shown)
    seen = set()
    for group, memory, cap in zip(shown.trainers, shown.memories, shown.caps, strict=True):
        if group.device.name in seen:
            continue
        seen.add(group.device.name)
        figures = "".join(f"{getattr(memory, part) / GIB:10.2f}" for part in parts)
        pair = memory.activations_per_pair / GIB
        lines.append(f"{group.device.name:<12}{figures}{pair:8.2f}{cap:12}{used.get(group.device.name, 0):12}")
    return lines


def _largest_used(outcome: Outcome) -> dict[str, int]:
    used: dict[str, int] = {}
    if outcome.balanced:
        devices = rank_devices(outcome.trainers)
        for device, sizes in zip(devices, outcome.balanced.partition.micro_sizes, strict=True):
            used[device.name] = max(used.get(device.name, 0), sizes[0])
    return used


def _placement_lines(outcomes: Sequence[Outcome], shown: Outcome) -> list[str]:
    lines = ["reference   checkpointing  forwards  step, s   even, s   epoch     GPU hours  share  even  pairs a GPU"]
    for outcome in outcomes:
        head = f"{outcome.placement_name:<11} {'on' if outcome.checkpointing else 'off':<14}"
        if not outcome.balanced:
            one_node = outcome.placement and outcome.placement.needs_producers and not outcome.producers
            lines.append(f"{head} {'needs two nodes' if one_node else 'does not fit'}")
            continue
        even = _seconds(outcome.even_step_seconds) if outcome.even else "no fit"
        pairs = ", ".join(
            f"{name} {low}" if low == high else f"{name} {low}-{high}"
            for name, (low, high) in pairs_by_device(outcome).items()
        )
        source = f"; produced by {_names(outcome.producers)}" if outcome.producers else ""
        mark = " *" if outcome is shown else ""
        lines.append(
            f"{head} {outcome.balanced.partition.forwards:8}  {_seconds(outcome.step_seconds):>7}  {even:>8}   "
            f"{_duration(outcome.epoch_seconds):<9} {outcome.gpu_hours:9.3g}  {outcome.efficiency:5.0%}  "
            f"{outcome.even_efficiency:4.0%}  {pairs}{source}{mark}"
        )
    return [*lines, "* the recipe's own; `even` is the step when every GPU takes the same share"]


def _link_lines(shown: Outcome) -> list[str]:
    if not shown.balanced:
        return ["Links: the recipe's placement does not fit"]
    step = shown.balanced
    groups = shown.trainers
    network = min(groups, key=lambda group: group.device.node_link).device
    return [
        f"Links of a step ({shown.placement_name}): every GPU receives {step.link_bytes / 1e9:.1f} GB over "
        f"{step.partition.forwards} forwards; {_seconds(step.link_seconds)} s of link beside "
        f"{_seconds(step.compute_seconds)} s of "
        f"computing; the slowest network is {network.name}'s, {network.node_link / 1e9:.0f} GB/s a node"
    ]


def _drawing_lines(job: Job, groups: Sequence[NodeGroup], shown: Outcome) -> list[str]:
    if job.drawing is None:
        return []
    streamed = job.drawing.online and bool(shown.producers)
    at_once = job.drawing.producers_at_once if streamed else job.drawing.at_once
    way = f"{at_once} at a time, in {job.model.decode_steps} forwards"
    if job.drawing.online:
        drawers, where = (shown.producers, "the producers") if streamed else (shown.trainers, "the trainers")
        seconds = _seconds(job.drawing_seconds(drawers, streamed)) if drawers else "-"
        return [f"Drawing: {job.pairs} images a step on {where}, {way}: {seconds} s of it, in the step above"]
    total = job.images * drawing_seconds(job.model, groups, job.drawing.at_once, job.element_bytes)
    hours = total * sum(group.ranks for group in groups) / 3600
    return [
        f"Drawing: {job.images:,} images once, {way}: {_duration(total)} on all GPUs, {hours:.3g} GPU hours, "
        "before training and not in the table"
    ]


def _names(groups: Sequence[NodeGroup]) -> str:
    return ", ".join(f"{group.nodes} x {group.device.name}:{group.gpus}" for group in groups) or "none"


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours:
        return f"{hours} h {minutes:02d}"
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.2g} s"


def _seconds(value: float) -> str:
    return f"{value:.3f}" if value >= 0.01 else f"{value:.1e}"
