"""How far a run is: its step, the values of the last one, and the log they go to."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path

import torch
from torch import Tensor

from cca_ds.alignment.losses import LossSpec
from cca_ds.alignment.objective import summarize
from cca_ds.cluster.job_state import note_end
from cca_ds.training.accuracy_band import AVERAGE, AccuracyBand
from cca_ds.training.run_log import RunLog, logged_lines
from cca_ds.training.utilization import Utilization


class Progress:
    """Steps done and what is logged of them.

    Args:
        first_step: steps done before this process started, by the checkpoint that it resumes from.
        steps: of the whole run.
        log: of the run; writes on rank 0.
        last_values: tags of the last step done, of an earlier process where this one has done none.
        global_size: pairs of a step.
        utilization: MFU of a step.
        device: this rank's.
        log_every: steps between two lines of metrics.
        accuracy_band: ends the run.

    Attributes:
        end: the run's last step.
    """

    def __init__(self, first_step: int, steps: int, log: RunLog, last_values: dict[str, float], global_size: int,
                 utilization: Utilization, device: torch.device, log_every: int,
                 accuracy_band: AccuracyBand):  # fmt: skip
        self.step, self.first_step, self.end = first_step, first_step, steps
        self.accuracy_band = accuracy_band
        self.log, self.last_values = log, last_values
        self.global_size, self.utilization, self.device, self.log_every = (
            global_size, utilization, device, log_every,
        )  # fmt: skip
        self._end_outside_band()  # a run that ended so may have been killed before it was marked
        self._step_started = time.perf_counter()

    def record(self, sums: Tensor, tags: dict[str, float], spec: LossSpec) -> int:
        """Count a step as done and log it.

        Args:
            sums: `SUMS` of the global batch.
            tags: of the optimizer step and of the reference.
            spec: of the loss.

        Returns:
            The number of steps done.
        """
        self.step += 1
        now = time.perf_counter()
        seconds, self._step_started = now - self._step_started, now
        values = summarize(sums, spec) | tags
        values["throughput/images_per_second"] = self.global_size / seconds
        values |= self.utilization.tags(self.global_size, seconds)
        values["memory/peak_gib"] = peak_memory(self.device) / 2**30
        values |= self.accuracy_band.update(values)
        self._end_outside_band()
        self.log.step(self.step, values, write=self.step % self.log_every == 0 or self.step == self.end)
        self.last_values = values
        return self.step

    def _end_outside_band(self) -> None:
        """Make this step the run's last where the average accuracy has left its band."""
        if self.accuracy_band.left and self.step < self.end:
            assert self.accuracy_band.bounds is not None
            low, high = self.accuracy_band.bounds
            self.end = self.step
            self.log.say(
                f"the run ends after step {self.step}: {AVERAGE} is {self.accuracy_band.average:.3f} and has left "
                f"loss.accuracy_band=[{low:g}, {high:g}]"
            )

    def say_stopped(self) -> None:
        """The last line of a run that a signal ended early; its checkpoint is complete."""
        line = (
            f"stopped by a signal after step {self.step}: checkpoint saved, start again to continue"
            if self.step
            else "stopped by a signal before the first step was done: start again to begin"
        )
        note_end(0, line)
        self.log.say(line)


def last_logged_values(metrics: Path, step: int) -> dict[str, float]:
    """Tags of the last line of metrics.jsonl up to `step`; empty where there is none."""
    lines = logged_lines(metrics, step)
    last = json.loads(lines[-1]) if lines else {}
    return {tag: value for tag, value in last.items() if tag not in ("step", "time")}


def peak_memory(device: torch.device) -> int:
    """Most bytes this rank has held: on the GPU, or in the process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
