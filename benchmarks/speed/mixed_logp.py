"""Forward and backward of a mixed log-likelihood (GFT) beside one head, two heads and the plain version.

    python benchmarks/speed/mixed_logp.py                   # the CPU's table, into benchmarks/results
    python benchmarks/speed/mixed_logp.py --device cuda     # on a GPU
    python benchmarks/speed/mixed_logp.py --shapes var-d16 --repeats 5 --output /tmp

One head is `linear_sequence_logp` of the conditional hidden states alone, as CCA and maximum likelihood use it. Two
heads make both logits, the second without gradient, mix them and take the log-likelihood from logits. Runs are
interleaved; numbers are medians of wall time and of the thread's processor time, `ratio` is the latter over one head's.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
from provenance import RESULTS, origin
from sequence_logp import DTYPES, SHAPES, describe_device, inputs_of, measure_times

from cca_ds.likelihood import backend, linear_sequence_logp, linear_sequence_logp_eager, sequence_logp

USUAL = ("llamagen-b", "var-d16")
MOST_OF_ONE_HEAD = 1.15


def ways(case: dict, other: Tensor, share: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Name -> log p [B] of a case."""
    hidden, weight, targets, bias = (case[name] for name in ("hidden", "weight", "targets", "bias"))

    def two_heads() -> Tensor:
        with torch.no_grad():
            uncond = F.linear(other, weight, bias)
        share_B11 = share.to(uncond.dtype).view(-1, 1, 1)
        return sequence_logp(share_B11 * F.linear(hidden, weight, bias) + (1 - share_B11) * uncond, targets)

    return {
        "one head": lambda: linear_sequence_logp(hidden, weight, targets, bias),
        "mixed": lambda: linear_sequence_logp(hidden, weight, targets, bias, (other, share)),
        "two heads": two_heads,
        "eager": lambda: linear_sequence_logp_eager(hidden, weight, targets, bias, (other, share)),
    }


def measure(shape: str, dtype: str, device: str, repeats: int) -> dict:
    """Milliseconds of every way, and their ratios to one head."""
    case = inputs_of(shape, dtype, device, "linear")
    torch.manual_seed(1)
    other = torch.randn_like(case["hidden"]).detach()
    share = torch.rand(len(other), device=device)
    leaves = [tensor for name, tensor in case.items() if name != "targets" and tensor is not None]

    def trained(logp: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            for leaf in leaves:
                leaf.grad = None
            logp().sum().backward()

        return run

    runs = {name: trained(logp) for name, logp in ways(case, other, share).items()}
    times = measure_times(runs, device, repeats)
    clock = "thread_ms" if device == "cpu" and torch.get_num_threads() == 1 else "wall_ms"
    for found in times.values():
        found["ratio"] = found[clock] / times["one head"][clock]
    return {"shape": shape, "dtype": dtype, "tokens": list(case["targets"].shape), "ways": times}


def table(report: dict) -> str:
    """The report as Markdown."""
    lines = ["`{command}`, {date}, {device}, commit {commit}".format(**report), ""]
    lines += ["| shape | dtype | way | ms (wall) | ms (thread) | times one head |", "|---|---|---|--:|--:|--:|"]
    for case in report["cases"]:
        for name, found in case["ways"].items():
            numbers = f"{found['wall_ms']:.2f} | {found['thread_ms']:.2f} | {found['ratio']:.2f}"
            lines.append(f"| {case['shape']} | {case['dtype']} | {name} | {numbers} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Exit code 1 where a mixed log-likelihood takes more than `MOST_OF_ONE_HEAD` of one head."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=USUAL)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    command = " ".join(["python benchmarks/speed/mixed_logp.py", *sys.argv[1:]])
    report = {**origin(command, describe_device(arguments.device)), "backend": backend(), "cases": []}
    for shape, dtype in itertools.product(arguments.shapes, arguments.dtypes):
        report["cases"].append(measure(shape, dtype, arguments.device, arguments.repeats))
    arguments.output.mkdir(parents=True, exist_ok=True)
    stem = arguments.output / f"mixed_logp-{arguments.device}"
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    stem.with_suffix(".md").write_text(table(report))
    print(table(report), end="")
    return int(any(case["ways"]["mixed"]["ratio"] > MOST_OF_ONE_HEAD for case in report["cases"]))


if __name__ == "__main__":
    sys.exit(main())
