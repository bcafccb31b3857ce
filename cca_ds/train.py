"""Fine-tune an autoregressive image model by Condition Contrastive Alignment (arXiv 2410.09347).

deepspeed cca_ds/train.py --ds_config ds_configs/zero3.json
deepspeed --num_gpus 2 cca_ds/train.py --ds_config ds_configs/zero3.json --set loss.lambda=30 --output runs/mine
python cca_ds/train.py --ds_config ds_configs/zero3.json --recipe llamagen-3b --dry_run
sbatch slurm/cca_3b.sh
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from cca_ds.cluster.failures import run_command
from cca_ds.console import command_parser

if TYPE_CHECKING:  # annotations only: --help imports neither torch nor deepspeed
    from cca_ds.training.run import Run


def train(run: Run) -> bool:
    """Take the steps that are left. True when the run is at its end, False when a signal ended it early."""
    engines, progress = run.engines, run.progress
    policy, objective = engines.policy, engines.objective
    for step, batches in run.steps():
        sums, logps = engines.zero_sums(), []
        for batch in map(engines.load, batches):
            loss, batch_sums, policy_logp = engines.forward(batch)
            policy.backward(loss)
            sums += batch_sums
            logps.append(policy_logp)
        sums, stopping, overdue = run.coordinator.sum_over_ranks(sums, run.checkpoints.overdue())
        engines.require_finite(step, sums, batches, logps, run.coordinator.ranks)
        done = progress.record(sums, run.optimizer_step(step) | engines.reference_tags(), objective.spec)
        run.coordinator.beat(done)
        if run.grids.due(done):
            run.grids.draw(policy, done)
        if stopping or overdue or run.checkpoints.due(done, progress.end):
            run.checkpoints.save(policy, done, wait=stopping or done == progress.end)
        if done == progress.end:
            break
        if stopping:
            progress.say_stopped()
            return False
    return True


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    from cca_ds.config.deepspeed_file import add_ds_config_argument
    from cca_ds.config.recipes import add_recipe_arguments

    parser = command_parser("train", __doc__)
    add = parser.add_argument
    add_ds_config_argument(parser)
    add_recipe_arguments(parser)
    add("--output", help="the run's folder (default: runs/RECIPE)")
    add("--resume", default="auto", help="auto, never, or a checkpoint's folder (default: auto)")
    add(
        "--dry_run",
        action="store_true",
        help="print configuration, parameters, memory and steps, and what training would refuse; train nothing",
    )
    add("--cache_reference", action="store_true", help="only compute the reference's log-likelihoods of the run")
    add("--produce_reference", action="store_true", help="compute them ahead of trainers that are running")
    add("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)  # the deepspeed launcher's
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 when the run is finished or was stopped with a checkpoint, 2 for bad input, 1 for a failure."""
    return run_command("train", lambda: start(parse(argv)))


def start(arguments: argparse.Namespace) -> int | None:
    """Check the configuration, then describe the run, fill its reference's cache, or train."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a rank that waits for another warns every second
    from cca_ds.config.deepspeed_file import conflicts, read_ds_config
    from cca_ds.config.recipes import ConfigError, recipe_from_arguments
    from cca_ds.training.checks import recipe_problems

    run = recipe_from_arguments(arguments, recipe_problems)
    ds = read_ds_config(arguments.ds_config)
    if problems := conflicts(ds, run, arguments.ds_config):
        raise ConfigError(problems)
    if arguments.dry_run:
        from cca_ds.planning.dry_run import describe

        print(describe(run, ds), flush=True)
        from cca_ds.training.refusals import refusals

        if problems := refusals(run, ds, arguments.output, arguments.resume):
            raise ConfigError(problems)
        return 0
    from cca_ds.cluster.launch import choose_accelerator

    if run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    choose_accelerator()  # before the next line imports deepspeed
    from cca_ds.training.run import fill_reference_cache, run_training

    if arguments.cache_reference or arguments.produce_reference:
        return fill_reference_cache(run, ds, ahead=arguments.produce_reference)
    return run_training(run, ds, arguments.output, arguments.resume, train)


if __name__ == "__main__":
    sys.exit(main())
