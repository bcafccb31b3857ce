"""The paper's tables and figures on the handwritten digits, each claim a checked inequality.

    python benchmarks/digits/paper.py                     # everything, about half an hour on two CPU cores
    python benchmarks/digits/paper.py --again losses beta # these again; the others are read from --work
    python benchmarks/digits/paper.py --experiments guidance losses --repeats 1   # two minutes: only their claims

Every experiment is repeated with three seeds; means and half-ranges are written to
benchmarks/results/digits_paper.{json,md}, figures beside them, when all experiments are run. Exit code 1 when a claim
fails; the output names it. An interrupted command continues with the first unfinished experiment.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

import claims as paper_claims
import plots
import torch
from lab import Digits, average, evaluate, fine_tune, likelihood_change, sampling_seconds, untimed
from provenance import RESULTS, origin, processor

from cca_ds.console import progress
from cca_ds.files import write_atomic

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)
LAMBDAS = (0.0, 1.0, 3.0, 10.0, 30.0, 100.0, 1000.0)
GUIDED = 0.5  # the scale that sampling times are compared with; they are the same at any above 0
BETAS = (0.1, 0.25, 0.5, 1.0, 2.0)
SMALL_LAMBDAS = (0.3, 1.0)
SAMPLED_LAMBDAS = (1.0, 10.0, 100.0, 1000.0, 8000.0)
LOSSES = {
    "CCA, one epoch": ["loss.name=cca", "loss.beta=0.5", "loss.lambda=10"],
    "CCA, three epochs": ["loss.name=cca", "loss.beta=0.5", "loss.lambda=10", "batch.epochs=3"],
    "DPO": ["loss.name=dpo", "loss.beta=0.5"],
    "unlearning": ["loss.name=unlearning", "loss.lambda=0.1"],
}


def guidance(digits: Digits, seeds: range) -> list[dict]:
    """The base model over guidance scales (Figure 1, and the frontier of Figure 4)."""
    return [
        {"name": "base", "s": scale, **average([evaluate(digits, digits.base, scale, seed) for seed in seeds])}
        for scale in progress(SCALES, "guidance")
    ]


def losses(digits: Digits, seeds: range) -> list[dict]:
    """CCA, DPO and unlearning, guidance-free (Table 3), with the change of the likelihoods."""
    rows = []
    for name, overrides in progress(LOSSES.items(), "losses", len(LOSSES)):
        repeats = []
        for seed in seeds:
            model = fine_tune(digits, seed, overrides).model
            positives, negatives = likelihood_change(digits, model)
            found = {**evaluate(digits, model, 0.0, seed), "positives": positives, "negatives": negatives}
            if not rows:  # sampling takes the same time after every loss
                free, guided = sampling_seconds([(model, 0.0), (digits.base, GUIDED)])
                found["share of guided time"] = free / guided
            repeats.append(found)
        rows.append({"name": name, "s": 0.0, **average(repeats)})
    return rows


def frontier(digits: Digits, seeds: range) -> list[dict]:
    """CCA over lambda, guidance-free (Figure 4)."""
    return _sweep(digits, seeds, "lambda", [(value, [f"loss.lambda={value}"]) for value in LAMBDAS])


def beta(digits: Digits, seeds: range) -> list[dict]:
    """CCA over beta (Figure 9)."""
    return _sweep(digits, seeds, "beta", [(value, [f"loss.beta={value}"]) for value in BETAS])


def _sweep(digits: Digits, seeds: range, name: str, points: list[tuple[float, list[str]]]) -> list[dict]:
    rows = []
    for value, overrides in progress(points, f"CCA over {name}"):
        repeats = [evaluate(digits, fine_tune(digits, seed, overrides).model, 0.0, seed) for seed in seeds]
        rows.append({"name": "CCA", "s": 0.0, name: value, **untimed(repeats)})
    return rows


def combined(digits: Digits, seeds: range) -> list[dict]:
    """CCA with a small lambda, then guidance (Figures 5 and 6)."""
    rows = []
    for value in progress(SMALL_LAMBDAS, "CCA + guidance"):
        models = [fine_tune(digits, seed, [f"loss.lambda={value}"]).model for seed in seeds]
        for scale in SCALES[:4]:
            repeats = [evaluate(digits, model, scale, seed) for model, seed in zip(models, seeds, strict=True)]
            rows.append({"name": "CCA + guidance", "lambda": value, "s": scale, **untimed(repeats)})
    return rows


def conditioned(digits: Digits, seeds: range) -> list[dict]:
    """One lambda-conditioned model of three epochs, lambda chosen at sampling time (Table 5)."""
    overrides = ["model.lambda_conditioning=true", "batch.epochs=3"]
    models = [fine_tune(digits, seed, overrides).model for seed in progress(seeds, "lambda-conditioned")]
    rows = []
    for value in SAMPLED_LAMBDAS:
        log_lambda = math.log(value)
        repeats = [
            evaluate(digits, model, 0.0, seed, log_lambda=log_lambda) for model, seed in zip(models, seeds, strict=True)
        ]
        rows.append({"name": "CCA, conditioned", "s": 0.0, "lambda": value, **untimed(repeats)})
    return rows


def curves(digits: Digits, seeds: range) -> list[dict]:
    """Log-ratios of positives and negatives while training (Figure 10), means over seeds."""
    histories = [fine_tune(digits, seed, []).history for seed in progress(seeds, "training curves")]
    tags = ("loss", "logps/chosen", "logps/rejected", "rewards/accuracies")
    return [
        {"step": step + 1, **average([{tag: values[tag] for tag in tags} for values in at_step])}
        for step, at_step in enumerate(zip(*histories, strict=True))
    ]


def var(digits: Digits, seeds: range) -> list[dict]:
    """A small VAR on codes of its own multi-scale tokenizer: base over guidance scales, and CCA (Table 2)."""
    from small_var import small_var

    small = small_var(digits)
    rows = [
        {"name": "VAR base", "s": scale, **average([evaluate(small, small.base, scale, seed) for seed in seeds])}
        for scale in progress(SCALES[:5], "VAR over guidance scales")
    ]
    repeats = [
        evaluate(small, fine_tune(small, seed, ["loss.beta=0.5", "loss.lambda=10"]).model, 0.0, seed)
        for seed in progress(seeds, "VAR, CCA")
    ]
    return [*rows, {"name": "VAR, CCA, one epoch", "s": 0.0, **average(repeats)}]


EXPERIMENTS: dict[str, Callable[[Digits, range], list[dict]]] = {
    "guidance": guidance,
    "losses": losses,
    "frontier": frontier,
    "beta": beta,
    "combined": combined,
    "conditioned": conditioned,
    "curves": curves,
    "var": var,
}


def run_all(work: Path, names: list[str], again: list[str], repeats: int) -> dict[str, list[dict]]:
    """Rows of every experiment; results in `work` with the same number of repeats are reused."""
    work.mkdir(parents=True, exist_ok=True)
    digits, found = Digits.shipped(work), {}
    for name in names:
        path = work / f"{name}.json"
        stored = json.loads(path.read_text()) if path.is_file() else {}
        if name in again or stored.get("repeats") != repeats:
            stored = {"repeats": repeats, "rows": EXPERIMENTS[name](digits, range(repeats))}
            write_atomic(path, json.dumps(stored))
        found[name] = stored["rows"]
    return found


def report(found: dict[str, list[dict]], claims: dict[str, bool], repeats: int) -> dict:
    """The result file: every row, every claim, and the table that the README shows."""
    shown = [*found["guidance"], *found["losses"], *found["var"]]
    unit = found["guidance"][0]["seconds"]["mean"]
    unit_var = found["var"][0]["seconds"]["mean"]
    columns = ["model", "guidance s", "FID", "IS", "class accuracy", "sampling time"]
    table = []
    for row in shown:
        relative = row["seconds"]["mean"] / (unit_var if row["name"].startswith("VAR") else unit)
        table.append([row["name"], row["s"], row["fid"], row["inception_score"], row["accuracy"], f"{relative:.2f}x"])
    return {
        **origin("python benchmarks/digits/paper.py", f"{processor()}, {torch.get_num_threads()} threads"),
        "repeats": repeats,
        "experiments": found,
        "claims": claims,
        "table": {"columns": columns, "rows": table,
                  "decimals": {"guidance s": 2, "FID": 3, "IS": 2, "class accuracy": 3}},
    }  # fmt: skip


def main() -> int:
    """Exit code 0 when every claim holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS))
    parser.add_argument("--again", nargs="+", choices=EXPERIMENTS, default=[], help="compute these again")
    parser.add_argument("--work", type=Path, default=Path("runs/digits_paper"), help="finished experiments")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    found = run_all(arguments.work, arguments.experiments, arguments.again, arguments.repeats)
    claims = paper_claims.check(found)
    if found.keys() == EXPERIMENTS.keys():
        write(arguments.results, report(found, claims, arguments.repeats))
    for claim, holds in claims.items():
        print(f"{'yes' if holds else 'NO '}  {claim}")
    return 0 if all(claims.values()) else 1


def write(folder: Path, body: dict) -> None:
    """Write the JSON, the Markdown tables and the figures."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "digits_paper.json", json.dumps(body, indent=1) + "\n")
    write_atomic(folder / "digits_paper.md", paper_claims.markdown(body))
    plots.draw(body["experiments"], folder)


if __name__ == "__main__":
    sys.exit(main())
