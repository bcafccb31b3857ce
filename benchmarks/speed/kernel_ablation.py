"""python benchmarks/speed/kernel_ablation.py --family llamagen --dtype fp32 --steps 3

A training step (`train_step.py`'s, our side) with each CPU op replaced by its plain version, one at a time: processor
time and peak memory relative to all ops on, each variant in a process of its own, all ops on again at the end. With
--decode, sampling (`sample_speed.py`'s) instead. `kernel_ablation.md` has what was kept and deleted on that ground.
"""

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import time

import torch
from sample_speed import llamagen_ours as decode_llamagen
from sample_speed import var_ours as decode_var
from side_by_side import DTYPES, KEEP_FREED_MEMORY, peak_gib
from train_step import llamagen_ours as train_llamagen
from train_step import var_ours as train_var

WORK = {
    (False, "llamagen"): train_llamagen,
    (False, "var"): train_var,
    (True, "llamagen"): decode_llamagen,
    (True, "var"): decode_var,
}
TRAINING, DECODING = frozenset({False}), frozenset({True})
# op -> (module of ops/, modules that use it, values of --decode with which the run calls it)
OPS = {
    "linear": ("linear", ["models.layers", "likelihood.head"], TRAINING | DECODING),
    "rms_norm": ("norms", ["models.layers"], TRAINING | DECODING),
    "swiglu_linear": ("swiglu", ["models.layers"], TRAINING | DECODING),
    "causal_attention": ("attention", ["models.llamagen.model"], TRAINING),
    "one_query_attention": ("attention", ["models.llamagen.decode"], DECODING),
    "scale_attention": ("attention", ["models.var.blocks"], TRAINING),
    "qk_norm": ("qk_norm", ["models.var.blocks"], DECODING),
    "adaln": ("adaln", ["models.var.blocks"], TRAINING | DECODING),
    "adaln_linear": ("adaln", ["models.var.blocks"], TRAINING | DECODING),
    "gated_residual_linear": ("adaln", ["models.var.blocks"], TRAINING | DECODING),
}


def switch_off(name: str) -> None:
    """Put an op's plain version in its place wherever models use it."""
    home, users, _ = OPS[name]
    plain = getattr(importlib.import_module(f"cca_ds.ops.{home}"), f"{name}_eager")
    if name == "adaln_linear":  # the plain version keeps its result in any case
        eager = plain
        plain = lambda *inputs, transient=False: eager(*inputs)  # noqa: E731
    for user in users:
        setattr(importlib.import_module(f"cca_ds.{user}"), name, plain)


def measure(arguments: argparse.Namespace, off: str) -> dict[str, float]:
    """Median processor seconds of a run and the process's peak memory, in a process of its own."""
    command = [sys.executable, *sys.argv, "--off", off]
    environment = {**os.environ, **KEEP_FREED_MEMORY, "OMP_NUM_THREADS": str(arguments.threads)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def work(arguments: argparse.Namespace) -> None:
    """The process of one variant: a warm-up, then the measured runs; prints a line of JSON."""
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    if arguments.off != "nothing":
        switch_off(arguments.off)
    run, seconds = WORK[arguments.decode, arguments.family](DTYPES[arguments.dtype]), []
    run()
    for _ in range(arguments.steps):
        started = time.process_time()
        run()
        seconds.append(time.process_time() - started)
    print(json.dumps({"processor_seconds": statistics.median(seconds), "peak_gib": peak_gib()}))


def main() -> None:
    """Measure every op that the family uses, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[2])
    parser.add_argument("--family", choices=("llamagen", "var"), default="llamagen")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--decode", action="store_true")
    parser.add_argument("--off", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.off is not None:
        work(arguments)
        return
    called = {name: users for name, (_, users, modes) in OPS.items() if arguments.decode in modes}
    own = [name for name, users in called.items() if any(arguments.family in user for user in users)]
    shared = ["linear"] + (["rms_norm", "swiglu_linear"] if arguments.family == "llamagen" else [])
    names = ["nothing", *shared, *own, "nothing"]
    found = [measure(arguments, name) for name in names]
    base = {key: (found[0][key] + found[-1][key]) / 2 for key in found[0]}
    print("| op off | processor time | peak memory |\n|---|--:|--:|")
    for name, values in zip(names, found, strict=True):
        time_share, memory_share = (values[key] / base[key] for key in ("processor_seconds", "peak_gib"))
        print(f"| {name} | {time_share:.2f} | {memory_share:.2f} |")


if __name__ == "__main__":
    main()
