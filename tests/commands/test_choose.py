"""choose: of a round's checkpoints the one with the lowest FID, and the table of all rounds."""

import json
import shutil

import pytest

from cca_ds import choose, evaluate, sample
from cca_ds.checkpoints.load_model import load
from cca_ds.checkpoints.rounds import NEAR, rounds_table
from cca_ds.checkpoints.run_weights import run_weights
from tests.dist.runs import of_loss, scratch, train

pytestmark = pytest.mark.dist


def trained(folder):
    """A round whose run has checkpoints after two and four steps; trained once."""
    made = scratch() / "round"
    if not made.is_dir():
        settings = ("batch.max_steps=4", "checkpoint.every_steps=2", "checkpoint.keep_every=2")
        train(1, made / "run", *of_loss("ddo online"), *settings)
    shutil.copytree(made, folder)
    return folder


def scored(folder, step):
    """Scores of a checkpoint's samples, or at step 0 of the start's, as `slurm/choose.sh` makes them."""
    name = f"step_{step:08d}"
    run, output = folder / "run", folder / "scores" / name
    which = (
        ["--weights", run, "--checkpoint", run / "checkpoints" / name] if step else ["--recipe", run / "config.yaml"]
    )
    flags = [*which, "--output", output, "--npz"]
    assert sample.main([*map(str, flags), "--set", "sampling.images_per_class=3", "logging.progress=false"]) == 0
    recipe = ["--recipe", str(run / "config.yaml")]
    assert evaluate.main([str(output / "samples.npz"), *recipe, "--output", str(output / "scores.json")]) == 0
    return json.loads((output / "scores.json").read_text())["metrics"]


def test_the_lowest_fid_is_exported_and_every_checkpoint_is_in_the_table(tmp_path, capsys):
    first = trained(tmp_path / "round1")
    found = {2: scored(first, 2)}
    for missing, left in (("the weights that it started from", 2), ("step_00000004", 1)):
        capsys.readouterr()
        assert choose.main(["--round", str(first)]) == 2
        assert f"{missing}: has no scores (of 3 to score {left} are left): sample it" in capsys.readouterr().err
        found[0] = found.get(0) or scored(first, 0)
    worse = first / "scores/step_00000000/scores.json"  # whatever four steps made of it
    found[0]["fid"] = found[2]["fid"] + 9.0
    worse.write_text(json.dumps(json.loads(worse.read_text()) | {"metrics": found[0]}))
    assert not (first / "best.safetensors").exists()
    found[4] = scored(first, 4)
    with open(first / "run/metrics.jsonl", "a") as lines:
        lines.write('{"step": 5, "rewards/acc')  # cut by a full disk
    best = min(found, key=lambda step: found[step]["fid"])
    assert choose.main(["--round", str(first)]) == 0
    table = (tmp_path / "rounds.md").read_text()
    assert table in capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    lines = [json.loads(line) for line in (first / "run/metrics.jsonl").read_text().splitlines()[:4]]
    assert rows[0] == [
        "round1", "0", f"{found[0]['fid']:.3f}", f"{found[0]['inception_score']:.2f}", "-", "",
    ]  # fmt: skip
    for row, step in zip(rows[1:], (2, 4), strict=True):
        accuracies = [line["rewards/accuracies"] for line in lines if line["step"] <= step]
        assert len(lines) < NEAR  # so that all up to the checkpoint count
        assert row == [
            "round1", str(step), f"{found[step]['fid']:.3f}", f"{found[step]['inception_score']:.2f}",
            f"{sum(accuracies) / len(accuracies):.3f}", "chosen" if step == best else "",
        ]  # fmt: skip
    expected = run_weights(first / "run", first / "run/checkpoints" / f"step_{best:08d}", False).state
    exported = load(first / "best.safetensors")
    assert exported.recipe.loss.name == "ddo"
    assert all((parameter == expected[name]).all() for name, parameter in exported.model.named_parameters())


def test_a_round_that_made_the_model_no_better_ends_the_rounds(tmp_path, capsys):
    folder = trained(tmp_path / "round1")
    for step, fid in ((0, 1.5), (2, 1.75), (4, 1.625)):
        (folder / f"scores/step_{step:08d}").mkdir(parents=True)
        scores = {"metrics": {"fid": fid, "inception_score": 2}}
        (folder / f"scores/step_{step:08d}/scores.json").write_text(json.dumps(scores))
    assert choose.main(["--round", str(folder)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no checkpoint has a lower FID than the 1.500" in line and "(the next is step 4 with 1.625)" in line
    assert "| round1 | 0 | 1.500 | 2.00 | - | chosen |" in (tmp_path / "rounds.md").read_text().splitlines()
    assert not (folder / "chosen.json").exists() and not (folder / "best.safetensors").exists()


def test_rounds_are_listed_in_their_order(tmp_path):
    for number in (1, 2, 10):
        folder = tmp_path / f"round{number}"
        folder.mkdir()
        values = {"step": number, "fid": 1.0, "inception_score": 2.0, "accuracy": None}
        (folder / "chosen.json").write_text(json.dumps({"step": number, "candidates": [values]}))
    assert [line.split("|")[1].strip() for line in rounds_table(tmp_path, {}).splitlines()[2:]] == [
        "round1", "round2", "round10",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder / "run"), "holds no checkpoint; train the round first"),
        (lambda folder: (folder / "scores/step_00000002/scores.json").write_text("{"), "scores.json: "),
        (
            lambda folder: (folder / "scores/step_00000002/scores.json").write_text('{"metrics": {"fid": null}}'),
            "delete it and evaluate the samples again",
        ),
    ],
    ids=["no run", "no JSON", "no number"],
)
def test_what_cannot_be_judged_is_one_line(damage, message, tmp_path, capsys):
    folder = trained(tmp_path / "round1")
    for step in (0, 2, 4):
        (folder / f"scores/step_{step:08d}").mkdir(parents=True)
        (folder / f"scores/step_{step:08d}/scores.json").write_text('{"metrics": {"fid": 1, "inception_score": 2}}')
    damage(folder)
    assert choose.main(["--round", str(folder)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert (
        not (tmp_path / "rounds.md").exists()
        and not (folder / "chosen.json").exists()
        and not (folder / "best.safetensors").exists()
    )
