"""`--dry_run` for every recipe, without weights: its numbers against the golden ones and arithmetic by hand."""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cca_ds import train
from cca_ds.config.deepspeed_file import read_ds_config
from cca_ds.config.recipes import load_recipe, recipe_names
from cca_ds.data.manifest import MANIFEST_NAME, Manifest, Shard, expected_images
from cca_ds.models.cost import meta_model, model_cost
from cca_ds.planning.dry_run import describe, memory_lines

ZERO3 = Path(__file__).parents[2] / "ds_configs" / "zero3.json"
NINE = [
    name for name in recipe_names() if name.endswith(("-b", "-l", "-xl", "-xxl", "-3b", "-d16", "-d20", "-d24", "-d30"))
]
ROWS = ("weights", "gradients", "optimizer and master weights", "reference", "total")


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_in_seconds_and_without_weights(name, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    started = time.process_time()
    text = describe(load_recipe(name), read_ds_config(ZERO3))
    assert time.process_time() - started < 20
    for heading in ("# resolved recipe", "# model", "# batch and steps", "# memory"):
        assert heading in text
    if name in NINE:
        assert "1,281,167 images (the paper's ImageNet; " in text
        assert "5,004 steps" in text  # 1,281,167 // 256


@pytest.mark.parametrize("name", NINE)
def test_parameters_are_the_originals(name, golden):
    recorded = json.loads((golden / "state_dict_shapes.json").read_text())
    original = name.replace("var-", "var/").replace("llamagen-", "llamagen/GPT-")
    found = next(values for key, values in recorded.items() if key.lower() == original.lower())
    text = describe(load_recipe(name), {})
    assert f"{found['params']:,} parameters" in text
    parameters = list(meta_model(load_recipe(name).model.preset).parameters())
    assert parameters and all(parameter.is_meta for parameter in parameters)


@pytest.mark.parametrize("name", ["llamagen-3b", "var-d30"])
def test_guidance_free_training_costs_half_of_cca(name):
    """One sequence a pair, no reference, one forward without gradient; and the embedding of beta's parameters."""
    usual, text = (describe(load_recipe(recipe), {}) for recipe in (name, f"{name}-gft"))
    assert "cost: 8 forwards a pair: 2 x forward and backward (3) + reference (1)\n" in usual
    one = "cost: 4 forwards a pair: 1 x forward and backward (3) + without gradient (1), 0.50 times cca's 8\n"
    assert one in text and "256 sequences through the policy" in text and ", reference none" in text
    plain, ours = (int(re.search(r"([\d,]+) parameters", shown)[1].replace(",", "")) for shown in (usual, text))
    width = model_cost(name).width
    assert ours - plain == (256 + 1) * width + (width + 1) * width


def test_a_dry_run_imports_no_deepspeed():
    program = "import sys; from cca_ds.train import main; main(sys.argv[1:]); assert 'deepspeed' not in sys.modules"
    arguments = ["--ds_config", str(ZERO3), "--dry_run"]
    environment = os.environ | {"PYTHONPATH": str(ZERO3.parents[1])}
    subprocess.run([sys.executable, "-c", program, *arguments], check=True, stdout=subprocess.DEVNULL, env=environment)


def table(lines: list[str]) -> dict[str, list[float]]:
    found = {}
    for line in lines:
        match = re.match(r"(\D+?)((?:\s+[\d.]+){4})$", line)
        if match:
            found[match[1]] = [float(number) for number in match[2].split()]
    return found


def memory_table(recipe, ds_config, parameters, ranks):
    """The dry run's memory of a recipe's model, as if it had this many parameters."""
    run, ds = load_recipe(recipe), read_ds_config(ZERO3.with_name(f"{ds_config}.json"))
    model = replace(model_cost(run.model.preset), parameters=parameters)
    return table(memory_lines(run, ds, model, ranks))


def test_memory_by_stage_by_hand():
    """1 B parameters on 4 GPUs: 2 bytes of weights, 4 of gradients, 12 of optimizer, divided where sharded."""
    rows = memory_table("llamagen-3b", "zero3", 2**30, ranks=4)
    assert rows["weights"] == [2.0, 2.0, 2.0, 0.5]
    assert rows["gradients"] == [4.0, 4.0, 1.0, 1.0]
    assert rows["optimizer and master weights"] == [12.0, 3.0, 3.0, 3.0]
    assert rows["reference"] == [2.0] * 4
    for stage in range(4):
        parts = sum(values[stage] for key, values in rows.items() if key != "total")
        assert rows["total"][stage] == pytest.approx(parts, abs=0.05)
    assert sum(name in rows for name in ROWS) == len(ROWS)


def test_offload_counts_at_the_stages_that_have_it():
    rows = memory_table("llamagen-3b", "zero3_offload", 2**30, ranks=4)
    assert rows["weights"] == [2.0, 2.0, 2.0, 0.0]
    assert rows["optimizer and master weights"] == [12.0, 0.0, 0.0, 0.0]


def test_no_reference_for_maximum_likelihood():
    rows = memory_table("digits_pretrain", "zero3", 10**6, ranks=1)
    assert rows["reference"] == [0.0] * 4


def test_images_of_an_epoch_from_the_manifest(tmp_path):
    manifest = Manifest(
        2048, 10, 1, 576, 16384, "llamagen", "llamagen-vq16", "00", shards=(Shard("a.arrow", 2048, 1, "00"),)
    )
    (tmp_path / MANIFEST_NAME).write_text(replace(manifest, label_histogram=(2048,) + (0,) * 9).to_json())
    run = load_recipe("llamagen-b", [f"data.codes={tmp_path}", "batch.epochs=3", "batch.max_steps=20"])
    assert expected_images(run.data.codes)[0] == 2048
    text = describe(run, {})
    assert "2,048 images (the manifest of" in text and ", 8 steps" in text
    assert "3 epoch(s), 20 steps (batch.max_steps; 24 without)" in text


def test_batch_on_the_ranks_of_the_launcher(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "16")
    text = describe(load_recipe("llamagen-b"), {})
    assert "on 16 equal ranks: at most 16 pairs each, in 2 forwards of at most 8" in text


def test_from_the_command_line(capsys):
    arguments = ["--ds_config", str(ZERO3), "--recipe", "GPT-B", "--set", "loss.beta=0.5", "--dry_run"]
    assert train.main(arguments) == 2  # the recipe's codes are not there
    shown = capsys.readouterr().out
    assert "beta: 0.5" in shown and "110,888,448 parameters" in shown and "stage 3 *" in shown


def test_a_model_that_cannot_be_built_is_one_line(capsys):
    arguments = ["--ds_config", str(ZERO3), "--set", "model.overrides.dim=130", "--dry_run"]
    assert train.main(arguments) == 2
    shown = capsys.readouterr().err.strip()
    assert len(shown.splitlines()) == 1 and "130" in shown
