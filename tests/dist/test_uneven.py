"""Unequal ranks: whatever the cut, the trajectory is that of one rank, to rounding."""

import json

import pytest

from tests.dist.ranks import run_ranks

pytestmark = pytest.mark.dist

STEPS = 6
SETTINGS = [
    f"batch.max_steps={STEPS}", "batch.global_size=16", "batch.micro_size=16", "optimizer.learning_rate=1e-4",
    "precision=fp32", "logging.sample_every_steps=null", "logging.tensorboard=false", "data.workers=0",
]  # fmt: skip


def trained(folder, ranks, *settings):
    """(metrics by step, rank 0's console) of a run on so many ranks."""
    arguments = ["--ds_config", "ds_configs/zero3.json", "--output", str(folder)]
    outputs = run_ranks(
        "cca_ds/train.py", ranks, arguments=[*arguments, "--set", *SETTINGS, *settings], timeout=400
    )
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return lines, outputs[0].stderr


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run on one rank, in one forward a step."""
    lines, console = trained(tmp_path_factory.mktemp("alone") / "run", 1)
    assert "forwards 1; pairs of rank 0: 16" in console
    return lines


def assert_same_trajectory(lines, alone):
    for found, expected in zip(lines, alone, strict=True):
        for tag in ("loss", "grad_norm", "nll_per_code"):
            assert found[tag] == pytest.approx(expected[tag], rel=1e-5, abs=1e-5), (found["step"], tag)
    assert alone[0]["loss"] - alone[-1]["loss"] > 0.1, "a run that learns nothing proves nothing"


def test_given_speeds_with_caps_and_a_rank_without_pairs_in_some_forwards(tmp_path, alone):
    """3:1 makes 12 and 4 pairs; at two a forward rank 0 needs six, in two of which rank 1 has none."""
    lines, console = trained(
        tmp_path / "run",
        2,
        "balance.mode=given",
        "balance.speeds={0: 3, cpu: 1}",
        "balance.micro_sizes={0: 2}",
    )
    assert "forwards 6; pairs of rank 0: 12, rank 1: 4" in console
    assert_same_trajectory(lines, alone)


def test_measured_speeds_of_a_slowed_rank_and_measuring_again(tmp_path, alone):
    """Both ranks sleep, one and three parts a pair: what else the machine does hardly matters then."""
    lines, console = trained(
        tmp_path / "run", 2, "balance.mode=measured", "balance.remeasure_every=3", "balance.slowdown={0: 2, 1: 4}",
        "balance.slowdown_seconds=0.05", "baseline.check=false",
    )  # fmt: skip
    assert "SLOWS RANKS ON PURPOSE" in console
    first, again = (line for line in console.splitlines() if "pairs of rank 0:" in line)
    assert "balance after step 3" in again and "ms a pair" in again
    for line in (first, again):
        pairs = [
            int(part.split(",")[0].split(";")[0]) for part in line.split("pairs of ")[1].split(": ")[1:3]
        ]
        assert sum(pairs) == 16 and pairs[0] > pairs[1] > 0
    assert_same_trajectory(lines, alone)


def test_a_rank_of_which_the_recipe_says_nothing_is_named(tmp_path):
    arguments = ["--ds_config", "ds_configs/zero3.json", "--output", str(tmp_path / "run")]
    given = ["balance.mode=given", "balance.speeds={H100: 3}"]
    output = run_ranks(
        "cca_ds/train.py", 1, arguments=[*arguments, "--set", *SETTINGS, *given], timeout=200, check=False
    )[0]
    assert output.returncode == 1
    told = [line for line in output.stderr.splitlines() if "balance.speeds" in line]
    assert len(told) == 1 and "rank 0 on" in told[0] and "(cpu)" in told[0] and "H100" in told[0]
