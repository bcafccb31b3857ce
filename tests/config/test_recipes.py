"""From names, overrides and the originals' flags to one checked configuration; every error at once."""

import argparse
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cca_ds.config.original_names import KEYS
from cca_ds.config.recipes import (
    ConfigError,
    add_recipe_arguments,
    config_hash,
    dump_recipe,
    load_recipe,
    recipe_from_arguments,
)
from cca_ds.training.checks import recipe_problems
from tests.support.processor_time import run_measured, torch_imports

REPOSITORY = Path(__file__).parents[2]

ENTRIES = ("train", "encode", "sample", "evaluate", "export", "choose", "plan")


def from_flags(*flags: str):
    parser = argparse.ArgumentParser(prog="train")
    add_recipe_arguments(parser)
    return recipe_from_arguments(parser.parse_args(flags))


def problems(*overrides: str, recipe: str = "digits") -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe, list(overrides), recipe_problems)
    message = str(caught.value).splitlines()
    assert len(message) == len(caught.value.problems)  # one line each
    return caught.value.problems


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (["--recipe", "GPT-3B"], "llamagen-3b"),
        (["--gpt-model", "GPT-XXL"], "llamagen-xxl"),
        (["--gpt_model", "GPT-B"], "llamagen-b"),
        (["--depth", "30"], "var-d30"),
        (["--depth", "16"], "var-d16"),
        (["--recipe", "VAR-d20"], "var-d20"),
        ([], "digits"),
    ],
)
def test_names_that_users_of_the_originals_know(flags, name):
    assert from_flags(*flags).name == name
    assert from_flags(*flags) == load_recipe(name)


def test_flags_that_users_of_the_originals_know():
    run = from_flags(
        "--gpt-model", "GPT-L", "--lambda_", "300", "--beta", "0.1", "--uncond_ratio", "0", "--ref_ckpt", "c2i_L.pt",
        "--loss_type", "DPO", "--lr", "1e-4", "--global-batch-size", "64", "--epochs", "3", "--max-grad-norm", "2",
        "--global-seed", "7", "--code-path", "codes",
    )  # fmt: skip
    assert (run.loss.lambda_, run.loss.beta, run.loss.condition_mask_probability) == (300.0, 0.1, 0.0)
    assert (run.model.weights, run.loss.name, run.optimizer.learning_rate) == ("c2i_L.pt", "dpo", 1e-4)
    assert (run.batch.global_size, run.batch.epochs, run.optimizer.grad_clip) == (64, 3, 2.0)
    assert (run.seed, run.data.codes) == (7, "codes")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--beta", ".7", "--set", "loss.beta=.3"],
            "--beta .7 and --set loss.beta=.3 contradict each other (loss.beta)",
        ),
        (["--beta", ".7", "--set", "beta=.3"], "--beta .7 and --set beta=.3 contradict each other"),
        (["--bs", "8", "--global-batch-size", "16"], "contradict each other (batch.global_size)"),
        (
            ["--gpt-model", "GPT-B", "--depth", "16"],
            "--depth 16 and model.preset=llamagen-b of recipe llamagen-b contradict",
        ),
        (["--recipe", "llamagen-b", "--gpt-model", "GPT-3B"], "contradict each other"),
    ],
)
def test_flags_that_contradict_each_other(flags, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        from_flags(*flags)
    assert len(caught.value.problems) == 1


def test_the_same_said_twice_is_no_contradiction():
    assert from_flags("--beta", "0.20", "--set", "loss.beta=.2").loss.beta == 0.2
    assert from_flags("--recipe", "llamagen-b", "--gpt-model", "GPT-B").name == "llamagen-b"
    assert from_flags("--lr", "1e-5", "--tblr", "0.00008", "--bs", "32").optimizer.learning_rate == 1e-5


def test_set_takes_the_originals_names():
    run = load_recipe("digits", ["lambda_=5", "uncond_ratio=0.2", "ref_ckpt=x.pt"])
    assert (run.loss.lambda_, run.loss.condition_mask_probability, run.model.weights) == (5.0, 0.2, "x.pt")
    assert load_recipe("digits", ["loss.lambda_=5"]) == load_recipe("digits", ["loss.lambda=5"])


@pytest.mark.parametrize("name", KEYS)
def test_every_such_name_leads_to_a_key(name):
    values = {"loss_type": "dpo", "keep_dropout": "true", "code_path": "x", "data_path": "x", "ref_ckpt": "x",
              "uncond_ratio": "0.5", "global_batch_size": "32", "bs": "32"}  # fmt: skip
    value = values.get(name, "9")
    run = from_flags("--recipe", "llamagen-b", f"--{name}", value)
    section, _, key = KEYS[name].rpartition(".")
    if section == "model.overrides":
        found = run.model.overrides[key]
    else:
        found = getattr(getattr(run, section) if section else run, key.replace("lambda", "lambda_"))
    assert str(found).lower().removesuffix(".0") == value


def test_presets_are_the_models():
    for name, preset in (("GPT-3B", "llamagen-3b"), ("d30", "var-d30"), ("VAR_d16", "var-d16")):
        assert load_recipe("digits", [f"model.preset={name}"]).model.preset == preset
    assert "did you mean llamagen-xl?" in problems("model.preset=llamagen-xs")[0]


def test_all_errors_at_once():
    found = problems(
        "loss.bta=1", "optimizer.learning_rate=-1", "model.preset=var-d31", "batch.micro_size=0", "nonsense"
    )
    assert len(found) == 5
    assert "KEY.PATH=VALUE" in found[0]
    message = "\n".join(found)
    for part in ("loss.bta", "learning_rate", "var-d31", "micro_size"):
        assert part in message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batch.micro_size=often", "batch.micro_size: Input should be a valid integer, unable to parse string"),
        ("batch.micro_size=0", "batch.micro_size: Input should be greater than or equal to 1, or be auto (got 0)"),
        (
            "model.compile=maybe",
            "model.compile: Input should be a valid boolean, unable to interpret input, or be auto",
        ),
    ],
)
def test_one_line_for_a_key_that_may_be_auto(override, message):
    (found,) = problems(override)
    assert found.startswith(message)


@pytest.mark.parametrize(
    ("override", "near"),
    [
        ("loss.lamda=1", "did you mean lambda?"),
        ("optimizer.learning_rat=1", "did you mean learning_rate?"),
        ("optimiser.lr=1", "did you mean optimizer?"),
        ("batch.globl_size=4", "did you mean global_size?"),
        ("loss.qqq=1", "known: name, beta, lambda, condition_mask_probability, options"),
    ],
)
def test_an_unknown_key_names_the_nearest(override, near):
    found = problems(override)
    assert len(found) == 1 and near in found[0] and override.partition("=")[0].partition(".")[0] in found[0]


def test_an_unknown_recipe_names_the_nearest():
    assert "did you mean llamagen-3b?" in problems(recipe="lamagen-3b")[0]
    assert "did you mean var-d36?" in problems(recipe="var-d31")[0]


def test_contradictions_name_both_values():
    found = problems("reference.placement=cached", "reference.dropout=true", "batch.micro_size=64")
    assert len(found) == 3
    assert "batch.micro_size=64" in found[0] and "batch.global_size=32" in found[0]
    assert "reference.dropout=true with reference.placement=cached" in found[1]
    assert "reference.cache=FOLDER" in found[2]
    assert "placement=zero3" in problems("reference.offload=true")[0]
    assert "loss.name=cca" in problems("model.lambda_conditioning=true", "loss.name=dpo")[0]
    assert "loss.name=gft, not cca" in problems("model.gft_conditioning=true")[0]
    off = problems("loss.name=gft", "model.gft_conditioning=false")[0]
    assert "needs model.gft_conditioning=true, not false" in off
    assert "not gft" in problems("loss.name=gft", "model.lambda_conditioning=true")[0]
    assert "sampling.gft_beta=0.7 needs a model trained by GFT" in problems("sampling.gft_beta=0.7")[0]
    assert "balance.speeds" in problems("balance.mode=given")[0]


def test_the_loss_decides_what_the_model_is_conditioned_on():
    run = load_recipe("digits", ["loss.name=gft"], recipe_problems)
    assert run.model.gft_conditioning and run.model.shape["gft_conditioning"] and run.sampling.gft_beta == 1.0
    plain = load_recipe("digits", check=recipe_problems)
    assert not plain.model.gft_conditioning and not plain.model.shape and plain.sampling.gft_beta is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("loss: [", "not a recipe's YAML"),
        ("- 1", "holds a list"),
        ("extends: own", "no shipped recipe"),
        ("loss: 3", "loss"),
        ("loss:", "loss"),
        ("\x00", "not a recipe's YAML"),
    ],
)
def test_bad_files(tmp_path, content, message):
    (tmp_path / "r.yaml").write_text(content)
    assert any(message in problem for problem in problems(recipe=str(tmp_path / "r.yaml")))


def test_a_recipe_that_extends_itself(tmp_path):
    (tmp_path / "r.yaml").write_text(f"extends: {tmp_path / 'r.yaml'}\n")
    assert any("extends itself" in problem for problem in problems(recipe=str(tmp_path / "r.yaml")))


def test_published_figures_stay_with_their_model(tmp_path):
    (tmp_path / "mine.yaml").write_text("extends: var-d24\nname: mine\nmodel: {overrides: {depth: 2}}\n")
    (tmp_path / "own.yaml").write_text("extends: var-d24\nmodel: {preset: var-d16}\npaper: {fid: 3}\n")
    shipped, mine, own = (load_recipe(str(name)) for name in ("var-d24", tmp_path / "mine.yaml", tmp_path / "own.yaml"))
    assert shipped.paper and shipped.baseline.nll_band
    assert mine.paper == {} and mine.baseline.nll_band is None
    assert own.paper == {"fid": 3} and own.baseline.nll_band is None
    assert load_recipe("var-d24", ["model.preset=var-d20"]).paper == {}
    changed = load_recipe("var-d24", ["loss.beta=0.3", "tokenizer.weights=mine.pth", "baseline.nll_band=[1.0, 2.0]"])
    assert changed.paper == shipped.paper and changed.baseline.nll_band == (1.0, 2.0)


def test_a_file_extends_a_shipped_recipe(tmp_path):
    (tmp_path / "mine.yaml").write_text("extends: var-d24\nname: mine\nloss: {lambda: 3e2}\n")
    run, base = load_recipe(str(tmp_path / "mine.yaml")), load_recipe("var-d24")
    assert (run.name, run.loss.lambda_, run.loss.beta) == ("mine", 300.0, base.loss.beta)
    assert run.optimizer == base.optimizer


def test_numbers_as_people_write_them():
    run = load_recipe("digits", ["optimizer.learning_rate=1e-5", "optimizer.betas=[0.9, 99e-2]", "batch.epochs=2"])
    assert run.optimizer.learning_rate == 1e-5 and run.optimizer.betas == (0.9, 0.99) and run.batch.epochs == 2


def test_hash_is_of_what_shapes_the_trajectory():
    plain = config_hash(load_recipe("digits"))
    for habit in ("logging.every_steps=7", "checkpoint.every_steps=3", "sampling.seed=9", "data.workers=0"):
        assert config_hash(load_recipe("digits", [habit])) == plain
    for shaping in ("loss.beta=0.4", "seed=1", "optimizer.learning_rate=1e-3", "batch.global_size=16"):
        overrides = [shaping, "batch.micro_size=16"] if "global" in shaping else [shaping]
        assert config_hash(load_recipe("digits", overrides)) != plain


@pytest.mark.parametrize("entry", ENTRIES)
def test_help_answers_at_once(entry):
    """In a fraction of the processor time of `import torch`; nothing slow is imported."""
    seconds = []
    for _ in range(2):
        code = (
            "import sys\nsys.argv = [sys.argv[1], '--help']\nimport runpy\n"
            "try: runpy.run_path(sys.argv[0], run_name='__main__')\nexcept SystemExit as end: assert not end.code\n"
            "slow = {'torch', 'deepspeed', 'datasets', 'sklearn', 'scipy', 'pyarrow'} & set(sys.modules)\n"
            "print('imported', *slow, file=sys.stderr)"
        )
        done, used = run_measured("-c", code, str(REPOSITORY / "cca_ds" / f"{entry}.py"))
        assert done.returncode == 0, done.stderr
        assert "usage" in done.stdout and "cca_ds" in done.stdout  # the commands that run it
        assert done.stderr.splitlines()[-1] == "imported"
        seconds.append(used)
    assert min(seconds) < 0.35 * torch_imports()


@pytest.mark.parametrize(
    ("entry", "flags"),
    {
        "train": set(),  # all of them
        "encode": {"--code-path", "--data-path", "--global-seed"},
        "sample": {"--lambda_", "--ref-ckpt", "--num-classes", "--global-seed"},
        "evaluate": set(),
        "plan": {"--loss-type", "--keep-dropout", "--code-path", "--global-batch-size", "--bs", "--epochs", "--ep"},
    }.items(),
)
def test_a_command_takes_the_originals_flags_that_it_reads(entry, flags):
    done = subprocess.run([sys.executable, "-m", f"cca_ds.{entry}", "--help"], capture_output=True, text=True)
    originals = {"--lambda_" if name == "lambda_" else f"--{name.replace('_', '-')}" for name in KEYS}
    shown = originals & set(done.stdout.replace(",", " ").split())
    assert shown == originals if entry == "train" else shown == flags


def test_a_config_of_an_older_version_is_read_where_retired_keys_change_nothing(tmp_path):
    new, old = tmp_path / "new.yaml", tmp_path / "old.yaml"
    new.write_text("seed: 3\n")
    old.write_text(
        "seed: 3\nreference: {tensor_parallel: 1}\nbaseline: {images: 64}\n"
        "balance: {slowdown: {}, slowdown_seconds: null}\n"
    )
    assert load_recipe(str(old)) == load_recipe(str(new))
    (tmp_path / "config.yaml").write_text("reference: {tensor_parallel: 2}\n")
    assert "tensor_parallel: unknown key" in problems(recipe=str(tmp_path / "config.yaml"))[0]


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("loss.name=cac", "loss.name=cac: no such name; did you mean cca?"),
        ("reference.placement=zero", "did you mean zero3?"),
        ("tokenizer.name=digit", "did you mean digits?"),
        ("loss.options.margin=1", "loss.name=cca has no such option"),
    ],
)
def test_names_that_are_not_registered(override, part):
    assert part in problems(override)[0]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["loss.name=ddo"], "loss.name=ddo needs data.generated: a folder that cca-sample --codes filled"),
        (["data.generated=online"], "data.generated=online needs loss.name=ddo, not cca"),
        (
            ["loss.name=ddo", "data.generated=online", "reference.placement=zero3"],
            "data.generated=online needs reference.placement=inference or streamed, not zero3",
        ),
        (
            ["loss.name=ddo", "data.generated=online", "reference.placement=cached", "reference.cache=c"],
            "data.generated=online needs reference.placement=inference or streamed, not cached",
        ),
        (
            ["loss.name=ddo", "data.generated=online", "reference.dropout=true"],
            "data.generated=online needs reference.dropout=false",
        ),
        (["loss.name=gft", "loss.accuracy_band=[0.5, 0.8]"], "loss.accuracy_band needs a loss that compares"),
        (["loss.accuracy_band=[0.8, 0.5]"], "give the lowest and the highest accuracy"),
        (["loss.accuracy_band=[0.5, 1.5]"], "give the lowest and the highest accuracy"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_generated_images_and_the_losses_that_take_them(overrides, message):
    (found,) = problems(*overrides)
    assert message in found


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("my data #2", "my data #2"),
        ("2024", "2024"),
        ("007", "007"),
        ("1e5", "1e5"),
        ("2024-01-01", "2024-01-01"),
        ("on", "on"),
        ("a: b", "a: b"),
        ("[x]", "[x]"),
        ("{a}", "{a}"),
        ("'quoted #1'", "quoted #1"),
        ("*anchor", "*anchor"),
        ("~/data", str(Path.home() / "data")),
        ("données/图", "données/图"),
    ],
)
def test_a_path_is_taken_as_it_is_written(tmp_path, text, value):
    run = load_recipe("digits", [f"data.codes={text}", f"tokenizer.weights={text}"])
    assert (run.data.codes, run.tokenizer.weights) == (value, value)
    if value == text and text[0] not in "[{*~" and "#" not in text and ": " not in text:
        (tmp_path / "own.yaml").write_text(
            f"extends: digits\ndata: {{codes: {text}}}\ntokenizer: {{weights: {text}}}\n"
        )
        run = load_recipe(str(tmp_path / "own.yaml"))
        assert (run.data.codes, run.tokenizer.weights) == (value, value)
        (tmp_path / "again.yaml").write_text(dump_recipe(run))
        assert load_recipe(str(tmp_path / "again.yaml")) == run


def test_null_and_numbers_are_what_they_were():
    run = load_recipe("digits", ["data.source=null", "optimizer.learning_rate=1e-5", "model.overrides={dim: 1e2}"])
    assert (run.data.source, run.optimizer.learning_rate, run.model.overrides) == (None, 1e-5, {"dim": 100.0})


def test_a_home_that_is_nobodys_is_one_line():
    with pytest.raises(ConfigError, match=r"data.codes: .*~nosuchuser/x: there is no such user") as caught:
        load_recipe("digits", ["data.codes=~nosuchuser/x"])
    assert len(caught.value.problems) == 1
