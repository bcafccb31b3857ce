"""DeepSpeed's file beside the recipe: every shipped one loads, conflicts name both, "auto" is filled."""

import json
from pathlib import Path

import pytest

from cca_ds.config.deepspeed_file import conflicts, fill_ds_config, read_ds_config, resolve_precision, zero_stage
from cca_ds.config.recipes import ConfigError, load_recipe, recipe_names

REPOSITORY = Path(__file__).parents[2]
FILES = sorted(path for path in (REPOSITORY / "ds_configs").rglob("*.json"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_shipped_file_goes_with_every_recipe(path):
    ds = read_ds_config(path)
    for name in recipe_names():
        assert conflicts(ds, load_recipe(name)) == []
    assert zero_stage(ds) == (2 if path.name.startswith("zero2") else 3)


def filled(ds: dict, fused: bool = False) -> dict:
    return fill_ds_config(
        ds, load_recipe("var-d30"), world_size=4, forwards=8, micro_size=8, precision="bf16", fused=fused
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_auto_is_left(path):
    ds = read_ds_config(path)
    result = filled(ds)
    assert '"auto"' not in json.dumps(result)
    assert result["train_batch_size"] == 256 and result["gradient_accumulation_steps"] == 8
    assert result["train_micro_batch_size_per_gpu"] == 8 and result["gradient_clipping"] == 2.0
    assert result["optimizer"]["params"]["lr"] == 2e-5 and result["optimizer"]["params"]["betas"] == [0.9, 0.95]
    assert (result["bf16"]["enabled"], result["fp16"]["enabled"]) == (True, False)
    assert ds == read_ds_config(path)  # the file as read is left alone


def test_linear_of_the_whole_process_is_left_alone():
    assert filled({"zero_optimization": {"stage": 3}})["zero_optimization"]["memory_efficient_linear"] is False


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_adamw_is_fused_where_the_update_runs_on_a_gpu(path):
    ds = read_ds_config(path)
    on_host = "offload_optimizer" in ds["zero_optimization"]
    assert filled(ds, fused=True)["optimizer"]["params"].get("fused", False) == (not on_host)
    assert "fused" not in filled(ds)["optimizer"]["params"]
    ds["optimizer"]["params"]["fused"] = False  # the file's own choice is kept
    assert filled(ds, fused=True)["optimizer"]["params"]["fused"] is False


@pytest.mark.parametrize(
    ("ds", "both"),
    [
        ({"train_batch_size": 64}, ("train_batch_size=64", "batch.global_size=256")),
        ({"train_micro_batch_size_per_gpu": 3}, ("train_micro_batch_size_per_gpu=3", "batch.micro_size=8")),
        ({"gradient_clipping": 0.5}, ("gradient_clipping=0.5", "optimizer.grad_clip=1.0")),
        ({"optimizer": {"type": "Lamb"}}, ("optimizer.type=Lamb", "optimizer.name=adamw")),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}},
            ("optimizer.params.lr=0.001", "optimizer.learning_rate=1e-05"),
        ),
        (
            {"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.999]}}},
            ("optimizer.params.betas=[0.9, 0.999]", "optimizer.betas=[0.9, 0.95]"),
        ),
        ({"fp16": {"enabled": True}}, ("fp16.enabled=true", "precision=bf16")),
        ({"bf16": {"enabled": False}}, ("bf16.enabled=false", "precision=bf16")),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, ("bf16.enabled", "fp16.enabled")),
        ({"gradient_accumulation_steps": 4}, ("gradient_accumulation_steps=4", "batch")),
        ({"scheduler": {"type": "WarmupLR"}}, ("scheduler", "schedule section")),
        ({"zero_optimization": {"stage": 4}}, ("zero_optimization.stage=4", "0, 1, 2, 3")),
    ],
)
def test_a_conflict_names_both(ds, both):
    precision = "auto" if len(ds) == 2 else "bf16"
    run = load_recipe("llamagen-3b", [f"precision={precision}", "batch.micro_size=8"])
    found = conflicts(ds, run, "my.json")
    assert len(found) == 1
    assert found[0].startswith("my.json") and all(part in found[0] for part in both), found


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_fp16_wants_a_stage_that_scales_the_loss(stage):
    by_file = {"zero_optimization": {"stage": stage}, "fp16": {"enabled": True}}
    by_recipe = {"zero_optimization": {"stage": stage}, "fp16": {"enabled": "auto"}}
    found = [conflicts(by_file, load_recipe("digits")), conflicts(by_recipe, load_recipe("digits", ["precision=fp16"]))]
    for problems in found:
        assert len(problems) == (stage == 0)
        assert all("stage=0 with precision=fp16" in line and "use stage 1" in line for line in problems)
    assert conflicts(by_recipe, load_recipe("digits", ["precision=bf16"])) == []


def test_all_conflicts_at_once():
    assert len(conflicts({"train_batch_size": 1, "gradient_clipping": 9}, load_recipe("digits"))) == 2


def test_values_equal_to_the_recipes_are_no_conflict():
    ds = {"train_batch_size": 256, "gradient_clipping": 1, "optimizer": {"type": "AdamW", "params": {"lr": 1e-05}}}
    assert conflicts(ds, load_recipe("llamagen-3b")) == []


def test_precision():
    run = load_recipe("digits")
    assert resolve_precision({}, run, has_gpu=True) == "bf16"
    assert resolve_precision({}, run, has_gpu=False) == "fp32"
    assert resolve_precision({"fp16": {"enabled": True}}, run, has_gpu=True) == "fp16"
    assert resolve_precision({"bf16": {"enabled": False}}, run, has_gpu=True) == "fp32"
    assert resolve_precision({}, load_recipe("digits", ["precision=fp32"]), has_gpu=True) == "fp32"
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        resolve_precision({"fp16": {"enabled": True}}, run, has_gpu=False)


@pytest.mark.parametrize(("content", "message"), [("{", "not JSON"), ("[1]", "holds a list"), (None, "no such file")])
def test_bad_files(tmp_path, content, message):
    path = tmp_path / "ds.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_ds_config(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"zero_optimisation": {"stage": 3}}', "zero_optimisation: unknown key; did you mean zero_optimization?"),
        ('{"zero_optimization": {"stagee": 3}}', "zero_optimization.stagee: unknown key; did you mean stage?"),
        ('{"zero_optimization": 3}', "zero_optimization=3 is no section"),
        ('{"bf16": true}', "bf16=True is no section"),
        ('{"bf16": {"enable": true}}', "bf16.enable: unknown key; did you mean enabled?"),
        ('{"optimizer": {"typ": "AdamW"}}', "optimizer.typ: unknown key; did you mean type?"),
        ('{"comment": "mine"}', "comment: unknown key"),
        ('{"bf16": {}, "bf16": {}}', "'bf16' is given twice"),
        ('{"gradient_clipping": NaN}', "NaN is no number"),
        ('{"gradient_clipping": -Infinity}', "-Infinity is no number"),
        ('{"gradient_clipping": ' + "9" * 5000 + "}", "digits"),
        ("[" * 100_000, "nested too deeply"),
        ('{"steps_per_print": 1}' + " " * 2**20, "more than the 1,048,576"),
    ],
    ids=lambda text: text[:40],
)
def test_what_deepspeed_would_ignore_or_misread(tmp_path, text, said):
    (tmp_path / "ds.json").write_text(text)
    try:
        found = conflicts(read_ds_config(tmp_path / "ds.json"), load_recipe("digits"))
    except ConfigError as error:
        found = error.problems
    assert any(said in problem for problem in found), found
    assert all("\n" not in problem for problem in found)
