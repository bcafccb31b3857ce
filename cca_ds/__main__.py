"""The commands of cca_ds.

python -m cca_ds                  # the commands, the version, and which kernels were built
python -m cca_ds config [PART]    # every key of a recipe, or those whose name contains PART
python -m cca_ds train --help     # a command; cca-train --help is the same
"""

from __future__ import annotations

import importlib
import signal
import sys

import cca_ds

COMMANDS = {
    "encode": "images to a table of codes",
    "train": "one epoch of CCA",
    "export": "a run's weights as one file",
    "sample": "images from a model",
    "evaluate": "FID, IS, precision and recall of images; the report page of a run",
    "choose": "the best checkpoint of a round of DDO",
    "plan": "memory and time of a run on given nodes",
}


def overview() -> str:
    """The commands, one line each, and what is installed."""
    from cca_ds.ops.build_record import kernels_built

    lines = [f"cca_ds {cca_ds.__version__}: {kernels_built()}", ""]
    lines += [f"  cca-{name:<10} {what}" for name, what in COMMANDS.items()]
    lines += ["", "Each is also `python -m cca_ds COMMAND`; --help lists its flags.",
              "`python -m cca_ds config` lists every key of a recipe."]  # fmt: skip
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, 2 for an unknown command, else the command's."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(overview())
    elif name == "--version":
        print(f"cca_ds {cca_ds.__version__}")
    elif name == "config":
        return config(rest)
    elif name in COMMANDS:
        return importlib.import_module(f"cca_ds.{name}").main(rest)
    else:
        print(f"cca_ds: {name} is not a command; there are {', '.join([*COMMANDS, 'config'])}", file=sys.stderr)
        return 2
    return 0


def config(parts: list[str]) -> int:
    """Print the keys of a recipe. Exit code 2 where no key has such a name."""
    from cca_ds.config.reference import config_lines, config_reference

    if not parts:
        print(config_reference(), end="")
        return 0
    found = [line for part in parts for line in config_lines(part)]
    if not found:
        print(f"cca_ds config: no key's name contains {' or '.join(parts)}", file=sys.stderr)
        return 2
    print("\n".join(found))
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a traceback
    from cca_ds.cluster.failures import run_command

    sys.exit(run_command("cca_ds", main))
