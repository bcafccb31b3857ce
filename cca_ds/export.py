"""A run's policy as one file of weights, in the layout that LlamaGen's or VAR's own programs load, or safetensors.

    python -m cca_ds.export --run runs/digits --output policy.safetensors
    python -m cca_ds.export --run runs/llamagen-3b --output c2i_3B_cca.pt --layout llamagen --dtype bf16
    python -m cca_ds.export --run runs/var-d30 --output var_d30_cca.pth --layout var --ema
    python -m cca_ds.export --run runs/llamagen-3b --output hub/model.safetensors --model_card --metrics scores.json
    python -m cca_ds.export --run runs/llamagen-3b --output hub/model.safetensors --push_to_hub llamagen-3b-cca
    python -m cca_ds.export --run runs/every-lambda --output c2i_L_cca.pt --layout llamagen --lambda 300

Needs no ranks and no GPU. The run's recipe goes into the safetensors file's metadata; the model card becomes README.md
beside it, and the model's shape config.json. Nothing leaves this machine without --push_to_hub.
"""

from __future__ import annotations

import argparse
import sys

from cca_ds.cluster.failures import run_command
from cca_ds.console import command_parser, path

PRECISIONS = ("fp32", "bf16", "fp16")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = command_parser("export", __doc__)
    add = parser.add_argument
    add("--run", type=path, required=True, help="the folder that train wrote")
    add("--checkpoint", type=path, help="one of its checkpoints (default: the newest intact one)")
    add("--output", type=path, required=True, help="file to write, whole or not at all")
    add("--layout", default="safetensors",
        help="safetensors (default), or that of the model's own program: llamagen, var")  # fmt: skip
    add("--dtype", choices=PRECISIONS, default="fp32", help="of the weights in the file (default: fp32)")
    add("--lambda", type=float, dest="lambda_", metavar="LAMBDA",
        help="of a lambda-conditioned model: fix it, for the programs that have no such models")  # fmt: skip
    add("--ema", action="store_true", help="the policy's moving average instead of its last weights")
    add("--model_card", action="store_true",
        help="with safetensors: a Hugging Face model card and config.json beside the file")  # fmt: skip
    add("--metrics", type=path, help="evaluate's JSON report, whose numbers and settings go into the model card")
    add("--push_to_hub", metavar="NAME", help="send the file, its model card and config.json to this repository of the "
        "Hugging Face Hub, USER/NAME or NAME, with the token of `hf auth login` or HF_TOKEN; made private")  # fmt: skip
    add("--public", action="store_true", help="with --push_to_hub: make the repository public")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, 2 with one line for bad input, 1 for a failure of the system."""
    return run_command("export", lambda: export(parse(argv)))


def export(arguments: argparse.Namespace) -> None:
    """Write the file and print a line that describes it."""
    from cca_ds.checkpoints.export_weights import export_weights  # imports torch, which --help does not need

    line = export_weights(
        arguments.run,
        arguments.output,
        checkpoint=arguments.checkpoint,
        layout=arguments.layout,
        dtype=arguments.dtype,
        average=arguments.ema,
        lambda_=arguments.lambda_,
        with_card=arguments.model_card,
        metrics=arguments.metrics,
        repository=arguments.push_to_hub,
        public=arguments.public,
    )
    print(line)


if __name__ == "__main__":
    sys.exit(main())
