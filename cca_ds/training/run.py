"""From a checked command line to a finished run: ranks, folder, session, baseline, loop, summary."""

from __future__ import annotations

import argparse
import collections
import datetime
import hashlib
import os
import sys
import time
import traceback
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from cca_ds.cluster import launch
from cca_ds.cluster.failures import explain, lost_connection
from cca_ds.cluster.preflight import check_ranks
from cca_ds.cluster.rank_logs import keep_rank_log, report_end
from cca_ds.cluster.stop_signal import Stopped
from cca_ds.cluster.watchdog import Watchdog
from cca_ds.config.recipes import ConfigError, config_hash, dump_recipe
from cca_ds.config.schema import RunConfig
from cca_ds.training import run_folder

COMPARED = ("model", "loss", "optimizer", "schedule", "batch")


def train_command(
    run: RunConfig, ds: dict[str, Any], arguments: argparse.Namespace, train: Callable[[Any], bool]
) -> int:
    """Run `train` in a session of this recipe. Exit code 0: finished, or stopped with a checkpoint."""
    if arguments.cache_reference or arguments.produce_reference:
        return _with_ranks(run, lambda ranks: _produce(run, ds, ranks, ahead=arguments.produce_reference))
    folder = Path(arguments.output or f"runs/{run.name}").expanduser()
    try:
        run_folder.check_output(folder, run, arguments.resume)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    if run_folder.is_completed(folder):
        print(f"{folder}: this run is finished; nothing to do")
        return 0
    return _with_ranks(run, lambda ranks: _run(run, ds, arguments, train, folder, ranks))


def _with_ranks(run: RunConfig, work: Callable[[launch.Ranks], int]) -> int:
    """Meet the other ranks, work, part; a failure is one line that names this rank."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it had to guess
    try:
        ranks = launch.initialize(launch.find_ranks(os.environ), run.distributed.timeout_seconds)
    except launch.LaunchError as error:
        print(error, file=sys.stderr)
        return 2
    quiet_deepspeed()
    try:
        code = work(ranks)
    except (ValueError, RuntimeError, OSError, MemoryError) as error:
        if os.environ.get("CCA_DS_TRACEBACK"):
            traceback.print_exc()
        report_end(explain(error, run, ranks))
        if (
            ranks.world_size > 1
        ):  # the others are in a collective: no farewell, so that the watchdog tells them
            os._exit(1)
        return 1
    launch.shutdown()
    return code


def _produce(run: RunConfig, ds: dict[str, Any], ranks: launch.Ranks, ahead: bool) -> int:
    from cca_ds.config.deepspeed_file import resolve_precision
    from cca_ds.reference.producer import produce

    produce(run, ranks, resolve_precision(ds, run, ranks.device != "cpu"), ahead)
    return 0


def _run(
    run: RunConfig,
    ds: dict[str, Any],
    arguments: argparse.Namespace,
    train: Callable[[Any], bool],
    folder: Path,
    ranks: launch.Ranks,
) -> int:
    fresh = ranks.rank == 0 and run_folder.open_folder(folder, run)
    torch.distributed.barrier()
    try:
        session = _begin(run, ds, arguments.resume, folder, ranks)
        ready = _until_stopped(session, _check_start)
    except ValueError:
        if fresh:
            run_folder.discard(folder)
        raise
    started = time.perf_counter()
    try:
        finished = ready and _until_stopped(session, train)
    except RuntimeError as error:
        if lost_connection(error) and (gone := session.watchdog.vanished()):
            raise RuntimeError(f"{gone}; start again to continue from the last checkpoint") from error
        raise
    if finished:
        finish(session, time.perf_counter() - started)
    session.close()
    return 0


def _begin(run: RunConfig, ds: dict[str, Any], resume: str, folder: Path, ranks: launch.Ranks) -> Any:
    """A session whose ranks, data and weights are as they should be."""
    from cca_ds.training.inputs import open_table
    from cca_ds.training.session import Session

    keep_rank_log(folder, ranks)
    manifest = open_table(run, folder / "data").manifest.to_json()
    same = {
        "the configuration": config_hash(run),
        "the data manifest": hashlib.sha256(manifest.encode()).hexdigest()[:16],
    }
    check_ranks(ranks, run.distributed.timeout_seconds, same)
    watchdog = Watchdog(ranks, run.distributed.timeout_seconds)
    session = Session(run, ds, ranks, folder, resume, watchdog)
    session.log.text("config", dump_recipe(run))
    session.log.hparams(hyperparameters(run))
    announce(session)
    return session


def _check_start(session: Any) -> bool:
    """Before the first step of all: the baseline is as it should be, and its samples are drawn."""
    from cca_ds.training.baseline import check_baseline

    if session.first_step == 0:
        check_baseline(session)
        session.draw_samples(0)
    return True


def _until_stopped(session: Any, work: Callable[[Any], bool]) -> bool:
    """What `work` returns; False where a signal stopped the ranks while they waited within a step."""
    try:
        return work(session)
    except Stopped as stopped:
        session.stop_within_step(stopped.done)
        return False


def quiet_deepspeed() -> None:
    """DeepSpeed tells every rank's every setting, torch every name that will change; real warnings are enough."""
    import logging
    import warnings

    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")


def announce(session: Any) -> None:
    """The run's first lines: what runs where, on what, with which kernels."""
    from cca_ds.likelihood import backend

    run, module = session.run, session.policy.module
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters())
    session.log.say(
        f"{run.name}: {run.model.preset}, {parameters / 1e6:.1f} M parameters, {session.precision}, "
        f"ZeRO stage {session.policy.stage}, reference {run.reference.placement if session.reference else 'none'}, "
        f"log-likelihoods by {backend()}"
    )
    session.log.say(
        f"{len(session.table)} images, {session.table.manifest.classes} classes, {session.steps} steps of "
        f"{run.batch.global_size} pairs on {session.ranks.world_size} rank(s): {session.balancer.describe()}"
    )
    if slowed := session.balancer.describe_slowdown():
        session.log.say(slowed)
    if session.first_step:
        session.log.say(f"continuing after step {session.first_step}")


def hyperparameters(run: RunConfig) -> dict[str, bool | str | float]:
    """What runs are compared by, under the keys that `--set` takes: every single value of these sections."""
    tree = run.model_dump(mode="json", by_alias=True)
    leaves = {f"{name}.{key}": value for name in COMPARED for key, value in tree[name].items()}
    leaves |= {"seed": run.seed, "reference.dropout": run.reference.dropout}
    return {key: value for key, value in leaves.items() if isinstance(value, bool | str | int | float)}


def finish(session: Any, seconds: float) -> None:
    """Summary, marks of completion."""
    run = session.run
    devices = collections.Counter(peer.device for peer in session.balancer.peers)
    summary = {
        "name": run.name,
        "steps": session.steps,
        "images": session.steps * run.batch.global_size,
        "seconds": round(seconds, 2),
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "ranks": session.ranks.world_size,
        "devices": ", ".join(f"{count} x {device}" for device, count in devices.items()),
        "precision": session.precision,
        "versions": {name: metadata.version(name) for name in ("cca_ds", "torch", "deepspeed")},
        "final": session.last_values,
    }
    session.log.finished()
    if session.ranks.rank == 0:
        run_folder.finish(session.folder, summary)
    session.log.say(f"finished {session.steps} steps in {seconds:.0f} s: {session.folder}")
