"""A checkpoint in DeepSpeed's universal form, into a policy at a ZeRO stage that DeepSpeed itself does not read it at.

The form holds one folder per parameter with its whole fp32 weight and moments of AdamW. DeepSpeed looks for the file
of the module's state that its own stage would have written, and finds none where another stage wrote it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from cca_ds.checkpoints.errors import CheckpointError
from cca_ds.training.policy import Policy, copy_weights

MOMENTS = ("exp_avg", "exp_avg_sq")


@torch.no_grad()
def load_universal(policy: Policy, folder: Path, step: int) -> None:
    """Weights and moments of all trained parameters after `step` optimizer steps; collective.

    Raises:
        CheckpointError: a parameter that the checkpoint lacks or holds in another size.
    """
    _make_moments(policy, step)
    for name, parameter in policy.module.named_parameters():
        if parameter.requires_grad:
            shape = getattr(parameter, "ds_shape", parameter.shape)
            whole = {key: _read(folder, name, key, shape) for key in ("fp32", *MOMENTS)}
            _put(policy, parameter, whole)


def _read(folder: Path, name: str, key: str, shape: torch.Size) -> Tensor:
    """One whole tensor, in float32; the form stores it flat, or with how it was cut."""
    try:
        found = torch.load(folder / "zero" / name / f"{key}.pt", map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {folder}: holds no {name}; it is another model's") from None
    found = found["param"] if isinstance(found, dict) else found
    if found.numel() != shape.numel():
        raise CheckpointError(
            f"checkpoint {folder}: {name} has {found.numel()} elements, not {shape.numel()}"
        )
    return found.float().view(shape)


def _make_moments(policy: Policy, step: int) -> None:
    """The optimizer's states, which AdamW makes at its first step only, with their count of steps."""
    inner = getattr(policy.optimizer, "optimizer", policy.optimizer)
    if policy.stage == 3:
        flats = policy.optimizer.fp32_partitioned_groups_flat
    else:
        flats = [flat for group in inner.param_groups for flat in group["params"]]
    if isinstance(inner, torch.optim.AdamW):
        count = lambda: torch.tensor(float(step))  # noqa: E731 - each its own: AdamW adds to it in place
    else:  # DeepSpeed's own count in integers, by state or by group
        count = lambda: step  # noqa: E731
        for group in inner.param_groups:
            group["step"] = step
    for flat in flats:
        inner.state[flat] = {"step": count(), **{key: torch.zeros_like(flat) for key in MOMENTS}}
    if policy.stage in (1, 2):
        policy.optimizer._lazy_init_hp_params_optimizer_state()  # parameters learn where their moments are


def _put(policy: Policy, parameter: nn.Parameter, whole: dict[str, Tensor]) -> None:
    device = policy.engine.device
    copy_weights(_Holder(parameter), {"parameter": whole["fp32"]})
    if policy.stage == 0:
        for key in MOMENTS:
            policy.optimizer.state[parameter][key].copy_(whole[key])
    elif policy.stage < 3:
        safe_set_full_fp32_param(parameter, whole["fp32"].to(device))
        for key in MOMENTS:
            safe_set_full_optimizer_state(parameter, whole[key].to(device), key)
    else:
        safe_set_local_fp32_param(parameter, _own_part(parameter, whole["fp32"]))
        for key in MOMENTS:
            safe_set_local_optimizer_state(parameter, _own_part(parameter, whole[key]), key)


class _Holder(nn.Module):
    """A module of one parameter."""

    def __init__(self, parameter: nn.Parameter):
        super().__init__()
        self.parameter = parameter


def _own_part(parameter: nn.Parameter, whole: Tensor) -> Tensor:
    """What stage 3 keeps on this rank: an equal share of the flat tensor, filled up with zeros at its end."""
    local = safe_get_local_fp32_param(parameter)
    first = torch.distributed.get_rank() * local.numel()
    part = whole.flatten()[first : first + local.numel()]
    return nn.functional.pad(part, (0, local.numel() - part.numel())).view_as(local).to(local.device)
