"""Fine-tune an autoregressive image model by Condition Contrastive Alignment (arXiv 2410.09347).

deepspeed cca_ds/train.py --ds_config ds_configs/zero3.json
deepspeed --num_gpus 2 cca_ds/train.py --ds_config ds_configs/zero3.json --set loss.lambda=30 --output runs/mine
python cca_ds/train.py --ds_config ds_configs/zero3.json --recipe llamagen-3b --dry_run
sbatch slurm/cca_3b.sh
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from cca_ds.config.deepspeed_file import conflicts, read_ds_config
from cca_ds.config.recipes import ConfigError, add_recipe_arguments, recipe_from_arguments

if TYPE_CHECKING:
    from cca_ds.training.session import Session


def train(session: Session) -> bool:
    """Run the steps that are left. True when all are done, False when a signal ended them early."""
    policy, objective = session.policy, session.objective
    for step, batches in session.batches():
        sums, logps = session.zero_sums(), []
        for batch in (batch.to(session.device) for batch in batches):
            inputs = objective.stacked(batch)  # [chosen, rejected]
            reference_logp = session.reference_logp(batch, inputs)
            policy_logp = policy(*inputs)
            loss, batch_sums = objective(policy_logp, reference_logp, batch)
            policy.backward(loss)
            sums += batch_sums
            logps.append(policy_logp.detach())
        sums, stopping = session.sum_over_ranks(sums)
        session.require_finite(step, sums, batches, logps)
        done = step + 1
        session.report(done, sums, session.optimizer_step(step))
        if session.samples_due(done):
            session.draw_samples(done)
        if stopping or session.checkpoints.due(done, session.steps):
            session.save(done, wait=stopping or done == session.steps)
        if stopping and done < session.steps:
            session.say_stopped(done)
            return False
    return True


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; `--help` imports neither torch nor deepspeed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--ds_config",
        "--deepspeed_config",
        required=True,
        help="DeepSpeed's JSON, e.g. ds_configs/zero3.json",
    )
    add_recipe_arguments(parser)
    parser.add_argument("--output", help="the run's folder (default: runs/RECIPE)")
    parser.add_argument(
        "--resume", default="auto", help="auto, never, or a checkpoint's folder (default: auto)"
    )
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="print configuration, parameters, memory and steps; train nothing",
    )
    parser.add_argument(
        "--cache_reference",
        action="store_true",
        help="only compute the reference's log-likelihoods of the run",
    )
    parser.add_argument(
        "--produce_reference", action="store_true", help="compute them ahead of trainers that are running"
    )
    parser.add_argument(
        "--local_rank", type=int, default=-1, help=argparse.SUPPRESS
    )  # the deepspeed launcher's
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 when the run is finished or was stopped with a checkpoint, 2 for bad input, 1 for a failure."""
    arguments = parse(argv)
    try:
        run = recipe_from_arguments(arguments)
        ds = read_ds_config(arguments.ds_config)
        if problems := conflicts(ds, run, arguments.ds_config):
            raise ConfigError(problems)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    if arguments.dry_run:
        from cca_ds.planning.dry_run import describe

        try:
            print(describe(run, ds))
        except ValueError as error:
            print(f"config error: {error}", file=sys.stderr)
            return 2
        return 0
    from cca_ds.training.run import train_command

    return train_command(run, ds, arguments, train)


if __name__ == "__main__":
    sys.exit(main())
