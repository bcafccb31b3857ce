"""The parts of one GPU's step: operations, bytes, and the seconds that follow from both at rates that kernels reach.

The parts of a GPU's own work run one after another. Links and host work beside it and count where they take longer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cca_ds.cluster.devices import Device
from cca_ds.models.cost import ModelCost
from cca_ds.planning.job import Job
from cca_ds.planning.nodes import NodeGroup
from cca_ds.planning.step_time import OPTIMIZER_BYTES, gathers_a_step, links_of, pass_links
from cca_ds.reference.placements import Placement

# shares of a device's figures, as large kernels reach them: 720 of an H200's 989 TFLOP/s, 4.3 of its 4.8 TB/s
MATMUL_SHARE, ATTENTION_SHARE, BANDWIDTH_SHARE = 0.73, 0.35, 0.9
KERNELS = {"eager": 40, "compiled": 16}  # of a block's forward; its backward has twice as many
LAUNCH_SECONDS, GATHER_SECONDS = 5e-6, 3e-4  # of the host: for a kernel, and for a block's gather and release


@dataclass(frozen=True)
class Part:
    """Operations, bytes of the GPU's memory (of the link for gathers), and seconds of one part of a step.

    `beside` marks what runs beside the GPU's own work.
    """

    name: str
    flops: float
    bytes: float
    seconds: float
    beside: bool = False


@dataclass(frozen=True)
class StepParts:
    """All parts of a step, its seconds, and the MFU that they make."""

    device: str
    pairs: int
    parts: list[Part]
    seconds: float
    mfu: float


def step_parts(
    job: Job,
    groups: Sequence[NodeGroup],
    device: Device,
    pairs: int,
    forwards: int,
    placement: Placement | None,
    checkpointing: bool,
    compiled: bool,
) -> StepParts:
    """A step of `pairs` pairs in `forwards` forwards on one GPU of an allocation.

    Args:
        groups: the whole allocation, whose links the gathers use.
        compiled: blocks are compiled (`model.compile`).
    """
    model, ranks = job.model, sum(group.ranks for group in groups)
    codes = pairs * job.rows_per_pair * model.codes
    moved = model.compiled_bytes if compiled else model.eager_bytes
    again = int(checkpointing)
    referenced, extra = int(placement is not None and placement.on_trainers), job.extra_forwards
    block_flops = _block_flops(model) * codes
    attention = 4 * model.codes * model.width * model.layers * codes
    head_flops = 2 * model.vocabulary * model.width * codes

    def timed(name: str, flops: float, share: float, byte_count: float) -> Part:
        seconds = flops / (device.peak_flops * share) + byte_count / (device.memory_bandwidth * BANDWIDTH_SHARE)
        return Part(name, flops, byte_count, seconds)

    layers_moved = [model.layers * part * codes for part in moved]
    # float32 logits are written and read, onehot - softmax is written; without gradients only the former
    logit_bytes = model.vocabulary * codes
    own = [
        timed("matmuls of the blocks", 3 * block_flops, MATMUL_SHARE, 0.0),
        timed("attention", 3 * attention, ATTENTION_SHARE, 0.0),
        timed("element-wise", 0.0, 1.0, sum(layers_moved)),
        timed("head", 3 * head_flops, MATMUL_SHARE, 10 * logit_bytes),
        timed("recomputation", again * (block_flops + attention), MATMUL_SHARE, again * layers_moved[0]),
        timed(
            "reference", referenced * (block_flops + attention + head_flops), MATMUL_SHARE,
            referenced * (layers_moved[0] + 8 * logit_bytes),
        ),
        timed(
            "forwards without gradient", extra * (block_flops + attention + head_flops), MATMUL_SHARE,
            extra * (layers_moved[0] + 8 * logit_bytes),
        ),
        timed("optimizer", 0.0, 1.0, OPTIMIZER_BYTES * model.parameters / (ranks if job.sharding.stage else 1)),
    ]  # fmt: skip
    links = links_of(groups, model, job.sharding)
    link = forwards * sum(pass_links(links, job.sharding, placement)) + links.far * gathers_a_step(job.sharding)
    exchanges = link / links.far if links.far else 0.0
    passes = forwards * (1 + referenced + extra + 2 + again)  # in forwards; a backward has two forwards' kernels
    kernels = KERNELS["compiled" if compiled else "eager"] * model.layers * passes
    gathered = 2 + extra + int(bool(placement and placement.sharded))  # times a forward that a block's weights are
    gathers = model.layers * forwards * gathered if job.sharding.stage == 3 else 0
    beside = [
        Part("gathers and scatters", 0.0, exchanges * links.far_bytes, link, beside=True),
        Part("host", 0.0, 0.0, kernels * LAUNCH_SECONDS + gathers * GATHER_SECONDS, beside=True),
    ]
    seconds = max(sum(part.seconds for part in own), *(part.seconds for part in beside))
    useful = pairs * job.rows_per_pair * (3 + referenced + extra) * model.forward_flops()
    return StepParts(device.name, pairs, own + beside, seconds, useful / (seconds * device.peak_flops))


def _block_flops(model: ModelCost) -> float:
    """Operations of all blocks' matmuls for one code: 2 a weight; those that an image uses once are spread over it."""
    blocks = model.token_weights - model.vocabulary * model.width
    return 2 * (blocks + model.image_weights / model.codes)


def explain_lines(steps: Sequence[StepParts]) -> list[str]:
    """A table for each GPU."""
    lines = []
    for step in steps:
        lines += [
            f"A step of {step.pairs} pairs on {step.device}: {step.seconds:.3f} s, MFU {step.mfu:.0%}",
            f"  {'part':<24}{'TFLOP':>10}{'GB':>10}{'seconds':>10}{'share':>8}",
        ]
        for part in step.parts:
            shown = f"  {part.name:<24}{part.flops / 1e12:10.1f}{part.bytes / 1e9:10.1f}{part.seconds:10.4f}"
            lines.append(shown + (f"{'beside':>8}" if part.beside else f"{part.seconds / step.seconds:8.0%}"))
        lines.append("")
    return [
        *lines,
        f"Rates: {MATMUL_SHARE:.0%} of the peak in matmuls, {ATTENTION_SHARE:.0%} in attention, {BANDWIDTH_SHARE:.0%} "
        "of the memory's bandwidth; the plan itself takes the stated efficiency instead.",
    ]
