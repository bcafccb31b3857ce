"""From a checked configuration to a finished run: ranks, folder, inputs, engines, baseline, loop, summary."""

from __future__ import annotations

import collections
import datetime
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

import cca_ds
from cca_ds.alignment.objective import Objective
from cca_ds.balance.balancer import Balancer
from cca_ds.checkpoints.deepspeed_state import Checkpoints
from cca_ds.checkpoints.errors import CheckpointError
from cca_ds.checkpoints.load_model import starting_weights
from cca_ds.checkpoints.store import read_manifest
from cca_ds.cluster.collectives import barrier, on_first
from cca_ds.cluster.coordination import Coordinator
from cca_ds.cluster.failures import lost_connection
from cca_ds.cluster.launch import Ranks
from cca_ds.cluster.preflight import check_ranks
from cca_ds.cluster.rank_logs import keep_rank_log
from cca_ds.cluster.ranked import run_on_ranks
from cca_ds.cluster.stop_signal import Stopped, StopSignal
from cca_ds.cluster.watchdog import Watchdog
from cca_ds.config.deepspeed_file import fill_ds_config, resolve_precision, zero_stage
from cca_ds.config.recipes import config_hash, dump_recipe, trajectory_settings
from cca_ds.config.schema import RunConfig
from cca_ds.data.batches import MicroBatch
from cca_ds.data.generated import ONLINE, require_drawn_by
from cca_ds.data.manifest import fewer_classes_note, write_class_names
from cca_ds.files import expand
from cca_ds.folder_lock import FolderLock
from cca_ds.likelihood import backend
from cca_ds.models.conditioning import CONDITIONINGS
from cca_ds.models.from_recipe import build_module
from cca_ds.models.weight_files import state_hash
from cca_ds.reference.cache import ReferenceCacheError, open_cache
from cca_ds.reference.interface import Reference, ReferenceInputs
from cca_ds.reference.placements import PLACEMENTS
from cca_ds.reference.producer import fill_cache
from cca_ds.reference.replica import ReplicaReference, reference_model
from cca_ds.training import run_folder
from cca_ds.training.accuracy_band import AccuracyBand
from cca_ds.training.baseline import check_baseline
from cca_ds.training.checks import require_base
from cca_ds.training.engines import Engines, OptimizerSteps
from cca_ds.training.inputs import RunInputs, open_inputs, verify_once, weights_hashes
from cca_ds.training.policy import Policy
from cca_ds.training.profiler import compute_deterministically, memory_history, profiled
from cca_ds.training.progress import Progress, last_logged_values
from cca_ds.training.reader import BatchReader
from cca_ds.training.resolve import choose_by_memory, choose_compile, smallest_memory
from cca_ds.training.run_log import RunLog
from cca_ds.training.sample_grids import SampleGrids
from cca_ds.training.utilization import Utilization
from cca_ds.training.workload import trained_flops, workload_of
from cca_ds.untrusted import decoding

# sections whose values TensorBoard's table of runs shows
_COMPARED = ("model", "loss", "optimizer", "schedule", "batch")
# of those, what changes speed and memory and not the trajectory
_NEUTRAL = ("model.activation_checkpointing", "model.compile", "batch.micro_size")
_NAMED_CLASSES = 5  # in the run's first lines; TensorBoard has them all


@dataclass(frozen=True)
class Run:
    """One process of a run: what it reads, its engines, how far it is, and what else the loop uses."""

    inputs: RunInputs
    engines: Engines
    progress: Progress
    reader: BatchReader
    optimizer_step: OptimizerSteps
    grids: SampleGrids
    checkpoints: Checkpoints
    coordinator: Coordinator
    profile_steps: tuple[int, int] | None = None
    memory_snapshot: bool = False

    def steps(self) -> Iterator[tuple[int, list[MicroBatch]]]:
        """The steps that are left, each with this rank's micro-batches; those of `logging.profile_steps` traced."""
        left = self.reader.steps(self.progress.step) if self.progress.step < self.progress.end else iter(())
        if self.profile_steps is None:
            return left
        return profiled(
            left, self.profile_steps, self.progress.log.folder, self.coordinator.ranks.rank, self.memory_snapshot
        )

    def stop_within_step(self, done: int) -> None:
        """Stop before step `done` + 1 was computed, with a checkpoint of step `done`; collective."""
        if done:
            self.checkpoints.ensure(self.engines.policy, done)
        self.progress.say_stopped()

    def close(self) -> None:
        """The end of a run without errors; collective."""
        self.checkpoints.close()
        self.progress.log.close()
        self.coordinator.close()


def run_training(
    run: RunConfig, ds: dict[str, Any], output: str | None, resume: str, loop: Callable[[Run], bool]
) -> int:
    """Train on the ranks that this process belongs to.

    Args:
        run: the checked recipe.
        ds: DeepSpeed's file as read.
        output: the run's folder; None is runs/NAME.
        resume: "auto", "never", or a checkpoint's folder.
        loop: takes the steps that are left; False when a signal ended them early.

    Returns:
        Exit code: 0 when the run is finished or was stopped with a checkpoint.

    Raises:
        ConfigError: a folder that cannot be used.
    """
    folder = expand(output or f"runs/{run.name}")
    run_folder.check_output(folder, run, resume)
    run_folder.check_data(folder, run)
    if run_folder.is_completed(folder):
        print(f"{folder}: this run is finished; nothing to do")
        return 0
    require_base(run)
    return run_on_ranks(
        lambda ranks: _train(run, ds, folder, resume, loop, ranks), run.distributed, run.batch.micro_size
    )


def fill_reference_cache(run: RunConfig, ds: dict[str, Any], ahead: bool) -> int:
    """Compute the reference's log-likelihoods of a whole run into `reference.cache`.

    Args:
        ahead: beside trainers that are running: stay `reference.ahead_steps` ahead of them.

    Returns:
        Exit code.

    Raises:
        ReferenceCacheError: no cache folder is named.
    """
    if run.reference.cache is None:
        raise ReferenceCacheError("name the folder to fill: --set reference.cache=FOLDER")
    return run_on_ranks(lambda ranks: _fill_cache(run, ds, ahead, ranks), run.distributed, run.batch.micro_size)


def _fill_cache(run: RunConfig, ds: dict[str, Any], ahead: bool, ranks: Ranks) -> None:
    assert run.reference.cache is not None
    precision = resolve_precision(ds, run, ranks.device != "cpu")
    inputs = open_inputs(run, expand(run.reference.cache) / "data")
    weights = reference_weights(run, inputs.tokenizer, None) if ranks.rank == 0 else None
    on_first(ranks, lambda: _check_generated(run, inputs, weights))
    coordinator = Coordinator(ranks)
    run, _ = choose_compile(run, coordinator.device)
    cache = open_cache(
        ReferenceInputs(run, weights, precision, inputs.tokenizer, inputs.table, coordinator, inputs.generated)
    )
    reference = ReplicaReference(
        run.model, run.reference, weights, precision, coordinator.device, inputs.tokenizer, run.seed
    )
    pairs, most = run.batch.global_size, run.reference.batch_size
    whole_batches = inputs.own_steps(0, [min(most, pairs - first) for first in range(0, pairs, most)])
    ahead_steps = run.reference.ahead_steps if ahead else None
    online = run.data.generated == ONLINE
    fill_cache(cache, reference, whole_batches, inputs.steps, ranks, ahead_steps, online, run.reference.wait_seconds)


def _train(
    run: RunConfig, ds: dict[str, Any], folder: Path, resume: str, loop: Callable[[Run], bool], ranks: Ranks
) -> None:
    owned: list[run_folder.OwnedFolder] = []
    on_first(ranks, lambda: owned.append(run_folder.own(folder, run)))
    own = owned[0] if owned else None  # on rank 0
    try:
        with memory_history(run.logging.memory_snapshot, folder, ranks.rank):
            _train_in(run, ds, folder, resume, loop, ranks, own)
    finally:
        if own:
            own.lock.release()


def _train_in(
    run: RunConfig, ds: dict[str, Any], folder: Path, resume: str, loop: Callable[[Run], bool], ranks: Ranks,
    own: run_folder.OwnedFolder | None,
) -> None:  # fmt: skip
    try:
        started_run = _start(run, ds, folder, resume, ranks, own.lock if own else None)
        ready = _until_stopped(started_run, lambda parts: _check_start(run, parts))
    except ValueError:
        if own and own.fresh:
            run_folder.discard(folder)
        raise
    started = time.perf_counter()
    try:
        finished = ready and _until_stopped(started_run, loop)
    except RuntimeError as error:
        watchdog = started_run.coordinator.watchdog
        if watchdog is not None and lost_connection(error) and (gone := watchdog.vanished()):
            raise RuntimeError(f"{gone}; start again to continue from the last checkpoint") from error
        raise
    if finished:
        _finish(run, folder, started_run, time.perf_counter() - started)
    started_run.close()


def _start(run: RunConfig, ds: dict[str, Any], folder: Path, resume: str, ranks: Ranks, lock: FolderLock | None) -> Run:
    """Build every part of a run, in the order in which one needs another; `lock` is rank 0's."""
    keep_rank_log(folder, ranks)
    barrier(ranks)  # all logs are there before a start that is refused removes its folder
    inputs = open_inputs(run, folder / "data")
    compared = {"the configuration": config_hash(run), "the data": inputs.content_hash()}
    check_ranks(ranks, run.distributed.timeout_seconds, compared)
    for table in inputs.tables:
        verify_once(table, ranks)
    on_first(ranks, lambda: write_class_names(folder, inputs.table.manifest.class_names))
    coordinator = Coordinator(ranks, StopSignal(), Watchdog(ranks, run.distributed.timeout_seconds))
    if run.deterministic:
        compute_deterministically()
    precision = resolve_precision(ds, run, coordinator.device.type == "cuda")
    sizes = workload_of(run, ds, ranks.world_size, precision)
    run, compile_lines = choose_compile(run, coordinator.device)
    run, memory_lines = choose_by_memory(run, sizes, ranks.world_size, smallest_memory(coordinator.device))
    workload = workload_of(run, ds, ranks.world_size, precision, inputs.tokenizer)
    balancer = Balancer(run.balance, run.batch, workload, ranks)
    weights: list[dict[str, str]] = [{}]
    on_first(ranks, lambda: weights[0].update(weights_hashes(run)))
    torch.distributed.broadcast_object_list(weights, src=0)
    metadata = {
        "recipe": trajectory_settings(run), "data": compared["the data"], "weights": weights[0],
        "stage": zero_stage(ds), "precision": precision,
    }  # fmt: skip
    still_ours = lock.check if lock else lambda look=True: None
    band = AccuracyBand(run.loss.accuracy_band)
    checkpoints = Checkpoints(
        folder / "checkpoints", ranks, run.checkpoint, metadata, still_ours, lambda: {"accuracy": band.state()}
    )
    origin = checkpoints.to_resume(resume)
    engines = _build_engines(run, ds, inputs, balancer, checkpoints, origin, precision, coordinator)
    torch.manual_seed(run.seed + ranks.rank)  # after building: dropout does not depend on how the reference is held
    coordinator.beat(0, "reading the checkpoint")
    first_step = checkpoints.restore(engines.policy, origin) if origin else 0
    if origin:
        with decoding(f"checkpoint {origin}: its accuracy cannot be read", CheckpointError, "resume from another one"):
            band.restore(read_manifest(origin).metadata.get("accuracy", {}))
    checkpoints.require_space(engines.policy, inputs.steps)
    log = RunLog(
        folder, ranks.rank == 0, inputs.steps, first_step, run.logging.tensorboard, run.logging.progress, still_ours
    )
    last_values = last_logged_values(folder / "metrics.jsonl", first_step)
    utilization = Utilization(trained_flops(run, workload), [peer.device for peer in balancer.peers])
    progress = Progress(
        first_step, inputs.steps, log, last_values, run.batch.global_size, utilization, coordinator.device,
        run.logging.every_steps, band,
    )  # fmt: skip
    _announce(run, inputs, engines, balancer, progress)
    for line in [*compile_lines, *memory_lines]:
        log.say(line)
    return Run(
        inputs,
        engines,
        progress,
        BatchReader(inputs, run.data, balancer, coordinator, log.say),
        OptimizerSteps(engines.policy, run.optimizer, run.schedule, inputs.steps, inputs.steps_per_epoch, log.say),
        SampleGrids(run, inputs.tokenizer, precision, coordinator.device, inputs.steps, log),
        checkpoints,
        coordinator,
        run.logging.profile_steps,
        run.logging.memory_snapshot,
    )


def _build_engines(
    run: RunConfig, ds: dict[str, Any], inputs: RunInputs, balancer: Balancer, checkpoints: Checkpoints,
    origin: Path | None, precision: str, coordinator: Coordinator,
) -> Engines:  # fmt: skip
    """Policy and reference; full weights are read on rank 0, which hands out shards or broadcasts."""
    partition = balancer.partition
    filled = fill_ds_config(
        ds,
        run,
        world_size=coordinator.ranks.world_size,
        forwards=partition.forwards,
        micro_size=max(max(sizes) for sizes in partition.micro_sizes),
        precision=precision,
        fused=coordinator.device.type == "cuda",
    )
    if origin and checkpoints.prepare(origin):
        filled["checkpoint"] = {**filled.get("checkpoint", {}), "load_universal": True}
    weights = None
    if coordinator.ranks.rank == 0:
        weights = starting_weights(run.model, run.model.weights, run.seed, inputs.tokenizer)
    coordinator.beat(0, "building the policy")
    policy = Policy(
        run.model, run.optimizer, filled, weights, run.batch.global_size, coordinator.device, inputs.tokenizer
    )
    coordinator.beat(0, "building the reference")
    objective = Objective(run.loss, run.model.lambda_conditioning)
    reference: Reference | None = None
    if objective.spec.needs_reference:
        own = reference_weights(run, inputs.tokenizer, weights) if weights is not None else None
        on_first(coordinator.ranks, lambda: _check_generated(run, inputs, own))
        reference = PLACEMENTS[run.reference.placement].build(
            ReferenceInputs(run, own, precision, inputs.tokenizer, inputs.table, coordinator, inputs.generated)
        )
    return Engines(policy, reference, objective, coordinator.device, precision)


def _check_generated(run: RunConfig, inputs: RunInputs, weights: dict[str, Tensor] | None) -> None:
    """Raise CodesError where the table of generated images was drawn by other weights than the reference's."""
    if inputs.generated is not None:
        assert weights is not None  # on rank 0
        with torch.device("meta"):
            module = build_module(reference_model(run.model, run.reference.dropout), inputs.tokenizer)
        parameters = {name: weights[name] for name, _ in module.named_parameters()}
        require_drawn_by(inputs.generated, state_hash(parameters))


def reference_weights(
    run: RunConfig, tokenizer: nn.Module | None, policy_weights: dict[str, Tensor] | None
) -> dict[str, Tensor]:
    """The reference's full float32 state dict: that of `reference.weights`, else the policy's own start.

    Args:
        policy_weights: the policy's start where it is in memory already; without the embedding of the number that it is
            conditioned on it is the reference.
    """
    model = reference_model(run.model, run.reference.dropout).model_copy(update={"reset_classes": False})
    if run.reference.weights is not None:
        return starting_weights(model, run.reference.weights, run.seed, tokenizer)
    if policy_weights is None:
        policy_weights = starting_weights(run.model, run.model.weights, run.seed, tokenizer)
    embeddings = tuple(kind.prefix for kind in CONDITIONINGS)
    return {name: tensor for name, tensor in policy_weights.items() if not name.startswith(embeddings)}


def _check_start(run: RunConfig, parts: Run) -> bool:
    """Before the first step of all: check the baseline and draw its samples."""
    if parts.progress.step == 0:
        check_baseline(run, parts.engines, parts.reader.own_steps(), parts.coordinator, parts.progress.log.say)
        if parts.grids.due(0):
            parts.grids.draw(parts.engines.policy, 0)
    return True


def _until_stopped(parts: Run, work: Callable[[Run], bool]) -> bool:
    """What `work` returns; False where a signal stopped the ranks while they waited within a step."""
    try:
        return work(parts)
    except Stopped as stopped:
        parts.stop_within_step(stopped.done)
        return False


def _announce(run: RunConfig, inputs: RunInputs, engines: Engines, balancer: Balancer, progress: Progress) -> None:
    """The run's first lines: what runs where, on what, with which kernels; its text and row in TensorBoard."""
    policy, log = engines.policy, progress.log
    log.text("config", dump_recipe(run))
    if names := inputs.table.manifest.class_names:
        log.text("classes", "\n".join(f"{label} {name}" for label, name in enumerate(names)))
    log.hparams(hyperparameters(run))
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in policy.module.parameters())
    log.say(
        f"{run.name}: {run.model.preset}, {parameters / 1e6:.1f} M parameters, {engines.precision}, "
        f"ZeRO stage {policy.stage}, reference {run.reference.placement if engines.reference else 'none'}, "
        f"log-likelihoods by {backend(engines.device.type)}"
    )
    log.say(
        f"{len(inputs.table)} images, {inputs.table.manifest.classes} classes{class_list(names)}, {inputs.steps} steps "
        f"of {run.batch.global_size} pairs on {len(balancer.peers)} rank(s): {balancer.describe()}"
    )
    for note in fewer_classes_note(inputs.table.manifest.classes, inputs.plan.null_class):
        log.say(note)
    traced = run.logging.profile_steps
    if traced and not progress.step < traced[0] <= traced[1] <= inputs.steps:
        log.say(
            f"warning: logging.profile_steps={list(traced)}: no trace, since this start takes the steps "
            f"{progress.step + 1} to {inputs.steps}"
        )
    if run.logging.memory_snapshot and engines.device.type != "cuda":
        log.say("warning: logging.memory_snapshot records the memory of a GPU, and this run has none")
    if warning := balancer.warning():
        log.say(warning)
    if progress.step:
        log.say(f"continuing after step {progress.step}")


def hyperparameters(run: RunConfig) -> dict[str, bool | str | float]:
    """What runs are compared by, under the keys that `--set` takes: what the trajectory depends on."""
    tree = run.model_dump(mode="json", by_alias=True)
    leaves = {f"{name}.{key}": value for name in _COMPARED for key, value in tree[name].items()}
    leaves |= {f"loss.options.{name}": value for name, value in run.loss.options.items()}
    leaves |= {"seed": run.seed, "reference.dropout": run.reference.dropout}
    plain = {key: value for key, value in leaves.items() if isinstance(value, bool | str | int | float)}
    return {key: value for key, value in plain.items() if key not in _NEUTRAL}


def class_list(names: Sequence[str]) -> str:
    """` (beagle, poodle, ...)` for the run's first lines; nothing where names are not known."""
    more = ", ..." if len(names) > _NAMED_CLASSES else ""
    return f" ({', '.join(names[:_NAMED_CLASSES])}{more})" if names else ""


def _finish(run: RunConfig, folder: Path, parts: Run, seconds: float) -> None:
    """Write the summary and the mark of completion."""
    ranks, log = parts.coordinator.ranks, parts.progress.log
    devices = collections.Counter(peer.device for peer in parts.reader.balancer.peers)
    summary = {
        "name": run.name,
        "steps": parts.progress.step,
        "images": parts.progress.step * run.batch.global_size,
        "seconds": round(seconds, 2),
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "ranks": ranks.world_size,
        "devices": ", ".join(f"{count} x {device}" for device, count in devices.items()),
        "precision": parts.engines.precision,
        "versions": {"cca_ds": cca_ds.__version__, "torch": torch.__version__, "deepspeed": deepspeed.__version__},
        "final": parts.progress.last_values,
    }
    log.finished()
    if parts.engines.reference is not None:
        parts.engines.reference.finished(parts.progress.step)
    if ranks.rank == 0:
        log.still_ours()
        run_folder.finish(folder, summary)
    log.say(f"finished {parts.progress.step} steps in {seconds:.0f} s: {folder}")
