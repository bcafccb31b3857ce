"""CCA's successors on the handwritten digits, beside CCA and guidance on one frontier, at equal compute.

    python benchmarks/digits/successors.py                # three seeds, about half an hour on one CPU core
    python benchmarks/digits/successors.py --repeats 1 --results look

Compute is counted in forwards of one sequence, a backward being two (`LossSpec.passes`): a pair of CCA and one of
direct discriminative optimization (DDO) cost 8, one of guidance-free training (GFT) 4. An image that is drawn costs one
more: its codes pass the model once, one by one. So two epochs of GFT cost one of CCA, six cost three, and DDO gets
fewer epochs. Every method trains with the digits recipe's optimizer and batch; GFT by a cosine to a twentieth, as its
public command; DDO without dropout at a tenth of the rate, found on a seed that is not among those measured. Guidance
and CCA are read from digits_paper.json, which `paper.py` measured with the same seeds; the others are measured here. An
interrupted command continues with the first unfinished run.

A claim is an inequality that is checked; what does not hold is not claimed, and stands in the table nonetheless. Exit
code 1 when a claim fails.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

import claims as paper_claims
import plots
import torch
from lab import Digits, Tuned, draw_table, evaluate, fine_tune, mean_and_spread, untimed
from provenance import RESULTS, origin, processor

from cca_ds.alignment.losses import LOSSES
from cca_ds.console import progress
from cca_ds.files import write_atomic

Rows = list[dict[str, Any]]

DRAWING_SEED = 1000  # and the run's seed: other images than those that are scored
GFT_BETAS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
GFT = ["loss.name=gft", "schedule.name=cosine", "schedule.final_fraction=0.05"]
# name -> epochs; each is sampled at every beta
GFT_RUNS = {"GFT, two epochs": 2, "GFT, six epochs": 6}
DDO = ["loss.name=ddo", "model.dropout=false", "optimizer.learning_rate=1e-5"]
DDO_LAMBDAS = (0.3, 1.0, 2.0, 4.0)
# name -> (stages before the last, the last's epochs); a stage is (loss, its settings, epochs)
DDO_RUNS = {
    "DDO, one round": ((), 7 / 8),
    "DDO, two rounds": ((("ddo", [*DDO, "loss.lambda=1"], 11 / 8),), 11 / 8),
    "CCA, then DDO": ((("cca", ["loss.lambda=3"], 3 / 2),), 11 / 8),
}


def compute(loss: str, epochs: float) -> float:
    """Forwards of one sequence for each image of the data, a backward being two; one for each image that is drawn."""
    spec = LOSSES[loss]
    return epochs * spec.rows_per_pair * spec.passes + (spec.negatives == "generated")


def guidance_free_training(digits: Digits, name: str, epochs: int, seeds: range) -> Rows:
    """GFT over beta, every beta from one model, without guidance."""
    models = [fine_tune(digits, seed, [*GFT, f"batch.epochs={epochs}"]).model for seed in progress(seeds, name)]
    rows = []
    for beta in GFT_BETAS:
        repeats = [evaluate(digits, model, 0.0, seed, gft_beta=beta) for model, seed in zip(models, seeds, strict=True)]
        rows.append({"name": name, "s": 0.0, "beta": beta, "compute": compute("gft", epochs), **untimed(repeats)})
    return rows


def stage(digits: Digits, seed: int, loss: str, settings: list[str], epochs: float) -> Tuned:
    """A run from `digits.base`, which is its reference too and draws DDO's images."""
    settings = [*settings, f"batch.epochs={epochs}"]
    if LOSSES[loss].negatives != "generated":
        return fine_tune(digits, seed, settings)
    with tempfile.TemporaryDirectory() as folder:
        table = draw_table(digits, Path(folder) / "generated", seed + DRAWING_SEED)
        return fine_tune(digits, seed, [*settings, f"data.generated={table}"])


def discriminative_optimization(digits: Digits, name: str, seeds: range) -> Rows:
    """DDO over the last round's lambda, without guidance; each stage starts from the one before."""
    before, epochs = DDO_RUNS[name]
    found: dict[float, list[tuple[dict[str, float], float]]] = {value: [] for value in DDO_LAMBDAS}
    for seed in progress(seeds, name):
        started = digits
        for loss, settings, length in before:
            started = replace(started, base=stage(started, seed, loss, settings, length).model)
        for lambda_ in DDO_LAMBDAS:
            tuned = stage(started, seed, "ddo", [*DDO, f"loss.lambda={lambda_}"], epochs)
            last = [values["rewards/accuracies"] for values in tuned.history[-10:]]
            found[lambda_].append((evaluate(digits, tuned.model, 0.0, seed), sum(last) / len(last)))
    cost = sum(compute(loss, length) for loss, _, length in before) + compute("ddo", epochs)
    return [
        {"name": name, "s": 0.0, "lambda": lambda_, "compute": cost, **untimed([scores for scores, _ in repeats]),
         "real against generated": mean_and_spread([accuracy for _, accuracy in repeats])}
        for lambda_, repeats in found.items()
    ]  # fmt: skip


def run_all(work: Path, repeats: int) -> dict[str, Rows]:
    """Rows of every run of GFT and of DDO; those in `work` with the same number of repeats are reused."""
    work.mkdir(parents=True, exist_ok=True)
    digits, seeds = Digits.shipped(work), range(repeats)
    runs = {f"gft_{epochs}_epochs": partial(guidance_free_training, digits, name, epochs, seeds)
            for name, epochs in GFT_RUNS.items()}  # fmt: skip
    runs |= {name.lower().replace(",", "").replace(" ", "_"): partial(discriminative_optimization, digits, name, seeds)
             for name in DDO_RUNS}  # fmt: skip
    rows: Rows = []
    for file, measure in runs.items():
        path = work / f"{file}.json"
        stored = json.loads(path.read_text()) if path.is_file() else {}
        if stored.get("repeats") != repeats:
            stored = {"repeats": repeats, "rows": measure()}
            write_atomic(path, json.dumps(stored))
        rows += stored["rows"]
    return {"gft": [row for row in rows if row["name"] in GFT_RUNS],
            "ddo": [row for row in rows if row["name"] in DDO_RUNS]}  # fmt: skip


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
    base = next(row for row in found["guidance"] if row["s"] == 0.0)
    for name in DDO_RUNS:
        best = min((row for row in found["ddo"] if row["name"] == name), key=lambda row: row["fid"]["mean"])
        fid, was = best["fid"]["mean"], base["fid"]["mean"]
        claims[f"{name}: lower FID than the base model (lambda {best['lambda']:g}: {fid:.3f} < {was:.3f})"] = fid < was
        accuracy, was = best["accuracy"]["mean"], base["accuracy"]["mean"]
        claims[f"{name}: at that lambda no lower class accuracy than the base model ({accuracy:.3f} >= {was:.3f})"] = (
            accuracy >= was
        )
    lowest = min(row["fid"]["mean"] for row in found["ddo"] if row["name"] == "CCA, then DDO")
    others = min(row["fid"]["mean"] for name, rows in found.items() if name != "ddo" for row in rows)
    claims[f"CCA, then DDO: the lowest FID of all ({lowest:.3f} < {others:.3f}, the lowest without DDO)"] = (
        lowest < others
    )
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
    for title, rows in (
        ("At equal accuracy", body["comparison"]),
        ("GFT over beta", body["gft"]),
        ("DDO over lambda", body["ddo"]),
    ):
        lines += paper_claims.table(title, rows)
    both = [row for row in body["comparison"] if row["FID of GFT"] is not None]
    ahead = sum(row["FID of CCA"] < row["FID of GFT"] for row in both)
    lines += ["", f"At equal compute and accuracy CCA's FID is the lower one in {ahead} of {len(both)} points."]
    return "\n".join([*lines, *paper_claims.claims_list(body["claims"])]) + "\n"


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
    found = known_rows(RESULTS) | run_all(arguments.work, arguments.repeats)
    body = {
        **origin("python benchmarks/digits/successors.py", f"{processor()}, one thread"),
        "repeats": arguments.repeats,
        "gft": found["gft"],
        "ddo": found["ddo"],
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
