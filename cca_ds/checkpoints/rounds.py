"""Rounds of DDO: of each, the checkpoint with the lowest FID becomes the next round's reference.

FOLDER/round1/generated/                     images that the round's reference drew
FOLDER/round1/run/                           trained on them
FOLDER/round1/scores/step_00000500/scores.json   of the checkpoint's samples, by cca-evaluate; step 0 is the start
FOLDER/round1/best.safetensors, chosen.json  the chosen checkpoint, and the scores of all
FOLDER/round2/...
FOLDER/rounds.md                             all rounds in one table
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cca_ds.checkpoints.export_weights import export_weights
from cca_ds.checkpoints.store import complete_checkpoints, folder_name
from cca_ds.files import write_atomic
from cca_ds.reporting.recorded_run import read_run
from cca_ds.untrusted import decoding, read_json

BEST, CHOSEN, TABLE = "best.safetensors", "chosen.json", "rounds.md"
NEAR = 50  # steps up to the checkpoint's over which the accuracy is averaged


class RoundError(ValueError):
    """A round that cannot be judged: one line with the remedy."""


@dataclass(frozen=True)
class Candidate:
    """A checkpoint of a round, or its start (step 0): scores, and the accuracy of real against generated images
    while it was trained.
    """

    step: int
    fid: float
    inception_score: float
    accuracy: float | None


def choose(round_folder: Path) -> str:
    """Export the round's checkpoint with the lowest FID, and write the table of all rounds; returns the table.

    Raises:
        RoundError: no checkpoint, one without scores, or scores that cannot be read; or, with the table written, none
            better than what the round started from.
    """
    run, scores = round_folder / "run", round_folder / "scores"
    found = sorted(complete_checkpoints(run / "checkpoints"))
    if not found:
        raise RoundError(f"{run}: holds no checkpoint; train the round first")
    checkpoints = {int(path.name.removeprefix("step_")): path for path in found}
    steps = [0, *sorted(checkpoints)]
    if left := [step for step in steps if not (scores / folder_name(step) / "scores.json").is_file()]:
        what = checkpoints.get(left[0], f"{run}: the weights that it started from")
        raise RoundError(
            f"{what}: has no scores (of {len(steps)} to score {len(left)} are left): sample it and evaluate the "
            f"samples into {scores / folder_name(left[0])}/scores.json"
        )
    accuracies = read_run(run).series.get("rewards/accuracies", [])
    candidates = [_candidate(round_folder, step, accuracies) for step in steps]
    best = min(candidates, key=lambda candidate: candidate.fid)
    if best.step:
        export_weights(run, round_folder / BEST, checkpoint=checkpoints[best.step])
    chosen = {"step": best.step, "candidates": [asdict(candidate) for candidate in candidates]}
    rounds = round_folder.absolute().parent  # of "." too
    table = rounds_table(rounds, {round_folder.absolute().name: chosen})
    write_atomic(rounds / TABLE, table)
    if not best.step:
        second = min(candidates[1:], key=lambda candidate: candidate.fid)
        raise RoundError(
            f"{round_folder}: no checkpoint has a lower FID than the {best.fid:.3f} of the start (the next is step "
            f"{second.step} with {second.fid:.3f}), so the rounds end here, see {rounds / TABLE}; in another folder, a "
            "lower optimizer.learning_rate or loss.lambda, or earlier checkpoints, may do better"
        )
    write_atomic(round_folder / CHOSEN, json.dumps(chosen, indent=1) + "\n")  # last: with it the round is done
    return table


def rounds_table(folder: Path, new: dict[str, dict[str, Any]]) -> str:
    """Markdown: a row for each checkpoint of each round that has been judged, the chosen ones marked.

    Args:
        folder: of all rounds.
        new: content of a round's chosen.json that is not written yet, by the round's name.
    """
    rows = ["| round | step | FID | IS | accuracy, real against generated | |", "| --- | --- | --- | --- | --- | --- |"]
    names = {path.parent.name for path in folder.glob(f"*/{CHOSEN}")} | new.keys()
    for name in sorted(names, key=lambda name: [int(digits) for digits in re.findall(r"\d+", name)]):
        path = folder / name / CHOSEN
        with decoding(path, RoundError, "delete it and choose again"):
            found = new[name] if name in new else read_json(path)
            for values in found["candidates"]:
                one = Candidate(**values)
                accuracy = "-" if one.accuracy is None else f"{one.accuracy:.3f}"
                mark = "chosen" if one.step == found["step"] else ""
                cells = (name, one.step, f"{one.fid:.3f}", f"{one.inception_score:.2f}", accuracy, mark)
                rows.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(rows) + "\n"


def _candidate(round_folder: Path, step: int, accuracies: list[tuple[int, float]]) -> Candidate:
    path = round_folder / "scores" / folder_name(step) / "scores.json"
    with decoding(path, RoundError, "delete it and evaluate the samples again"):
        values = read_json(path)["metrics"]
        fid, inception_score = float(values["fid"]), float(values["inception_score"])
    near = [value for at, value in accuracies if step - NEAR < at <= step]
    return Candidate(step, fid, inception_score, sum(near) / len(near) if near else None)
