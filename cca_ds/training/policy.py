"""The policy under DeepSpeed: sharded by ZeRO, stepped by AdamW.

Letters: B rows of a forward, L codes per image, W ranks, K pairs of a global batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_local_fp32_param,
    safe_set_full_fp32_param,
    safe_set_local_fp32_param,
)
from torch import Tensor, nn

from cca_ds.cluster.zero import broadcast_weight, copy_weights, full_shape, gather_whole_blocks, padded_shard
from cca_ds.config import schema
from cca_ds.models.from_recipe import build_module
from cca_ds.training.ema import EMA

_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class NonFinite(RuntimeError):
    """A loss or gradient that is not finite; the optimizer has not stepped."""


class Policy:
    """The model that is trained, wrapped by `deepspeed.initialize`. Collective to build.

    Args:
        model, optimizer: sections of the recipe.
        ds_config: DeepSpeed's configuration with every "auto" filled.
        weights: full float32 state dict on rank 0, None elsewhere.
        global_size: pairs of a global batch, K.
        device: this rank's.
        tokenizer: for models that hold its codebook (VAR).
    """

    def __init__(self, model: schema.Model, optimizer: schema.Optimizer, ds_config: dict[str, Any],
                 weights: dict[str, Tensor] | None, global_size: int, device: torch.device,
                 tokenizer: nn.Module | None = None):  # fmt: skip
        self.stage = ds_config.get("zero_optimization", {}).get("stage", 0)
        self.world_size, self.global_size = deepspeed.comm.get_world_size(), global_size
        with deepspeed.zero.Init(config_dict_or_path=ds_config, enabled=self.stage == 3):
            module = build_module(model, tokenizer)
        copy_weights(module, weights, device)
        if self.stage == 3:
            gather_whole_blocks(module)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=module, model_parameters=_parameter_groups(module, optimizer), config=ds_config
        )
        self.module: nn.Module = self.engine.module
        if self.engine.bfloat16_enabled() or self.engine.fp16_enabled():
            self._set_master_weights(weights)
        self._decays = [group["decays"] for group in self.optimizer.param_groups]
        self.engine.train()
        self.ema = EMA(self.module, model.ema_decay, self.stage) if model.ema_decay is not None else None

    @torch.no_grad()
    def _set_master_weights(self, weights: dict[str, Tensor] | None) -> None:
        """DeepSpeed makes fp32 master weights of the rounded parameters; replace them by the file's own values."""
        rank = deepspeed.comm.get_rank()
        for name, parameter in self.module.named_parameters():
            full = broadcast_weight(weights, name, full_shape(parameter), self.engine.device)
            if self.stage < 3:
                safe_set_full_fp32_param(parameter, full)
            else:
                local = safe_get_local_fp32_param(parameter)
                safe_set_local_fp32_param(parameter, padded_shard(full, local, rank))

    def __call__(self, *inputs: Tensor, compute: Callable[..., Tensor] | None = None) -> Tensor:
        """log p [B] float32 of codes [B, L] under labels [B], or what `compute` does of them, with gradient."""
        return self.engine(*inputs, compute=compute)

    def backward(self, loss_sum: Tensor) -> None:
        """Add the gradient of a micro-batch, given its loss summed over pairs.

        DeepSpeed averages over ranks; times W / K the average is the mean over the global batch, however it is cut.
        """
        self.engine.backward(loss_sum * (self.world_size / self.global_size), scale_wrt_gas=False)
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()  # only counts the forward, which is how DeepSpeed knows the step's last one

    def step(self, learning_rate: float, weight_decay: float) -> float | None:
        """Clip the gradients, step, and clear them.

        Returns:
            The gradient norm before clipping; None where DeepSpeed's dynamic loss scaler skipped the step (fp16), which
            changed its scale and nothing else.

        Raises:
            NonFinite: the gradient is not finite, and there is no lower loss scale to try; nothing was changed.
        """
        for group, decays in zip(self.optimizer.param_groups, self._decays, strict=True):
            group["lr"] = learning_rate
            group["weight_decay"] = weight_decay if decays else 0.0
        norm = self._stage_0_gradient_norm() if self.stage == 0 else None
        scale = self.loss_scale
        if not self._step_engine(scale):
            return None
        if self.ema is not None:
            self.ema.update()
        norm = float(self.engine.get_global_grad_norm() if norm is None else norm)
        # stage 3 divides by the next step's scale, which may have grown just now
        return norm * self.loss_scale / scale if scale is not None and self.stage == 3 else norm

    def _step_engine(self, scale: float | None) -> bool:
        """False where a dynamic loss scaler, now at `scale`, skipped the step."""
        dynamic = scale is not None and self.optimizer.dynamic_loss_scale
        try:
            self.engine.step()
        except Exception as error:
            # a scaler that is at its lowest scale raises a bare Exception
            lowest = dynamic and self.optimizer.overflow and scale <= self.optimizer.loss_scaler.min_scale
            if not lowest:
                raise
            raise NonFinite(
                f"the gradient is not finite at the lowest loss scale, {scale:.10g} (fp16.min_loss_scale)"
            ) from error
        if self.engine.was_step_applied() or dynamic:
            return self.engine.was_step_applied()
        fixed = f" at the fixed loss scale {scale:.10g} (fp16.loss_scale)" if scale is not None else ""
        raise NonFinite(f"the gradient is not finite{fixed}")  # ZeRO skips the step

    @property
    def loss_scale(self) -> float | None:
        """The factor of the next loss in fp16; None in another precision."""
        return float(self.optimizer.loss_scale) if self.engine.fp16_enabled() else None

    @property
    def skipped_steps(self) -> int:
        """Steps of the run that the loss scaler has skipped, those before a resumption included."""
        return self.engine.skipped_steps

    def scaling(self) -> dict[str, Any]:
        """Skipped steps and the loss scaler's state in fp16, for a checkpoint's manifest; else empty."""
        if self.loss_scale is None:
            return {}
        scaler = vars(self.optimizer.loss_scaler)
        return {
            "skipped_steps": self.skipped_steps,
            "loss_scaler": {name: scaler[name] for name in _SCALER_STATE if name in scaler},
        }

    def repair_universal_state(self) -> None:
        """Give each AdamW state a step counter of its own: a universal checkpoint makes all groups share one.

        torch's AdamW adds to it in place, once for every group that holds it.
        """
        for state in self.optimizer.optimizer.state.values():
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].clone()

    def _stage_0_gradient_norm(self) -> float:
        """The norm, checked to be finite: at stage 0 DeepSpeed steps without checking."""
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0
        if not torch.isfinite(torch.tensor(norm)):
            raise NonFinite("the gradient is not finite")
        return norm

    def full_weights(self) -> Iterator[tuple[str, Tensor | None]]:
        """(name, fp32 tensor on the CPU) of every parameter, gathered one at a time; None on ranks above 0.

        Collective: every rank has to run it to the end.
        """
        on_rank_0 = deepspeed.comm.get_rank() == 0
        for name, parameter in self.module.named_parameters():
            full = safe_get_full_fp32_param(parameter) if self.stage > 0 else None
            full = parameter.detach() if full is None else full
            yield name, full.float().cpu().reshape(full_shape(parameter)).clone() if on_rank_0 else None


def _parameter_groups(module: nn.Module, settings: schema.Optimizer) -> list[dict[str, Any]]:
    """Matrices decay; vectors, biases and the names of `no_decay` do not."""
    decaying, plain = [], []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        spared = name.endswith("bias") or any(part in name for part in settings.no_decay)
        (plain if len(full_shape(parameter)) < 2 or spared else decaying).append(parameter)
    groups = [
        {"params": decaying, "weight_decay": settings.weight_decay, "decays": True},
        {"params": plain, "weight_decay": 0.0, "decays": False},
    ]
    return [group for group in groups if group["params"]]
