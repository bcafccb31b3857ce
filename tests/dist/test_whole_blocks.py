"""Under ZeRO-3 a block's weights are gathered at once, and the numbers are the same as layer by layer."""

import re

import pytest

from tests.dist.fork_server import ForkedRanks
from tests.dist.runs import PATIENCE, REPOSITORY, assert_same_trajectory, command, losses, train

pytestmark = pytest.mark.dist

STEPS = 3
MODEL = "model.overrides={n_layer: 4, n_head: 2, dim: 32, multiple_of: 16}"


@pytest.fixture
def counted(tmp_path):
    """Fetches and gathers of a run's steps, and its losses."""

    def run(name, environment, *settings):
        python, _, *arguments = command(
            tmp_path / name,
            f"batch.max_steps={STEPS}",
            "model.weights=null",
            "model.from_scratch=true",
            MODEL,
            "baseline.check=false",
            *settings,
        )
        with ForkedRanks(
            [python, str(REPOSITORY / "tests/dist/count_gathers.py"), *arguments], 2, environment, None
        ) as running:
            outputs = running.wait(PATIENCE)
        assert [output.returncode for output in outputs] == [0, 0], outputs
        log = (tmp_path / name / "logs" / "rank_00000.log").read_text() + outputs[0].stderr
        fetched, gathered = map(int, re.search(r"counted (\d+) (\d+)", log).groups())
        return fetched / STEPS, gathered / STEPS, losses(tmp_path / name)

    return run


@pytest.mark.parametrize("settings", [(), ("model.activation_checkpointing=true",)], ids=["plain", "checkpointing"])
def test_fewer_fetches_and_gathers_and_the_same_losses(counted, settings):
    by_block, by_layer = counted("block", {}, *settings), counted("layer", {"BY_LAYER": "1"}, *settings)
    assert by_block[2] == by_layer[2]
    assert by_block[0] < by_layer[0] / 4 and by_block[1] < by_layer[1] / 2, (by_block, by_layer)


@pytest.mark.parametrize("placement", ["inference", "zero3"])
def test_compiled_blocks_follow_the_same_trajectory(placement, tmp_path):
    """Gathered by hooks outside of the compiled forward, on two ranks of unequal pairs and with recomputation."""
    settings = (
        "model.dropout=false", "batch.max_steps=5", f"reference.placement={placement}", "batch.micro_size=5",
        "model.activation_checkpointing=true", "balance.mode=given", "balance.speeds={0: 2, 1: 1}",
    )  # fmt: skip
    for name in ("false", "true"):
        train(2, tmp_path / name, *settings, f"model.compile={name}")
    assert_same_trajectory(losses(tmp_path / "true"), losses(tmp_path / "false"))


def test_a_trace_of_some_steps(counted, tmp_path):
    counted("run", {}, "logging.profile_steps=[2, 2]", "deterministic=true", "logging.memory_snapshot=true")
    traces = sorted((tmp_path / "run" / "profile").iterdir())
    assert [path.name for path in traces] == ["rank_00000.json", "rank_00001.json"]
    assert '"traceEvents"' in traces[0].read_text()
