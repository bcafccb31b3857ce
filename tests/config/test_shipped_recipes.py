"""Every shipped recipe loads, and those of the nine models say what the paper and the public programs say."""

from pathlib import Path

import pytest
import yaml

from cca_ds.config.recipes import RECIPES, dump_recipe, load_recipe, recipe_names
from cca_ds.models import model_config
from cca_ds.training.checks import recipe_problems

PAPER = yaml.safe_load((Path(__file__).parents[1] / "golden" / "paper.yaml").read_text())
HYPER = PAPER["hyperparameters"]
MODELS = HYPER["models"]
PLAIN = list(MODELS)
GUIDED = [name for name, values in MODELS.items() if "cca_cfg" in values]
SHIPPED = sorted(RECIPES.rglob("*.yaml"))


def family(name: str) -> str:
    return name.partition("-")[0]


WITHOUT_FIGURES_SHAPES = [("llamagen-b-256", 256, 256), ("llamagen-l-256", 256, 256), ("var-d36", 2240, 512)]
WITHOUT_FIGURES = [name for name, *_ in WITHOUT_FIGURES_SHAPES]


def test_the_nine_models_and_the_digits_are_shipped():
    others = (
        {f"{name}-cfg" for name in GUIDED}
        | {f"{name}-{successor}" for name in PLAIN for successor in ("gft", "ddo")}
        | {"digits", "digits_pretrain", *WITHOUT_FIGURES}
    )
    assert set(recipe_names()) == {*PLAIN, *others, "digits", "digits_pretrain"}
    assert len(PLAIN) == 9 and len(GUIDED) == 5


@pytest.mark.parametrize(("name", "codes", "pixels"), WITHOUT_FIGURES_SHAPES)
def test_published_models_that_the_paper_has_no_run_of(name, codes, pixels):
    run = load_recipe(name)
    config = model_config(run.model.preset, **run.model.overrides)
    assert (config.sequence_length, run.data.image_size) == (codes, pixels)
    assert not run.paper and "the paper has no such run" in (RECIPES / f"{name}.yaml").read_text().lower()
    scales = run.tokenizer.options.get("scales")
    assert scales is None or tuple(scales) == config.scales


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_file_loads_and_reads_back(path, tmp_path):
    run = load_recipe(str(path))
    if not path.stem.startswith("_"):
        assert run.name == path.stem
        assert load_recipe(path.stem) == run
    (tmp_path / "again.yaml").write_text(dump_recipe(run))
    assert load_recipe(str(tmp_path / "again.yaml")) == run


@pytest.mark.parametrize("name", [*PLAIN, *(f"{name}-cfg" for name in GUIDED)])
def test_what_all_runs_of_a_family_share(name):
    run, facts = load_recipe(name), HYPER[family(name)]
    assert run.model.preset == name.removesuffix("-cfg")
    assert run.loss.name == "cca"
    assert run.loss.condition_mask_probability == HYPER["condition_mask_probability"]
    assert run.optimizer.learning_rate == facts["learning_rate"]
    assert list(run.optimizer.betas) == facts["adam_betas"]
    assert run.optimizer.weight_decay == facts["weight_decay"]
    assert run.optimizer.grad_clip == facts["grad_clip"]
    assert run.batch.global_size == facts["batch_size"]
    assert run.batch.epochs == 1 and run.batch.max_steps is None
    assert run.reference.weights is None and not run.reference.dropout


@pytest.mark.parametrize("name", PLAIN)
def test_beta_and_lambda(name):
    run = load_recipe(name)
    assert (run.loss.beta, run.loss.lambda_) == (MODELS[name]["beta"], MODELS[name]["lambda"])


@pytest.mark.parametrize("name", GUIDED)
def test_cca_with_guidance_differs_in_beta_and_lambda_alone(name):
    plain, guided = load_recipe(name).model_dump(), load_recipe(f"{name}-cfg").model_dump()
    facts = MODELS[name]["cca_cfg"]
    assert (guided["loss"].pop("beta"), guided["loss"].pop("lambda_")) == (facts["beta"], facts["lambda"])
    for tree in (plain, guided):
        tree["loss"] = {k: v for k, v in tree["loss"].items() if k not in ("beta", "lambda_")}
        del tree["name"], tree["paper"]  # the paper's results are of the plain runs
    assert plain == guided


@pytest.mark.parametrize("name", PLAIN)
def test_guidance_free_training(name):
    """The public command's epochs, batch, rate and cosine; model, data and the rest are those of CCA's recipe."""
    plain, run = load_recipe(name), load_recipe(f"{name}-gft", check=recipe_problems)
    facts = PAPER["successors"]["gft"]
    assert run.loss.name == "gft" and run.model.gft_conditioning
    assert run.batch.epochs == facts["llamagen-3b"]["epochs"] and run.batch.max_steps is None
    assert run.batch.global_size == facts["llamagen-3b"]["batch"]
    assert run.optimizer.learning_rate == facts["llamagen-3b"]["learning_rate"]
    assert run.schedule.name == "cosine" and run.schedule.warmup_epochs == run.schedule.hold == 0
    assert run.optimizer.learning_rate * run.schedule.final_fraction == pytest.approx(1e-5)
    assert run.loss.condition_mask_probability == 0.1
    assert run.sampling.gft_beta == facts["llamagen-3b"]["sampled_at_gft_beta"]
    assert run.paper.get("fid") == facts.get(name, {}).get("fid")
    for section in ("tokenizer", "data", "reference", "baseline"):
        assert getattr(run, section) == getattr(plain, section)
    switched = {"gft_conditioning": True}
    assert run.model == plain.model.model_copy(update=switched)
    own = ("learning_rate", "final_weight_decay")
    assert run.optimizer.model_dump(exclude=own) == plain.optimizer.model_dump(exclude=own)


@pytest.mark.parametrize("name", PLAIN)
def test_direct_discriminative_optimization(name):
    """The paper's beta and the range of its alpha, no dropout, no top-k and top-p; the rest is CCA's recipe."""
    plain, run = load_recipe(name), load_recipe(f"{name}-ddo", check=recipe_problems)
    assert run.loss.name == "ddo" and run.loss.beta == 0.02 and 10 <= run.loss.lambda_ <= 100
    assert run.loss.condition_mask_probability == 0.1
    assert run.data.generated == f"{plain.data.codes}_generated"
    assert run.data == plain.data.model_copy(update={"generated": run.data.generated})
    assert run.model == plain.model.model_copy(update={"dropout": False})
    assert (run.sampling.guidance_scale, run.sampling.top_k, run.sampling.top_p) == (0.0, 0, 1.0)
    assert run.checkpoint.keep_every == run.checkpoint.every_steps
    for section in ("tokenizer", "reference", "baseline", "batch"):
        assert getattr(run, section) == getattr(plain, section)
    assert run.optimizer.model_dump(exclude={"final_weight_decay"}) == plain.optimizer.model_dump(
        exclude={"final_weight_decay"}
    )
    facts = PAPER["successors"]["ddo"].get(name)
    if facts:
        assert run.paper["fid"] == run.paper["ddo"]["fid"] == facts["fid"]
        assert run.paper["ddo with guidance"]["fid"] == facts["fid_guided"]
    else:
        assert not run.paper


@pytest.mark.parametrize("name", [name for name in PLAIN if family(name) == "llamagen"])
def test_llamagen(name):
    run, facts, data = load_recipe(name), HYPER["llamagen"], PAPER["training_set"]
    assert run.model.dropout is facts["dropout"]
    assert run.schedule.name == facts["schedule"] and run.schedule.warmup_epochs == 0
    assert run.optimizer.final_weight_decay is None
    assert run.tokenizer.name == "llamagen-vq16"
    assert (run.data.image_size, run.data.crops, run.data.crop_ranges) == (384, "ten_crop", [1.1, 1.05])
    config = model_config(run.model.preset, **run.model.overrides)
    assert (config.sequence_length, config.vocab_size) == (data["llamagen_codes"], data["llamagen_vocabulary"])
    assert (config.token_dropout, config.resid_dropout, config.ffn_dropout) == (0.1, 0.1, 0.1)


@pytest.mark.parametrize("name", [name for name in PLAIN if family(name) == "var"])
def test_var(name):
    run, facts, data = load_recipe(name), HYPER["var"], PAPER["training_set"]
    depth, size = int(name.removeprefix("var-d")), name.removeprefix("var-")
    # "linear to wpe after a warm-up of 1/50 epoch from 0.005 of the peak"
    schedule = run.schedule
    assert (schedule.name, schedule.warmup_epochs, schedule.warmup_start) == ("linear", 1 / 50, 0.005)
    assert schedule.final_fraction == facts["wpe"][size]
    assert run.optimizer.final_weight_decay == facts["final_weight_decay"].get(size)
    # "0.1*depth/24 (d16: none)"
    assert run.model.dropout is (size != "d16")
    config = model_config(run.model.preset, **run.model.overrides)
    assert config.drop_path_rate == pytest.approx(0.1 * depth / 24)
    assert run.tokenizer.name == "var-vqvae"
    assert (run.data.image_size, run.data.crops, run.data.crop_ranges) == (256, "random", [1.125])
    assert (config.sequence_length, config.vocab_size) == (data["var_codes"], data["var_vocabulary"])
    assert list(config.scales) == data["var_scales"]


@pytest.mark.parametrize("name", PLAIN)
def test_sampling_is_that_of_the_papers_evaluation(name):
    run, facts = load_recipe(name), PAPER["evaluation_sampling"][family(name)]
    assert run.sampling.guidance_scale == facts["paper_guidance_s"]
    for key in ("top_k", "top_p", "temperature"):
        assert getattr(run.sampling, key) == facts.get(key, 1.0)
    assert run.sampling.images_per_class == 50


@pytest.mark.parametrize("name", PLAIN)
def test_the_papers_results_stand_beside(name):
    paper = load_recipe(name).paper
    assert paper["fid"] == PAPER["released_checkpoints_fid"][name]
    titles = {"table2": ["fid", "inception_score", "precision", "recall"],
              "table3": ["fid", "inception_score", "sfid", "precision", "recall"]}  # fmt: skip
    expected = {}
    if name in PAPER["table2"]:
        base, tuned = PAPER["table2"][name], PAPER["table2"][f"{name}+cca"]
        for key, values in (("base", base["free"]), ("guided", base["guided"]), ("cca", tuned["free"])):
            expected[key] = dict(zip(titles["table2"], values, strict=False))
    if name in PAPER["table3"]:
        for key in ("base", "cca"):
            expected[key] = dict(zip(titles["table3"], PAPER["table3"][name][key], strict=True))
    if base := PAPER["successors"]["var_base_without_guidance"].get(name):  # of another paper, both ways of sampling
        expected["base, plain (arXiv 2503.01103)"] = {"fid": base["fid_plain"]}
        expected["base, top-k (arXiv 2503.01103)"] = {"fid": base["fid_top_k_900_top_p_0.96"]}
        expected.setdefault("cca", {"fid": paper["fid"]})
    rows = {key: value for key, value in paper.items() if key != "fid"}
    assert {key: {k: v for k, v in value.items() if k != "sampled"} for key, value in rows.items()} == expected
    plain, public = "s = 0, top-k 0, top-p 1", "s = 0, top-k 900, top-p 0.96"
    for key, value in rows.items():
        own = value["sampled"].removesuffix(" in the public program")
        tuned = public if family(name) == "var" else plain
        assert own == {"guided": "with guidance", "cca": tuned}.get(key, public if "top-k" in key else plain), key
