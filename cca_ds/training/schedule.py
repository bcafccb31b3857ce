"""Learning rate and weight decay as functions of the step, so that a resumed run needs no schedule state."""

from __future__ import annotations

import math

from cca_ds.config.schema import Optimizer, Schedule


def learning_rate(step: int, steps: int, steps_per_epoch: int, optimizer: Optimizer, schedule: Schedule) -> float:
    """Rate of step `step` of `steps`, both counted in optimizer steps from 0.

    A warm-up that rises linearly from `warmup_start` of the peak, then `hold` of what is left at the peak,
    then the named way down to `final_fraction` at the last step (VAR: utils/lr_control.py, "lin0" with hold 0.05).
    """
    peak = optimizer.learning_rate
    warmup = round(schedule.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return peak * (schedule.warmup_start + (1 - schedule.warmup_start) * step / warmup)
    passed = (step - warmup) / max(steps - 1 - warmup, 1)
    if schedule.name == "constant" or passed < schedule.hold:
        return peak
    left = max(1 - passed, 0.0) / (1 - schedule.hold)
    if schedule.name == "cosine":
        left = 0.5 - 0.5 * math.cos(math.pi * left)
    return peak * (schedule.final_fraction + (1 - schedule.final_fraction) * left)


def weight_decay(step: int, steps: int, optimizer: Optimizer) -> float:
    """Half a cosine from `weight_decay` to `final_weight_decay` (VAR: utils/lr_control.py), if any."""
    start, end = optimizer.weight_decay, optimizer.final_weight_decay
    if end is None:
        return start
    passed = step / max(steps - 1, 1)
    return end + (start - end) * (0.5 + 0.5 * math.cos(math.pi * passed))
