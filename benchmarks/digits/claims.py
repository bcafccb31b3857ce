"""The paper's claims, as inequalities on the means that `paper.py` measured."""

from __future__ import annotations

import itertools
from typing import Any

Rows = list[dict[str, Any]]
Claims = list[tuple[str, bool]]


def check(found: dict[str, Rows]) -> dict[str, bool]:
    """Claim (with its numbers) -> whether it holds, for the claims whose experiments were run."""
    groups = {
        _one_epoch: {"guidance", "losses"},
        _losses: {"guidance", "losses"},
        _frontier: {"guidance", "frontier"},
        _combined: {"guidance", "combined"},
        _beta: {"beta"},
        _conditioned: {"conditioned"},
        _curves: {"curves"},
        _var: {"var"},
    }
    return dict(claim for group, needed in groups.items() if needed <= found.keys() for claim in group(found))


def at_accuracy(rows: Rows, accuracy: float, name: str) -> float:
    """`name` of a guided model at the scale of this accuracy, interpolated between the two measured scales around it.

    Scales beyond the most accurate one, where guidance lowers accuracy, are left out.
    """
    points = [(row["accuracy"]["mean"], row[name]["mean"]) for row in sorted(rows, key=lambda row: row["s"])]
    points = points[: points.index(max(points)) + 1]
    for (low, value_low), (high, value_high) in itertools.pairwise(points):
        if low <= accuracy <= high:
            share = (accuracy - low) / max(high - low, 1e-9)
            return value_low + share * (value_high - value_low)
    return points[0][1] if accuracy < points[0][0] else points[-1][1]


def _mean(rows: Rows, model: str, value: str) -> float:
    return next(row[value]["mean"] for row in rows if row["name"] == model)


def _one_epoch(found: dict[str, Rows]) -> Claims:
    base, ours = found["guidance"], "CCA, one epoch"
    accuracy, fid = (_mean(found["losses"], ours, value) for value in ("accuracy", "fid"))
    guided_fid = at_accuracy(base, accuracy, "fid")
    time = _mean(found["losses"], ours, "share of guided time")
    free = base[0]["accuracy"]["mean"]
    return [
        (
            f"Figure 1: CCA without guidance is more accurate than the base ({accuracy:.3f} > {free:.3f})",
            accuracy > free,
        ),
        (
            f"Table 2: its FID is at most that of guidance at equal accuracy ({fid:.3f} <= {guided_fid:.3f})",
            fid <= guided_fid,
        ),
        (f"Table 2: at no more than 0.6 of the sampling time ({time:.2f})", time <= 0.6),
    ]


def _losses(found: dict[str, Rows]) -> Claims:
    value = {
        name: {row["name"]: row[name]["mean"] for row in found["losses"]} for name in ("positives", "fid", "accuracy")
    }
    ours, base = "CCA, one epoch", found["guidance"][0]["accuracy"]["mean"]
    fallen, kept = value["positives"]["DPO"], value["positives"][ours]
    dpo, cca = value["fid"]["DPO"], value["fid"][ours]
    gain, little = value["accuracy"][ours] - base, value["accuracy"]["unlearning"] - base
    return [
        (f"Table 3: DPO's positives lose likelihood ({fallen:.1f} nats, CCA {kept:+.1f})", fallen < min(-1, kept - 1)),
        (f"Table 3: DPO pays with FID ({dpo:.3f} > {cca:.3f} of CCA)", dpo > cca),
        (f"Table 3: unlearning gains less than CCA (accuracy {little:+.3f} against {gain:+.3f})", little < 0.7 * gain),
    ]


def _frontier(found: dict[str, Rows]) -> Claims:
    by_lambda = {row["lambda"]: row for row in found["frontier"]}
    zero, ten, hundred = (by_lambda[value]["accuracy"]["mean"] for value in (0.0, 10.0, 100.0))
    worst = min(
        at_accuracy(found["guidance"], row["accuracy"]["mean"], "fid") - row["fid"]["mean"]
        for value, row in by_lambda.items()
        if 3 <= value <= 30
    )
    numbers = f"accuracy {zero:.3f} at 0, {ten:.3f} at 10, {hundred:.3f} at 100"
    return [
        (f"Figure 4: a larger lambda buys fidelity ({numbers})", zero < ten <= hundred + 0.01),
        (
            f"Figure 4: for lambda 3 to 30 FID is at most that of guidance at equal accuracy (margin {worst:.3f})",
            worst >= 0,
        ),
    ]


def _combined(found: dict[str, Rows]) -> Claims:
    combined = min(row["fid"]["mean"] for row in found["combined"])
    alone = min(row["fid"]["mean"] for row in found["guidance"])
    return [
        (
            f"Figures 5, 6: CCA with a small lambda and guidance reaches guidance's best FID "
            f"({combined:.3f} <= {alone:.3f} + 0.01)",
            combined <= alone + 0.01,
        )
    ]


def _beta(found: dict[str, Rows]) -> Claims:
    small, *_, large = (row["accuracy"]["mean"] for row in found["beta"])
    return [(f"Figure 9: a smaller beta aligns more (accuracy {small:.3f} at 0.1, {large:.3f} at 2)", small > large)]


def _conditioned(found: dict[str, Rows]) -> Claims:
    by_lambda = {row["lambda"]: row for row in found["conditioned"]}
    accuracy, fid = ([by_lambda[value][name]["mean"] for value in (1.0, 10.0, 100.0)] for name in ("accuracy", "fid"))
    numbers = f"accuracy {accuracy[0]:.3f} at 1, {accuracy[1]:.3f} at 10; FID {fid[0]:.3f}, {fid[1]:.3f}, "
    return [
        (
            f"Table 5: lambda chosen at sampling time trades FID for fidelity ({numbers}{fid[2]:.3f} at 100)",
            accuracy[0] < accuracy[1] and fid[0] < fid[1] < fid[2],
        )
    ]


def _curves(found: dict[str, Rows]) -> Claims:
    last = found["curves"][-8:]
    up, down = (sum(row[tag]["mean"] for row in last) / len(last) for tag in ("logps/chosen", "logps/rejected"))
    return [
        (
            f"Figure 10: negatives lose likelihood, positives much less ({down:.1f} against {up:+.1f} nats)",
            down < min(-1, up - 1),
        )
    ]


def _var(found: dict[str, Rows]) -> Claims:
    rows = [row for row in found["var"] if row["name"] == "VAR base"]
    ours = found["var"][-1]
    accuracy, fid = ours["accuracy"]["mean"], ours["fid"]["mean"]
    free, guided = rows[0]["accuracy"]["mean"], at_accuracy(rows, accuracy, "fid")
    return [
        (
            f"Table 2, VAR: CCA without guidance beats the base's accuracy ({accuracy:.3f} > {free:.3f})",
            accuracy > free,
        ),
        (
            f"Table 2, VAR: FID near that of guidance at equal accuracy ({fid:.3f} <= 1.1 x {guided:.3f})",
            fid <= 1.1 * guided,
        ),
    ]


def markdown(body: dict[str, Any]) -> str:
    """Every experiment as a table, then the claims."""
    lines = [
        "# The paper's findings on the digits",
        "",
        f"`{body['command']}`, {body['date']}, commit {body['commit']}, {body['device']}; mean and half-range of "
        f"{body['repeats']} seeds.",
    ]
    for name, rows in body["experiments"].items():
        if name == "curves":
            rows = rows[:: max(1, len(rows) // 8)]
        lines += table(name, rows)
    return "\n".join([*lines, *claims_list(body["claims"])]) + "\n"


def table(title: str, rows: Rows) -> list[str]:
    """A section with a table of rows, whose columns are the first row's keys."""
    keys = list(rows[0])
    lines = ["", f"## {title}", "", f"| {' | '.join(keys)} |", f"| {' | '.join('---' for _ in keys)} |"]
    return lines + [f"| {' | '.join(_cell(row.get(key, '')) for key in keys)} |" for row in rows]


def claims_list(claims: dict[str, bool]) -> list[str]:
    """A section that says of each claim whether it holds."""
    return ["", "## Claims", "", *(f"- {'holds' if holds else 'FAILS'}: {claim}" for claim, holds in claims.items())]


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value['mean']:.3f} ± {value['spread']:.3f}"
    if isinstance(value, float):
        return f"{float(f'{value:.3g}'):g}"  # three digits, and 1000 in place of 1e+03
    return "-" if value is None else str(value)
