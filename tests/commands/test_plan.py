"""The planner: parameters and operations exact, its answers in words and JSON, bad input, speed."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cca_ds.config.recipes import load_recipe
from cca_ds.models import LlamaGenConfig, create_model
from cca_ds.plan import main
from cca_ds.planning.architecture import architecture_of
from cca_ds.planning.step_time import work_of

PUBLISHED = {
    "llamagen-b": "llamagen/GPT-B",
    "llamagen-l": "llamagen/GPT-L",
    "llamagen-xl": "llamagen/GPT-XL",
    "llamagen-xxl": "llamagen/GPT-XXL",
    "llamagen-3b": "llamagen/GPT-3B",
    "var-d16": "var/d16",
    "var-d20": "var/d20",
    "var-d24": "var/d24",
    "var-d30": "var/d30",
}
ROOT = Path(__file__).parents[2]
MIXED = "4xh100:8,2xa100:8,4xa40:8"


@pytest.mark.parametrize(("preset", "recorded"), PUBLISHED.items())
def test_parameters_are_the_published_models(golden, preset, recorded):
    shapes = json.loads((golden / "state_dict_shapes.json").read_text())
    assert architecture_of(preset).parameters == shapes[recorded]["params"]


@pytest.mark.parametrize(
    ("preset", "overrides"),
    [
        ("digits", {}),
        ("digits", {"lambda_conditioning": True, "n_layer": 2}),
        ("llamagen-b", {"dim": 96, "n_head": 2, "vocab_size": 50, "num_classes": 7, "sequence_length": 16}),
        ("var-d16", {"depth": 3, "shared_aln": True, "scales": (1, 2, 3), "vocab_size": 50}),
        ("var-d16", {"depth": 2, "lambda_conditioning": True, "num_classes": 7, "width": 96, "heads": 2}),
    ],
)
def test_parameters_follow_the_overrides(preset, overrides):
    with torch.device("meta"):
        model = create_model(preset, **overrides)
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert architecture_of(preset, overrides).parameters == counted


def test_one_epoch_of_cca_on_the_largest_model_is_3_7e19_operations():
    """The issue's figure: 1,281,167 images, two sequences a pair, policy forward and backward, reference
    forward."""
    model = architecture_of("llamagen-3b")
    work = work_of(model, "inference", checkpointing=False)
    assert f"{work.total * 1_281_167:.1e}" == "3.7e+19"
    assert work.total == 8 * model.forward_flops()
    # By hand, weights only: 8 operations a weight and code over 2 x 576 codes, embeddings left out.
    assert work.total == pytest.approx(8 * 3.04e9 * 1152, rel=0.04)


def test_operations_of_a_forward_are_what_torch_counts():
    """torch's own counter: matrix products and attention."""
    overrides = {
        "n_layer": 2,
        "dim": 64,
        "n_head": 2,
        "vocab_size": 48,
        "sequence_length": 64,
        "num_classes": 5,
    }
    model = create_model(LlamaGenConfig(**overrides)).eval()
    plain = sdpa_kernel(SDPBackend.MATH)  # the counter knows no CPU kernel of attention but this
    with FlopCounterMode(display=False) as counter, torch.no_grad(), plain:
        model.logits(torch.zeros(1, 64, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    assert architecture_of("llamagen-b", overrides).forward_flops() == pytest.approx(
        counter.get_total_flops(), rel=1e-9
    )


def run_plan(capsys, *arguments):
    code = main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_answer_in_words(capsys):
    code, out, err = run_plan(capsys, "--recipe", "llamagen-3b", "--nodes", MIXED)
    assert code == 0 and err == ""
    for said in (
        "3.7e+19 FLOPs an epoch",
        "80 GPUs",
        "micro fits",
        "GPU hours",
        "Recommendation",
        "stream the reference from 2 x a100:8, 4 x a40:8",
        "the slowest network is a40's, 25 GB/s a node",
        "How this is reckoned",
    ):
        assert said in out
    table = [
        line.split()[0]
        for line in out.splitlines()
        if line.startswith(("inference", "zero3", "cached", "stream"))
    ]
    assert table == [name for name in ("inference", "zero3", "cached", "streamed") for _ in range(2)]


def test_the_answer_as_json(capsys):
    code, out, _ = run_plan(
        capsys, "--recipe", "var-d30", "--nodes", "1xa40:4", "--json", "--images", "25600"
    )
    tree = json.loads(out)
    assert code == 0 and tree["steps"] == 100 and tree["model"]["parameters"] == 2_010_020_356
    by_name = {(one["placement"], one["activation_checkpointing"]): one for one in tree["outcomes"]}
    assert len(by_name) == 8
    one = by_name["inference", True]
    assert one["fits"] and one["epoch_seconds"] == pytest.approx(100 * one["step_seconds"])
    assert one["pairs"] == {"a40": [64, 64]}
    assert not by_name["streamed", True]["fits"]  # one node cannot both train and produce


@pytest.mark.parametrize("nodes", [MIXED, "1xa40:2", "2xh100:8"])
def test_the_recommendation_is_one_that_the_recipe_takes(capsys, nodes):
    _, out, _ = run_plan(capsys, "--recipe", "llamagen-3b", "--nodes", nodes)
    settings = out.split("Take --set ")[1].split(":")[0].split()
    run = load_recipe("llamagen-3b", settings)
    assert f"reference.placement={run.reference.placement}" in settings


def test_a_base_model_needs_no_reference(capsys):
    code, out, _ = run_plan(capsys, "--recipe", "digits_pretrain", "--nodes", "1xa40:1")
    assert code == 0 and "1,797 images" in out and "zero3  " not in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--nodes", "4xh900:8"], "did you mean"),
        (["--nodes", "h100"], "write NODESxDEVICE:GPUS"),
        (["--nodes", "0xh100:8"], "write NODESxDEVICE:GPUS"),
        (["--nodes", "1xh100:0"], "write NODESxDEVICE:GPUS"),
        (["--nodes", ","], "names no node"),
        (["--nodes", "1xh100", "--efficiency", "h100=1.5"], "must lie in"),
        (["--nodes", "1xh100", "--network", "h100=fast"], "positive number"),
        (["--nodes", "1xh100", "--images", "0"], "at least one image"),
        (["--nodes", "1xh100", "--ds_config", "absent.json"], "no such file"),
        (["--nodes", "1xh100", "--recipe", "llamagen-4b"], "did you mean"),
        (["--nodes", "1xh100", "--set", "model.preset=llamagen-4b"], "did you mean llamagen"),
    ],
)
def test_bad_input_is_one_line(capsys, arguments, said):
    code, out, err = run_plan(capsys, *arguments)
    assert code == 2 and out == "" and said in err and err.count("\n") == 1


def test_a_table_that_cannot_be_read_is_one_line(capsys, tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    code, out, err = run_plan(capsys, "--nodes", "1xa40:4", "--set", f"data.codes={tmp_path}")
    assert code == 2 and out == ""
    assert len(err.strip().splitlines()) == 1 and "encode the images again" in err


@pytest.mark.parametrize("nodes", ["1xh100:8", "512xh100:8", "256xh100:8,128xa100:8,128xa40:8"])
def test_answers_in_under_a_second_without_torch(nodes):
    """The processor's own seconds, as other work may share the machine; interpreter start included."""
    program = (
        "import sys; from cca_ds.plan import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    )
    arguments = ["--recipe", "llamagen-3b", "--nodes", nodes, "--set", "batch.global_size=8192"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-c", program, *arguments],
        check=True,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < 1.0
