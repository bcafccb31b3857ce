"""Everything one run needs, built in the order in which it is needed, and the questions the loop asks of it.

Letters: K pairs of a global batch, W ranks.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor

from cca_ds.alignment.objective import SUMS, Objective, summarize
from cca_ds.balance.balancer import Balancer
from cca_ds.checkpoints import store
from cca_ds.checkpoints.deepspeed_state import Checkpoints
from cca_ds.cluster.launch import Ranks
from cca_ds.cluster.stop_signal import Stopped, StopSignal
from cca_ds.cluster.watchdog import Watchdog
from cca_ds.config.deepspeed_file import fill_ds_config, resolve_precision, zero_stage
from cca_ds.config.recipes import config_hash
from cca_ds.config.schema import RunConfig
from cca_ds.data.batches import MicroBatch, Steps, read_ahead
from cca_ds.reference.placements import make_reference
from cca_ds.training import schedule
from cca_ds.training.inputs import batch_plan, check_tokenizer, open_table, open_tokenizer, total_steps
from cca_ds.training.policy import NonFinite, Policy, starting_weights
from cca_ds.training.run_log import RunLog
from cca_ds.training.sample_grids import draw_samples
from cca_ds.training.utilization import Utilization


class Session:
    """One process of a run, from its checked configuration to its last checkpoint.

    Args:
        run: the recipe.
        ds: DeepSpeed's file as read.
        ranks: where this process stands.
        folder: the run's folder.
        resume: "auto", "never", or a checkpoint's folder.
        watchdog: told of every step.
    """

    def __init__(
        self,
        run: RunConfig,
        ds: dict[str, Any],
        ranks: Ranks,
        folder: Path,
        resume: str = "auto",
        watchdog: Watchdog | None = None,
    ):
        self.watchdog = watchdog
        self.run, self.ranks, self.folder = run, ranks, folder
        self.device = torch.device(ranks.device)
        self.precision = resolve_precision(ds, run, self.device.type == "cuda")
        self.stop = StopSignal()
        torch.manual_seed(run.seed + ranks.rank)
        self.objective = Objective(run.loss, run.model.lambda_conditioning)
        self.table = open_table(run, folder / "data")
        self.tokenizer = open_tokenizer(run)
        check_tokenizer(run, self.table, self.tokenizer)
        self.plan = batch_plan(run, self.table)
        self.steps_per_epoch = self.plan.steps_per_epoch(len(self.table))
        self.steps = total_steps(run, self.steps_per_epoch)
        self.balancer = Balancer(run, ds, ranks, self.precision, self.tokenizer)
        self.cut = self.balancer.cut
        self._build(run, ds, resume)
        self.log = RunLog(
            folder,
            ranks.rank == 0,
            self.steps,
            self.first_step,
            run.logging.tensorboard,
            run.logging.progress,
        )
        self.utilization = Utilization(run, ranks)
        self._step_started = time.perf_counter()

    def _build(self, run: RunConfig, ds: dict[str, Any], resume: str) -> None:
        metadata = {"config": config_hash(run), "stage": zero_stage(ds), "precision": self.precision}
        self.checkpoints = Checkpoints(self.folder / "checkpoints", self.ranks, run.checkpoint, metadata)
        origin = self._checkpoint_to_resume(resume)
        filled = fill_ds_config(
            ds,
            run,
            world_size=self.ranks.world_size,
            forwards=self.cut.forwards,
            micro_size=max(max(sizes) for sizes in self.cut.micro_sizes),
            precision=self.precision,
        )
        if origin and self.checkpoints.prepare(origin):
            filled["checkpoint"] = {**filled.get("checkpoint", {}), "load_universal": True}
        needed = self.ranks.rank == 0 or metadata["stage"] < 3  # sharded weights are handed out by rank 0
        weights = starting_weights(run, run.model.weights, self.tokenizer) if needed else None
        self._beat("building the policy")
        self.policy = Policy(run, filled, weights, self.tokenizer)
        self._beat("building the reference")
        self.balancer.slow(self.policy.module)
        self.reference = make_reference(self) if self.objective.contrastive else None
        self.first_step = 0
        self._beat("reading the checkpoint")
        if origin:
            self.checkpoints.restore(self.policy, origin)
            self.first_step = store.read_manifest(origin).step

    def _checkpoint_to_resume(self, resume: str) -> Path | None:
        """The same answer on every rank: rank 0 looks and tells."""
        answer: list[Path | None] = [None]
        if self.ranks.rank == 0:
            self.checkpoints.clean()
        if self.ranks.rank == 0 and resume != "never":
            if resume == "auto":
                found = store.newest_verified(self.checkpoints.root)
                answer = [found[0] if found else None]
            else:
                store.verify(Path(resume))
                answer = [Path(resume)]
        deepspeed.comm.broadcast_object_list(answer, src=0)
        return answer[0]

    def batches(self) -> Iterator[tuple[int, list[MicroBatch]]]:
        """(step, this rank's micro-batches) from the first step not yet done.

        Where the recipe has the ranks measured again, this happens between two steps, and the rest is read anew.
        """
        step = self.first_step
        while step < self.steps:
            end = next((s for s in range(step + 1, self.steps) if self.balancer.due(s)), self.steps)
            yield from self._read_ahead(range(step, end))
            step = end
            if step < self.steps:
                self._rebalance(step)

    def _read_ahead(self, order: range) -> Iterator[tuple[int, list[MicroBatch]]]:
        first = self.cut.positions(self.ranks.rank)[0].start
        steps = Steps(self.table, self.plan, first, list(self.cut.micro_sizes[self.ranks.rank]))
        data = self.run.data
        return read_ahead(steps, order, data.workers, data.prefetch, pin_memory=self.device.type == "cuda")

    def _rebalance(self, step: int) -> None:
        """Measure the ranks again and cut by what they are now; collective."""
        if self.watchdog:
            self.watchdog.beat(step, "measuring the ranks")
        self.cut = self.balancer.measure_again()
        self.log.say(f"balance after step {step}: {self.balancer.describe()}")

    def reference_logp(self, batch: MicroBatch, inputs: tuple[Tensor, ...]) -> Tensor | None:
        """log p_reference of the forward's rows, [2B] float32; None for maximum likelihood."""
        return self.reference(batch, inputs) if self.reference is not None else None

    def _beat(self, doing: str) -> None:
        """A start of many minutes is progress too."""
        if self.watchdog:
            self.watchdog.beat(0, doing)

    def agree_while_waiting(self, step: int, missing: bool, late: bool) -> tuple[bool, bool]:
        """Whether any rank misses what it waits for from other nodes, and any has waited too long; collective.

        Tells the watchdog that this rank is well.

        Raises:
            Stopped: on every rank, where something is missing and any rank was asked to stop.
        """
        if self.watchdog:
            self.watchdog.beat(step, "waiting for the reference")
        flags = torch.tensor([missing, late, self.stop.requested], dtype=torch.float32, device=self.device)
        deepspeed.comm.all_reduce(flags)
        missing, late, stop = (flags > 0).tolist()
        if missing and stop:
            raise Stopped(step)
        return missing, late

    def zero_sums(self) -> Tensor:
        """An empty account of `SUMS`."""
        return torch.zeros(len(SUMS), dtype=torch.float64, device=self.device)

    def sum_over_ranks(self, sums: Tensor) -> tuple[Tensor, bool]:
        """`SUMS` of the global batch, and whether any rank was asked to stop: one all-reduce for both."""
        both = torch.cat([sums, sums.new_tensor([float(self.stop.requested)])])
        deepspeed.comm.all_reduce(both)
        return both[:-1], bool(both[-1] > 0)

    def require_finite(self, step: int, sums: Tensor, batches: list[MicroBatch], logps: list[Tensor]) -> None:
        """Stop before the optimizer step where the loss is not finite, naming the step, rank and samples.

        Raises:
            NonFinite: on every rank.
        """
        if math.isfinite(float(sums[SUMS.index("loss")])):
            return
        found = []
        for batch, logp in zip(batches, logps, strict=True):
            bad = ~logp.detach().view(-1, len(batch.codes_BL)).isfinite().all(dim=0)
            found += batch.sample_indices_B[bad.cpu()].tolist()
        everyone: list[Any] = [None] * self.ranks.world_size
        torch.distributed.all_gather_object(everyone, (self.ranks.rank, self.ranks.host, found[:8]))
        named = "; ".join(
            f"rank {rank} ({host}): samples {samples}" for rank, host, samples in everyone if samples
        )
        raise NonFinite(
            f"step {step + 1}: the loss is not finite ({named or 'by the loss itself'}); the optimizer has not "
            "stepped; look at these samples, or lower optimizer.learning_rate or loss.beta"
        )

    def optimizer_step(self, step: int) -> dict[str, float]:
        """Set rate and decay of step `step`, clip, and step. Returns what is logged of it.

        As in DeepSpeed, a step that the loss scaler skips (fp16) counts as a step and leaves the schedules where they
        were.
        """
        run, scale = self.run, self.policy.loss_scale
        taken = step - self.policy.skipped_steps
        rate = schedule.learning_rate(taken, self.steps, self.steps_per_epoch, run.optimizer, run.schedule)
        decay = schedule.weight_decay(taken, self.steps, run.optimizer)
        try:
            norm = self.policy.step(rate, decay)
        except NonFinite as error:
            raise NonFinite(f"step {step + 1}: {error}; the optimizer has not stepped; resume from the last checkpoint "
                            "with a lower optimizer.learning_rate") from None  # fmt: skip
        values = {"lr": rate} if norm is None else {"lr": rate, "grad_norm": norm}
        if scale is None:
            return values
        scale_now, skipped = self.policy.loss_scale, self.policy.skipped_steps
        if norm is None:
            self.log.say(
                f"WARNING: step {step + 1} was skipped: its gradient overflowed in fp16 at loss scale {scale:.10g}; "
                f"loss scale now {scale_now:.10g}, {skipped} step(s) skipped so far"
            )
        return values | {"loss_scale": scale_now, "skipped_steps": float(skipped)}

    def report(self, done: int, sums: Tensor, extra: dict[str, float]) -> None:
        """Log step number `done` (1 after the first), averaged over the whole global batch."""
        now = time.perf_counter()
        seconds, self._step_started = now - self._step_started, now
        values = summarize(sums, self.objective.contrastive) | extra
        values["throughput/images_per_second"] = self.run.batch.global_size / seconds
        values |= self.utilization.tags(self.run.batch.global_size, seconds)
        values["memory/peak_gib"] = peak_memory(self.device) / 2**30
        if self.watchdog:
            self.watchdog.beat(done)
        self.log.step(done, values, write=done % self.run.logging.every_steps == 0 or done == self.steps)
        self.last_values = values

    def samples_due(self, done: int) -> bool:
        """Whether a grid is to be drawn after step number `done`."""
        every = self.run.logging.sample_every_steps
        return bool(every) and (done % every == 0 or done == self.steps)

    def draw_samples(self, done: int) -> None:
        """A grid of samples of the policy as it stands; collective."""
        if self.run.logging.sample_every_steps:
            draw_samples(self, done)

    def save(self, done: int, wait: bool = False) -> None:
        """Checkpoint after step number `done`, complete on return if `wait`; collective."""
        self.checkpoints.save(self.policy, done, wait)

    def stop_within_step(self, done: int) -> None:
        """Stop before step number `done` + 1 was computed, with the checkpoint of `done`; collective."""
        if done:
            self.checkpoints.ensure(self.policy, done)
        self.say_stopped(done)

    def say_stopped(self, done: int) -> None:
        """The last line of a run that a signal ended early, its checkpoint complete."""
        self.log.say(
            f"stopped by a signal after step {done}: checkpoint saved, start again to continue"
            if done
            else "stopped by a signal before the first step was done: start again to begin"
        )

    def close(self) -> None:
        """The end of a run that went well; collective."""
        self.checkpoints.close()
        self.log.close()
        if self.watchdog:
            self.watchdog.close()


def peak_memory(device: torch.device) -> int:
    """Most bytes this rank has held: on the GPU, or in the process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
