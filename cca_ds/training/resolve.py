"""What a recipe leaves to the devices: activation checkpointing, the micro-batch, compiled blocks.

Decided once, the same on every rank, before a model is built; the trajectory does not depend on it.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from cca_ds.balance.measure import Workload
from cca_ds.balance.memory import USABLE_SHARE
from cca_ds.balance.partition import largest_micro
from cca_ds.cluster.devices import GIB
from cca_ds.config.schema import RunConfig

ENOUGH_PAIRS = 4  # a forward of fewer leaves a GPU's matmuls short of rows
MOST_PAIRS = 32  # a larger forward is not quicker
PAIRS_ON_CPU = 8
CAUTION = 0.9  # of the usable memory: the activations are computed by formula, not measured


def choose_compile(run: RunConfig, device: torch.device) -> tuple[RunConfig, list[str]]:
    """The recipe with `model.compile` true or false on this device, and a warning where "auto" became false on a GPU.

    Raises:
        ValueError: true, and the compiler does not work.
    """
    setting = run.model.compile
    if setting is False or (setting == "auto" and device.type != "cuda"):
        return _replaced(run, "model", compile=False), []
    problem = compiler_problem(device)
    if problem and setting is True:
        raise ValueError(f"model.compile=true: torch.compile does not work here ({problem}); set it to false")
    warning = f"warning: model.compile=auto: blocks run uncompiled, since torch.compile fails here: {problem}"
    return _replaced(run, "model", compile=problem is None), [warning] if problem else []


@lru_cache(maxsize=4)
def compiler_problem(device: torch.device) -> str | None:
    """Why torch.compile does not work on a device, in one line; None where it does. Takes seconds.

    It needs a C++ compiler, and on a GPU Triton and Python's headers.
    """
    try:
        torch.compile(lambda x: x.sin() + 1, fullgraph=True)(torch.zeros(8, device=device))
    except Exception as error:  # whatever the compiler's tools raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"{type(error).__name__}: {lines[0][:200] if lines else 'no reason given'}"
    return None


def choose_by_memory(
    run: RunConfig, workload: Workload, ranks: int, memory_bytes: float | None
) -> tuple[RunConfig, list[str]]:
    """The recipe with `model.activation_checkpointing` and `batch.micro_size` in the place of "auto".

    Activations are computed again only where they would not fit otherwise: for the micro-batch of the recipe, or of
    `ENOUGH_PAIRS` where that is left to the memory too.

    Args:
        run: the recipe.
        workload: what it computes.
        ranks: their number.
        memory_bytes: of the smallest GPU; None on CPUs, which never compute them again.

    Returns:
        The recipe, and a line for the log where something was chosen on a GPU.
    """
    own, size = run.model.activation_checkpointing, run.batch.micro_size
    share = -(-run.batch.global_size // ranks)  # pairs of a rank
    if own != "auto" and size != "auto":
        return run, []
    if memory_bytes is None:
        chosen = _replaced(run, "batch", micro_size=min(share, PAIRS_ON_CPU) if size == "auto" else size)
        return _replaced(chosen, "model", activation_checkpointing=own is True), []
    usable = memory_bytes * USABLE_SHARE * CAUTION
    most, enough = (min(MOST_PAIRS, share), min(ENOUGH_PAIRS, share)) if size == "auto" else (size, min(size, share))
    for again in (False, True) if own == "auto" else (own,):
        memory = workload.memory(ranks, again)
        fitting = largest_micro(usable, memory.fixed, memory.activations_per_pair)
        if fitting >= enough:
            break
    pairs = max(1, min(fitting, most)) if size == "auto" else size
    needed = memory.fixed + min(pairs, share) * memory.activations_per_pair
    chosen = _replaced(_replaced(run, "batch", micro_size=pairs), "model", activation_checkpointing=again)
    line = (
        f"activation checkpointing {'on' if again else 'off'}, at most {pairs} pairs a forward: about "
        f"{needed / GIB:.1f} GiB of the {usable / GIB:.1f} that the smallest GPU has for them"
    )
    return chosen, [line]


def smallest_memory(device: torch.device) -> float | None:
    """Bytes of the GPU with the least memory over all ranks; None where they are CPUs. Collective."""
    if device.type != "cuda":
        return None
    own = torch.tensor(torch.cuda.get_device_properties(device).total_memory, dtype=torch.int64, device=device)
    torch.distributed.all_reduce(own, op=torch.distributed.ReduceOp.MIN)
    return float(own)


def _replaced(run: RunConfig, section: str, **values: object) -> RunConfig:
    return run.model_copy(update={section: getattr(run, section).model_copy(update=values)})
