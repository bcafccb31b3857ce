"""The parts of a step: by hand, for LlamaGen-3B on one H200 and on two nodes of A100."""

import json

import pytest

from cca_ds import plan
from cca_ds.balance.memory import Sharding
from cca_ds.cluster.devices import DEVICES
from cca_ds.planning.nodes import parse_nodes
from cca_ds.planning.step_parts import explain_lines, step_parts
from cca_ds.reference.placements import PLACEMENTS
from tests.support.planning import job_of

PEAK, MEMORY = 989e12, 4.8e12  # an H200's
SIZE = 3_096_659_200
CODES = 6 * 2 * 576  # six pairs of two rows
BLOCKS = 2 * 24 * (4 * 3200**2 + 3 * 3200 * 8704)  # operations of a code's forward through all blocks' matmuls
ATTENTION = 4 * 576 * 3200 * 24
HEAD = 2 * 16384 * 3200
EAGER = (144 * 3200 + 10 * 8704, 190 * 3200 + 18 * 8704)
COMPILED = (40 * 3200 + 6 * 8704, 62 * 3200 + 10 * 8704)


def parts_of(nodes="1xh200:1", placement="inference", checkpointing=False, compiled=True, **job):
    groups = parse_nodes(nodes)
    record = PLACEMENTS[placement] if placement else None
    return step_parts(job_of(**job), groups, groups[0].device, 6, 3, record, checkpointing, compiled)


def by_name(step):
    return {part.name: part for part in step.parts}


@pytest.mark.parametrize(("compiled", "moved"), [(True, COMPILED), (False, EAGER)])
def test_on_one_gpu_by_hand(compiled, moved):
    step = parts_of(compiled=compiled)
    parts = by_name(step)
    expected = {
        "matmuls of the blocks": (3 * BLOCKS * CODES, 0.73, 0.0),
        "attention": (3 * ATTENTION * CODES, 0.35, 0.0),
        "element-wise": (0.0, 1.0, 24 * (moved[0] + moved[1]) * CODES),
        "head": (3 * HEAD * CODES, 0.73, 10 * 16384 * CODES),
        "recomputation": (0.0, 1.0, 0.0),
        "reference": ((BLOCKS + ATTENTION + HEAD) * CODES, 0.73, (24 * moved[0] + 8 * 16384) * CODES),
        "forwards without gradient": (0.0, 1.0, 0.0),
        "optimizer": (0.0, 1.0, 28 * SIZE),
    }
    total = 0.0
    for name, (flops, share, moved_bytes) in expected.items():
        seconds = flops / (share * PEAK) + moved_bytes / (0.9 * MEMORY)
        assert parts[name].flops == pytest.approx(flops, rel=1e-9)
        assert parts[name].bytes == pytest.approx(moved_bytes, rel=1e-9)
        assert parts[name].seconds == pytest.approx(seconds, rel=1e-9)
        total += seconds
    assert step.seconds == pytest.approx(total, rel=1e-9)
    useful = 4 * (BLOCKS + ATTENTION + HEAD) * CODES
    assert step.mfu == pytest.approx(useful / (total * PEAK), rel=1e-9)
    assert parts["gathers and scatters"].seconds == parts["gathers and scatters"].bytes == 0.0
    # three forwards of 24 blocks: forward, reference, and twice as many kernels backward; two gathers a forward
    kernels = 3 * 24 * (16 if compiled else 40) * 4
    assert parts["host"].seconds == pytest.approx(kernels * 5e-6 + 3 * 24 * 2 * 3e-4, rel=1e-9)
    assert [part.name for part in step.parts if part.beside] == ["gathers and scatters", "host"]


def test_recomputation_is_one_forward_more_and_no_useful_work():
    plain, again = parts_of(), parts_of(checkpointing=True)
    part = by_name(again)["recomputation"]
    assert part.flops == pytest.approx((BLOCKS + ATTENTION) * CODES, rel=1e-9)
    assert part.bytes == 24 * COMPILED[0] * CODES
    assert again.seconds == pytest.approx(plain.seconds + part.seconds, rel=1e-9)
    assert again.mfu == pytest.approx(plain.mfu * plain.seconds / again.seconds, rel=1e-9)
    kernels = 3 * 24 * 16 * 5
    assert by_name(again)["host"].seconds == pytest.approx(kernels * 5e-6 + 3 * 24 * 2 * 3e-4, rel=1e-9)


@pytest.mark.parametrize("placement", ["cached", None])
def test_without_a_reference_on_the_gpu(placement):
    step = parts_of(placement=placement, needs_reference=placement is not None)
    assert by_name(step)["reference"].seconds == 0.0
    useful = 3 * (BLOCKS + ATTENTION + HEAD) * CODES
    assert step.mfu == pytest.approx(useful / (step.seconds * PEAK), rel=1e-9)


def test_a_forward_without_gradient_by_hand():
    """As GFT has one, and no reference."""
    step = parts_of(placement=None, needs_reference=False, extra_forwards=1, rows_per_pair=2)
    part = by_name(step)["forwards without gradient"]
    assert part.flops == pytest.approx((BLOCKS + ATTENTION + HEAD) * CODES, rel=1e-9)
    assert part.bytes == (24 * COMPILED[0] + 8 * 16384) * CODES
    useful = 4 * (BLOCKS + ATTENTION + HEAD) * CODES
    assert step.mfu == pytest.approx(useful / (step.seconds * PEAK), rel=1e-9)
    assert by_name(step)["host"].seconds == pytest.approx(3 * 24 * 16 * 4 * 5e-6 + 3 * 24 * 3 * 3e-4, rel=1e-9)


def test_links_of_two_nodes_by_hand():
    """Seven eighths of the weights arrive at each GPU in an exchange; three or four a forward."""
    for placement, exchanges in (("inference", 3), ("zero3", 4)):
        part = by_name(parts_of("2xa100:4", placement))["gathers and scatters"]
        assert part.bytes == pytest.approx(3 * exchanges * 2 * SIZE * 7 / 8, rel=1e-9)
        across, within = 2 * SIZE / 2 / (0.8 * 200e9), 2 * SIZE * 7 / 8 / (0.8 * 300e9)
        far = max(across, within) + 5e-6 * 3 * 24
        assert part.seconds == pytest.approx(3 * exchanges * far, rel=1e-9)
        gathers = 3 * 24 * (exchanges - 1)  # the scatter of gradients has no gather
        host = by_name(parts_of("2xa100:4", placement))["host"].seconds
        assert host == pytest.approx(3 * 24 * 16 * 4 * 5e-6 + gathers * 3e-4, rel=1e-9)
    slow = parse_nodes("2xa100:4", networks="a100=1")
    step = step_parts(job_of(), slow, slow[0].device, 6, 3, PLACEMENTS["inference"], False, True)
    assert step.seconds == by_name(step)["gathers and scatters"].seconds > 10  # the link takes longest


def test_stages_share_the_optimizer_and_exchange_once_a_step():
    stage = lambda number: Sharding.of({"zero_optimization": {"stage": number}})  # noqa: E731
    far = max(2 * SIZE / 2 / (0.8 * 200e9), 2 * SIZE * 7 / 8 / (0.8 * 300e9)) + 5e-6 * 3 * 24
    for number, update, exchanges in ((0, 28 * SIZE, 2), (1, 28 * SIZE / 8, 2), (2, 28 * SIZE / 8, 3 + 1)):
        parts = by_name(parts_of("2xa100:4", sharding=stage(number)))
        assert parts["optimizer"].bytes == update
        assert parts["gathers and scatters"].seconds == pytest.approx(exchanges * far, rel=1e-9)
        assert parts["host"].seconds == pytest.approx(3 * 24 * 16 * 4 * 5e-6, rel=1e-9)  # no gathers


def test_adaptive_norms_count_once_an_image():
    groups = parse_nodes("1xh200:1")
    job = job_of("var-d16")
    found = by_name(step_parts(job, groups, DEVICES["h200"], 1, 1, None, False, True))["matmuls of the blocks"].flops
    width, blocks = 1024, 16 * 12 * 1024**2 + 32 * 1024  # and the codes' embedding
    norms = 16 * (6 * width * width + 6 * width) + 2 * width * width + 2 * width
    assert found == pytest.approx(3 * 2 * 2 * (680 * blocks + norms), rel=1e-9)


def test_the_table_and_the_json(capsys):
    arguments = ["--recipe", "llamagen-3b", "--nodes", "1xh200:4,1xa40:4", "--explain"]
    assert plan.main(arguments) == 0
    text = capsys.readouterr().out
    assert "A step of " in text and " pairs on h200: " in text and " pairs on a40: " in text
    assert "element-wise" in text and "beside" in text and "Rates: 73% of the peak" in text
    assert plan.main([*arguments, "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    (fast, slow) = tree["step_parts"]
    assert (fast["device"], slow["device"]) == ("h200", "a40") and fast["mfu"] > 0
    assert sum(part["seconds"] for part in fast["parts"] if not part["beside"]) <= fast["seconds"]
    assert plan.main(["--recipe", "llamagen-3b", "--nodes", "1xa40:1", "--explain"]) == 0
    assert "A step of" not in capsys.readouterr().out  # it does not fit
    (line,) = [line for line in explain_lines([parts_of()]) if line.startswith("  optimizer")]
    assert line.split()[1:3] == ["0.0", "86.7"]
