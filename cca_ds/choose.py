"""Choose the best checkpoint of a round of DDO by its samples' FID, for the next round's reference.

    python -m cca_ds.choose --round runs/ddo/round1

The round's folder holds the run in run/, and the scores of a checkpoint's samples in scores/step_00000500/scores.json,
those of the weights that it started from in scores/step_00000000/scores.json. It fails where these are the best.
Written are best.safetensors, chosen.json, and rounds.md beside the round's folder. `bash slurm/ddo.sh` does all of it.
"""

from __future__ import annotations

import argparse
import sys

from cca_ds.cluster.failures import run_command
from cca_ds.console import command_parser, path


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = command_parser("choose", __doc__)
    parser.add_argument("--round", type=path, required=True, help="the round's folder")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, 2 with one line for bad input, 1 for a failure of the system."""
    return run_command("choose", lambda: choose(parse(argv)))


def choose(arguments: argparse.Namespace) -> None:
    """Print the table of all rounds."""
    from cca_ds.checkpoints import rounds  # imports torch, which --help does not need

    print(rounds.choose(arguments.round), end="")


if __name__ == "__main__":
    sys.exit(main())
