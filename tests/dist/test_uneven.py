"""Unequal ranks: whatever the partition, the trajectory is that of one rank, to rounding."""

import json

import pytest

from tests.dist.ranks import run_ranks
from tests.support.slowed_train import VARIABLE

pytestmark = pytest.mark.dist

STEPS = 6
SETTINGS = [
    "loss.lambda=10",
    f"batch.max_steps={STEPS}", "batch.global_size=16", "batch.micro_size=16", "optimizer.learning_rate=1e-4",
    "precision=fp32", "logging.sample_every_steps=null", "logging.tensorboard=false", "data.workers=0",
]  # fmt: skip


def trained(folder, ranks, *settings, row_seconds=None):
    """(metrics by step, rank 0's console) of a run on so many ranks; `row_seconds` is what each sleeps a row."""
    arguments = ["--ds_config", "ds_configs/zero3.json", "--output", str(folder), "--set", *SETTINGS, *settings]
    program, environment = "cca_ds/train.py", {}
    if row_seconds is not None:
        program, environment = "tests/support/slowed_train.py", {VARIABLE: row_seconds}
    outputs = run_ranks(program, ranks, arguments=arguments, env=environment, timeout=400)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return lines, outputs[0].stderr


LOSSES = {"cca": ("loss", "grad_norm", "nll_per_code"),
          "gft": ("loss", "grad_norm", "nll_per_code", "nll_per_code/unconditional"),
          "ddo": ("loss", "grad_norm", "rewards/real", "rewards/generated")}  # fmt: skip
ONLINE = {"ddo": ["data.generated=online"]}


@pytest.fixture(scope="module", params=LOSSES)
def loss(request):
    return request.param


@pytest.fixture(scope="module")
def alone(tmp_path_factory, loss):
    """The run on one rank, in one forward a step."""
    lines, console = trained(tmp_path_factory.mktemp("alone") / "run", 1, f"loss.name={loss}", *ONLINE.get(loss, []))
    assert "forwards 1; pairs of rank 0: 16" in console
    return lines


def assert_same_trajectory(lines, alone, loss):
    for found, expected in zip(lines, alone, strict=True):
        for tag in LOSSES[loss]:
            assert found[tag] == pytest.approx(expected[tag], rel=1e-5, abs=1e-5), (found["step"], tag)
    learnt = abs(alone[0]["loss"] - alone[-1]["loss"])
    assert learnt > (0.01 if loss == "gft" else 0.1), "a run that learns nothing proves nothing"


def test_given_speeds_with_caps_and_a_rank_without_pairs_in_some_forwards(tmp_path, alone, loss):
    """3:1 makes 12 and 4 pairs; at two a forward rank 0 needs six, in two of which rank 1 has none."""
    lines, console = trained(
        tmp_path / "run", 2, f"loss.name={loss}", *ONLINE.get(loss, []), "balance.mode=given",
        "balance.speeds={0: 3, cpu: 1}", "balance.micro_sizes={0: 2}",
    )  # fmt: skip
    assert "forwards 6; pairs of rank 0: 12, rank 1: 4" in console
    assert_same_trajectory(lines, alone, loss)


def test_measured_speeds_of_a_slowed_rank_and_measuring_again(tmp_path, alone, loss):
    """Both ranks sleep, 0.05 and 0.15 s a pair of two rows: other load on the machine then hardly matters."""
    settings = [
        f"loss.name={loss}",
        *ONLINE.get(loss, []),
        "balance.mode=measured",
        "balance.remeasure_every=3",
        "baseline.check=false",
    ]
    lines, console = trained(tmp_path / "run", 2, *settings, row_seconds="0.025,0.075")
    first, again = (line for line in console.splitlines() if "pairs of rank 0:" in line)
    assert "balance after step 3" in again and "ms a pair" in again
    for line in (first, again):
        pairs = [int(part.split(",")[0].split(";")[0]) for part in line.split("pairs of ")[1].split(": ")[1:3]]
        assert sum(pairs) == 16 and pairs[0] > pairs[1] > 0
    assert_same_trajectory(lines, alone, loss)


def test_a_rank_without_a_given_speed_is_named(tmp_path):
    arguments = ["--ds_config", "ds_configs/zero3.json", "--output", str(tmp_path / "run")]
    given = ["balance.mode=given", "balance.speeds={H100: 3}"]
    output = run_ranks(
        "cca_ds/train.py", 1, arguments=[*arguments, "--set", *SETTINGS, *given], timeout=200, check=False
    )[0]
    assert output.returncode == 2
    (line,) = [line for line in output.stderr.splitlines() if "balance.speeds" in line]
    assert "rank 0 on" in line and "(cpu)" in line and "H100" in line
