"""docs/original_commands.md: what users of the original programs type parses here, and means what it meant there."""

import re
import shlex
from pathlib import Path

import pytest

from cca_ds import encode, evaluate, sample, train
from cca_ds.config.original_names import FLAGS, spellings
from cca_ds.config.recipes import ConfigError, load_recipe, recipe_from_arguments
from cca_ds.data.npy_folders import import_command
from cca_ds.training.checks import recipe_problems
from cca_ds.training.inputs import open_table

PAGE = Path(__file__).parents[2] / "docs" / "original_commands.md"
COMMANDS = [
    line for block in re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.DOTALL) for line in block.splitlines()
]
PARSERS = {"train": train.parse, "encode": encode.parse_arguments, "sample": sample.parse, "evaluate": evaluate.parse}
# flag as typed -> (key, value) that it must lead to
MEANT = {
    "--bs=256": ("batch.global_size", 256), "--ep=1": ("batch.epochs", 1.0),
    "--wpe=0.1": ("schedule.final_fraction", 0.1),
    "--wpe=0.01": ("schedule.final_fraction", 0.01), "--twde=0.08": ("optimizer.final_weight_decay", 0.08),
    "--loss_type=CCA": ("loss.name", "cca"), "--beta=0.02": ("loss.beta", 0.02),
    "--lambda_=50.0": ("loss.lambda_", 50.0),
    "--lambda_=1000.0": ("loss.lambda_", 1000.0), "--dpr_ratio=0.0": ("model.dropout", False),
    "--uncond_ratio=0.1": ("loss.condition_mask_probability", 0.1), "--keep_dropout": ("model.dropout", True),
    "--ckpt-every=5000": ("checkpoint.every_steps", 5000), "--lr=1e-5": ("optimizer.learning_rate", 1e-5),
    "--vae_ckpt=./vae_ch160v4096z32.pth": ("tokenizer.weights", "./vae_ch160v4096z32.pth"),
    "--vq-ckpt=vq_ds16_c2i.pt": ("tokenizer.weights", "vq_ds16_c2i.pt"),
    "--per-proc-batch-size=48": ("sampling.batch_size", 48),
    "--num-fid-samples=50000": ("sampling.images_per_class", 50),
    "--exp_name=default": ("name", "default"), "--ten-crop": ("data.crops", "ten_crop"),
    "--gpt-model=GPT-3B": ("model.preset", "llamagen-3b"), "--gpt-model=GPT-XL": ("model.preset", "llamagen-xl"),
    "--loss_type=mle": ("loss.name", "mle"),
    "--bs=768": ("batch.global_size", 768), "--ep=200": ("batch.epochs", 200.0),
}  # fmt: skip


def parsed(command: str):
    """The command's name, its parsed arguments, and its words."""
    words = shlex.split(command)
    at = next(i for i, word in enumerate(words) if word.startswith("cca_ds/"))
    name = Path(words[at]).stem
    return name, PARSERS[name](words[at + 1 :]), words[at + 1 :]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_parses_and_means_what_it_meant(command, capsys):
    name, arguments, words = parsed(command)
    if name == "evaluate":
        assert (arguments.reference, arguments.samples) == ("VIRTUAL_imagenet256_labeled.npz", "samples/samples.npz")
        return
    if name == "sample":
        run = sample.read_recipe(arguments)
        assert arguments.weights is not None and str(arguments.output).endswith("samples")
    else:
        run = recipe_from_arguments(arguments, recipe_problems)
    text = capsys.readouterr().err
    ignored = {re.match(r"ignored: (--[\w-]+): .+", line)[1] for line in text.splitlines()}
    checked = 0
    for word in re.findall(r"--\S+(?: [^-]\S*)?", " ".join(words)):  # --flag=value, or --flag value
        typed = re.match(r"--([\w-]+)", word)[1].replace("-", "_")
        if typed in FLAGS[name]:
            assert (spellings(typed)[-1] in ignored) == bool(FLAGS[name][typed].ignored), word
        if word.replace(" ", "=", 1) in MEANT or word.split()[0] in MEANT:
            key, value = MEANT.get(word.replace(" ", "=", 1)) or MEANT[word.split()[0]]
            found = run
            for part in key.split("."):
                found = getattr(found, part)
            assert found == value, word
            checked += 1
    assert checked or name != "train"
    typed = dict(word.removeprefix("--").split("=", 1) for word in words if "=" in word)
    if "tblr" in typed:  # VAR, utils/arg_util.py: tlr = ac * tblr * glb_batch_size / 256
        assert run.optimizer.learning_rate == pytest.approx(float(typed["tblr"]) * int(typed["bs"]) / 256)


def test_guidance_of_the_originals_is_the_papers():
    """LlamaGen's cfg-scale 1.65 is s = 0.65; VAR's cfg 0 is s = 0."""
    found = {}
    for command in COMMANDS:
        name, arguments, _ = parsed(command)
        if name == "sample":
            run = sample.read_recipe(arguments)
            found[run.model.preset] = round(run.sampling.guidance_scale, 6)
    assert found == {"var-d20": 0.0, "llamagen-xl": 0.0, "llamagen-b": 1.0, "llamagen-3b": 0.65, "llamagen-l": 3.0}


@pytest.mark.parametrize(
    ("command", "flags", "expected"),
    [
        ("train", ["--mixed-precision", "none"], {"precision": "fp32"}),
        ("train", ["--dropout-p", "0.2"], {"model.overrides": {"resid_dropout": 0.2, "ffn_dropout": 0.2}}),
        ("train", ["--token-dropout-p", "0.3", "--drop-path-rate", "0.1"],
         {"model.overrides": {"token_dropout": 0.3, "drop_path": 0.1}}),
        ("train", ["--ema", "--no-compile"], {"model.ema_decay": 0.9999, "model.compile": False}),
        ("train", ["--depth", "16", "--pn", "1_2_3", "--saln=1"],
         {"model.overrides": {"scales": [1, 2, 3], "shared_aln": True}}),
        ("train", ["--num-classes", "5"], {"model.overrides": {"num_classes": 5}}),
        ("sample", ["--cfg-interval", "100"], {"sampling.guidance_interval": (0, 102)}),
        ("sample", ["--cfg-interval", "0"], {"sampling.guidance_interval": (0, 2)}),
        ("train", ["--tblr", "1e-4"], {"optimizer.learning_rate": 1e-4}),
        ("train", ["--tblr", "1e-4", "--bs", "768", "--lr", "3e-4"], {"optimizer.learning_rate": 3e-4}),
        ("train", ["--tblr", "1e-4", "--set", "batch.global_size=512"], {"optimizer.learning_rate": 2e-4}),
        ("train", ["--beta1", "0.9", "--beta2=0.95", "--opt=AdamW", "--sche=lin0", "--ls=0.0", "--pg", "0", "--seed=3"],
         {"optimizer.betas": (0.9, 0.95), "seed": 3}),
        ("train", ["--gpt-ckpt", "x.pt"], {"model.weights": "x.pt"}),
        ("sample", ["--cfg-interval", "-1", "--top-k", "7", "--temperature", "0.9"],
         {"sampling.guidance_interval": None, "sampling.top_k": 7, "sampling.temperature": 0.9}),
        ("encode", ["--crop-range", "1.05", "--ten-crop"], {"data.crop_ranges": [1.05], "data.crops": "ten_crop"}),
    ],
)  # fmt: skip
def test_flags_that_are_translated(command, flags, expected):
    needed = ["--output", "x"] if command == "sample" else []
    base = [] if "--depth" in flags else ["--recipe", "llamagen-b"]
    run = recipe_from_arguments(PARSERS[command]([*base, *needed, *flags]), recipe_problems)
    for key, value in expected.items():
        found = run
        for part in key.split("."):
            found = getattr(found, part)
        assert found == value


@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        ("train", ["--dpr_ratio", "0.5"], "--dpr-ratio 0.5: 0 leaves stochastic depth out"),
        ("train", ["--mixed-precision", "int8"], "--mixed-precision int8: one of none"),
        ("train", ["--pn", "a_b"], "--pn a_b: 256, 512 or sides"),
        ("sample", ["--num-fid-samples", "1234"], "--num-fid-samples 1234: a multiple of 1000"),
        ("sample", ["--cfg-interval", "x"], "--cfg-interval x: a number is needed"),
        ("sample", ["--cfg-interval", "1.5"], "the number of a code is needed"),
        ("train", ["--lambda_=1000.0/300.0"], "loss.lambda"),
        ("train", ["--saln", "yes"], "--saln yes: 0 or 1 is needed"),
        ("train", ["--tblr", "x"], "--tblr x: a number is needed"),
        ("train", ["--tblr", "1e-4", "--lr", "2e-4"], "--tblr 1e-4 and the learning rate 0.0002 contradict each other"),
        ("train", ["--tblr", ""], "--tblr : a number is needed"),
        ("train", ["--tblr", "nan"], "optimizer.learning_rate"),
        ("train", ["--tblr=-1"], "optimizer.learning_rate"),
        ("train", ["--tblr", "1e9"], "optimizer.learning_rate"),
        ("train", ["--set", "lr=3e-4", "--tblr", "1e-4"], "--tblr 1e-4 and the learning rate 0.0003 contradict"),
        ("train", ["--beta1", "0.8"], "--beta1 0.8: only 0.9 can be given here; set optimizer.betas"),
        ("train", ["--opt", "lion"], "--opt lion: only adamw can be given here"),
        ("train", ["--set", "loss.lambda_=3", "--lambda_", "7"], "--lambda_ 7 and --set loss.lambda_=3 contradict"),
        (
            "train",
            ["--depth", "16"],
            "--depth 16 and model.preset=llamagen-b of recipe llamagen-b contradict each other",
        ),
        ("train", ["--gpt-model", "GPT-B", "--set", "model.preset=llamagen-l"], "--gpt-model GPT-B and model.preset="),
        ("train", ["--image-size", "256"], "--image-size 256: recipe llamagen-b has images of 384 px"),
        ("sample", ["--image-size", "512"], "--image-size 512: recipe llamagen-b has images of 384 px"),
    ],
)
def test_values_that_mean_nothing_are_one_line(command, flags, message):
    needed = ["--output", "x"] if command == "sample" else []
    with pytest.raises(ConfigError) as caught:
        recipe_from_arguments(PARSERS[command](["--recipe", "llamagen-b", *needed, *flags]), recipe_problems)
    assert len(caught.value.problems) == 1 and message in str(caught.value)


@pytest.mark.parametrize(
    ("command", "flags", "recipe"),
    [
        ("sample", ["--gpt-model", "GPT-B", "--image-size", "256"], "llamagen-b-256"),
        ("train", ["--gpt-model", "GPT-L", "--image-size", "256"], "llamagen-l-256"),
        ("train", ["--gpt-model", "GPT-B", "--image-size", "384"], "llamagen-b"),
        ("sample", ["--recipe", "llamagen-b-256", "--gpt-model", "GPT-B", "--image-size", "256"], "llamagen-b-256"),
        ("sample", ["--vq-ckpt", "vq_ds16_c2i.pt"], "llamagen-b"),
        ("encode", ["--vq-ckpt", "vq_ds16_c2i.pt", "--image-size", "256"], "llamagen-b-256"),
        ("train", ["--depth", "36"], "var-d36"),
        ("train", ["--gpt-model", "llamagen-b-256"], "llamagen-b-256"),
    ],
)
def test_the_recipe_of_a_model_and_an_image_size(command, flags, recipe):
    assert recipe_from_arguments(PARSERS[command](flags), recipe_problems).name == recipe


@pytest.mark.parametrize("second", [False, True])
def test_the_originals_codes_are_recognised_with_the_command_that_imports_them(second, tmp_path):
    folder = tmp_path / "flip ten_crop"
    for place in (folder, *([tmp_path / "flip ten_crop_105"] if second else [])):
        (place / "imagenet384_codes").mkdir(parents=True)
        (place / "imagenet384_labels").mkdir()
    run = load_recipe("llamagen-b", [f"data.codes={folder}"])
    with pytest.raises(
        ValueError, match=re.escape("holds the original program's .npy files; import them once")
    ) as caught:
        open_table(run, tmp_path)
    words = shlex.split(str(caught.value).partition("table: ")[2])
    arguments = encode.parse_arguments(words[3:])
    assert arguments.import_npy == [str(folder), *([f"{folder}_105"] if second else [])]
    assert arguments.recipe == "llamagen-b" and str(arguments.output) == f"{folder}_table"
    assert import_command(tmp_path, "llamagen-b") is None
