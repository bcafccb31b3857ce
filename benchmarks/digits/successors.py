"""CCA's successors on the handwritten digits, beside CCA and guidance on one frontier, at equal compute.

    python benchmarks/digits/successors.py                # three seeds, about half an hour on one CPU core
    python benchmarks/digits/successors.py --repeats 1 --results /tmp/look

Compute is counted in forwards of one sequence, a backward being two (`LossSpec.passes`): a pair of CCA costs 8, one of
guidance-free training (GFT) 4. So two epochs of GFT cost one of CCA, six cost three. Every method trains with the
digits recipe's optimizer, rate and batch; GFT by a cosine to a twentieth, as its public command. Guidance and CCA are
read from digits_paper.json, which `paper.py` measured with the same seeds; GFT is measured here. An interrupted command
continues with the first unfinished run.

A claim is an inequality that is checked; what does not hold is not claimed, and stands in the table nonetheless. Exit
code 1 when a claim fails.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

import claims as paper_claims
import plots
import torch
from lab import Digits, evaluate, fine_tune, untimed
from provenance import RESULTS, origin, processor

from cca_ds.alignment.losses import LOSSES
from cca_ds.console import progress
from cca_ds.files import write_atomic

Rows = list[dict[str, Any]]

GFT_BETAS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
GFT = ["loss.name=gft", "schedule.name=cosine", "schedule.final_fraction=0.05"]
# name -> epochs; each is sampled at every beta
GFT_RUNS = {"GFT, two epochs": 2, "GFT, six epochs": 6}


def compute(loss: str, epochs: float) -> float:
    """Forwards of one sequence for each image of the data, a backward being two."""
    spec = LOSSES[loss]
    return epochs * spec.rows_per_pair * spec.passes


def guidance_free_training(digits: Digits, name: str, epochs: int, seeds: range) -> Rows:
    """GFT over beta, every beta from one model, without guidance."""
    models = [fine_tune(digits, seed, [*GFT, f"batch.epochs={epochs}"]).model for seed in progress(seeds, name)]
    rows = []
    for beta in GFT_BETAS:
        repeats = [evaluate(digits, model, 0.0, seed, gft_beta=beta) for model, seed in zip(models, seeds, strict=True)]
        rows.append({"name": name, "s": 0.0, "beta": beta, "compute": compute("gft", epochs), **untimed(repeats)})
    return rows


def run_all(work: Path, repeats: int) -> Rows:
    """Rows of every run of GFT; those in `work` with the same number of repeats are reused."""
    work.mkdir(parents=True, exist_ok=True)
    digits, rows = Digits.shipped(work), []
    for name, epochs in GFT_RUNS.items():
        path = work / f"gft_{epochs}_epochs.json"
        stored = json.loads(path.read_text()) if path.is_file() else {}
        if stored.get("repeats") != repeats:
            stored = {"repeats": repeats, "rows": guidance_free_training(digits, name, epochs, range(repeats))}
            write_atomic(path, json.dumps(stored))
        rows += stored["rows"]
    return rows


def known_rows(folder: Path) -> dict[str, Rows]:
    """Guidance, CCA over lambda in one epoch, and CCA of three epochs at lambda 10, as `paper.py` measured them."""
    experiments = json.loads((folder / "digits_paper.json").read_text())["experiments"]
    guided = [{key: value for key, value in row.items() if key != "seconds"} for row in experiments["guidance"]]
    short = [row | {"name": "CCA, one epoch", "compute": compute("cca", 1)} for row in experiments["frontier"]]
    long = [
        row | {"lambda": 10.0, "compute": compute("cca", 3)}
        for row in experiments["losses"]
        if row["name"] == "CCA, three epochs"
    ]
    return {"guidance": guided, "CCA, one epoch": short, "CCA, three epochs": long}


def fid_at(rows: Rows, accuracy: float) -> float | None:
    """FID of a method at an accuracy, between its two measured points around it; None beyond them.

    `rows` go from the weakest setting to the strongest; those beyond the most accurate one, which lose accuracy, are
    left out.
    """
    points = [(row["accuracy"]["mean"], row["fid"]["mean"]) for row in rows]
    points = points[: points.index(max(points)) + 1]
    for (low, fid_low), (high, fid_high) in itertools.pairwise(points):
        if low <= accuracy <= high:
            return fid_low + (accuracy - low) / max(high - low, 1e-9) * (fid_high - fid_low)
    return None


def check(found: dict[str, Rows]) -> dict[str, bool]:
    """Claim (with its numbers) -> whether it holds."""
    claims = {}
    for name in GFT_RUNS:
        rows = [row for row in found["gft"] if row["name"] == name]
        best = max(rows, key=lambda row: row["accuracy"]["mean"])
        accuracy, fid = best["accuracy"]["mean"], best["fid"]["mean"]
        guided = paper_claims.at_accuracy(found["guidance"], accuracy, "fid")
        numbers = f"(beta {best['beta']:g}: {accuracy:.3f}, {fid:.3f} <= {guided:.3f})"
        claims[
            f"{name}: FID at its highest accuracy, without guidance, is at most guidance's at that accuracy, or at "
            f"its highest {numbers}"
        ] = fid <= guided
        plain, mixed = (next(row["accuracy"]["mean"] for row in rows if row["beta"] == beta) for beta in (1.0, 0.6))
        claims[
            f"{name}: one model, beta chosen at sampling, trades diversity for fidelity "
            f"(accuracy {plain:.3f} at beta 1, {mixed:.3f} at 0.6)"
        ] = mixed > plain
    return claims


def comparison(found: dict[str, Rows]) -> Rows:
    """FID of every method where CCA's own points are, for each compute: no claim, just the numbers."""
    table = []
    for name, ours in (("CCA, one epoch", "GFT, two epochs"), ("CCA, three epochs", "GFT, six epochs")):
        gft = [row for row in found["gft"] if row["name"] == ours]
        for row in found[name]:
            accuracy = row["accuracy"]["mean"]
            table.append(
                {
                    "forwards an image": row["compute"], "class accuracy": accuracy, "lambda of CCA": row["lambda"],
                    "FID of CCA": row["fid"]["mean"], "FID of GFT": fid_at(gft, accuracy),
                    "FID of guidance": fid_at(found["guidance"], accuracy),
                }
            )  # fmt: skip
    return table


def markdown(body: dict[str, Any]) -> str:
    """The comparison, every row that was measured here, and the claims."""
    lines = ["# CCA's successors on the digits", ""]
    lines += ["`{command}`, {date}, commit {commit}, {device}; mean and half-range of {repeats} seeds.".format(**body)]
    lines += [
        "",
        "Forwards an image: of one sequence while training, a backward being two. Guidance trains nothing and",
    ]
    lines += [
        "samples at twice the cost. `-`: the method does not reach this accuracy. GFT's and guidance's values are"
    ]
    lines += ["interpolated between measured points at CCA's accuracies."]
    for title, rows in (("At equal accuracy", body["comparison"]), ("GFT over beta", body["gft"])):
        keys = list(rows[0])
        lines += ["", f"## {title}", "", f"| {' | '.join(keys)} |", f"| {' | '.join('---' for _ in keys)} |"]
        lines += [f"| {' | '.join(_cell(row[key]) for key in keys)} |" for row in rows]
    both = [row for row in body["comparison"] if row["FID of GFT"] is not None]
    ahead = sum(row["FID of CCA"] < row["FID of GFT"] for row in both)
    lines += ["", f"At equal compute and accuracy CCA's FID is the lower one in {ahead} of {len(both)} points."]
    lines += ["", "## Claims", ""]
    lines += [f"- {'holds' if holds else 'FAILS'}: {claim}" for claim, holds in body["claims"].items()]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value['mean']:.3f} ± {value['spread']:.3f}"
    if isinstance(value, float):
        return f"{value:.3g}"
    return "-" if value is None else str(value)


def main() -> int:
    """Exit code 0 when every claim holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--work", type=Path, default=Path("runs/digits_paper"), help="finished runs, and the table of codes"
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = known_rows(RESULTS) | {"gft": run_all(arguments.work, arguments.repeats)}
    body = {
        **origin("python benchmarks/digits/successors.py", f"{processor()}, one thread"),
        "repeats": arguments.repeats,
        "gft": found["gft"],
        "comparison": comparison(found),
        "claims": check(found),
    }
    arguments.results.mkdir(parents=True, exist_ok=True)
    write_atomic(arguments.results / "digits_successors.json", json.dumps(body, indent=1) + "\n")
    write_atomic(arguments.results / "digits_successors.md", markdown(body))
    plots.draw_successors(found, arguments.results)
    for claim, holds in body["claims"].items():
        print(f"{'yes' if holds else 'NO '}  {claim}")
    return 0 if all(body["claims"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
