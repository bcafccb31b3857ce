"""What drawing DDO's images costs, by hand arithmetic, and where the plan counts it."""

import pytest

from cca_ds.cluster.devices import DEVICES
from cca_ds.config.recipes import load_recipe
from cca_ds.models.cost import model_cost
from cca_ds.planning.drawing import drawing_seconds, image_seconds
from cca_ds.planning.dry_run import describe
from cca_ds.planning.job import job_of
from cca_ds.planning.nodes import parse_nodes
from cca_ds.planning.outcomes import outcome
from cca_ds.planning.report import report
from cca_ds.reference.placements import PLACEMENTS
from tests.support.planning import ZERO3

H100 = DEVICES["h100"]


def job(preset, *settings, images=1000):
    run = load_recipe(f"{preset}-ddo", list(settings))
    return job_of(run, model_cost(preset), ZERO3, images)


def test_one_image_at_a_time_waits_for_the_weights():
    """LlamaGen-B: 576 times 111 M parameters of 2 bytes, and the keys and values of 12 blocks of 768."""
    model = model_cost("llamagen-b")
    assert model.decode_steps == 576
    moved = 576 * 2 * model.parameters + 576 * 576 * 768 * 12 * 2
    assert image_seconds(model, H100, 1) == pytest.approx(moved / H100.memory_bandwidth)
    together = 576 * 2 * model.parameters / 64 + 576 * 576 * 768 * 12 * 2
    assert image_seconds(model, H100, 64) == pytest.approx(together / H100.memory_bandwidth)


def test_many_images_of_a_var_at_a_time_wait_for_the_operations():
    model = model_cost("var-d16")
    assert model.decode_steps == 10
    assert image_seconds(model, H100, 1000) == pytest.approx(
        model.forward_flops() / (H100.peak_flops * H100.efficiency), rel=1e-9
    )


def test_gpus_draw_side_by_side():
    model, (h100, a40) = model_cost("var-d16"), parse_nodes("2xh100:8,1xa40:4")
    fast, slow = (image_seconds(model, group.device, 8) for group in (h100, a40))
    assert drawing_seconds(model, [h100, a40], 8) == pytest.approx(1 / (16 / fast + 4 / slow))


def test_images_drawn_online_lengthen_the_step_of_those_that_draw():
    groups = parse_nodes("1xh100:8,1xa40:8")
    ahead, online = job("var-d30"), job("var-d30", "data.generated=online", "batch.micro_size=8")
    assert [placement.name for placement in online.placements] == ["inference", "streamed"]
    inference, streamed = PLACEMENTS["inference"], PLACEMENTS["streamed"]
    drawn = 256 * drawing_seconds(online.model, groups, 8)
    without, with_it = (outcome(one, groups, inference, True).step_seconds for one in (ahead, online))
    assert with_it - without == pytest.approx(drawn)
    usual, lengthened = (outcome(one, groups, streamed, True) for one in (ahead, online))
    assert lengthened.producers == usual.producers and lengthened.drawing_seconds == 0
    drawn = 256 * drawing_seconds(online.model, usual.producers, 64)  # reference.batch_size
    assert lengthened.producer_seconds - usual.producer_seconds == pytest.approx(drawn)


def test_a_table_is_drawn_once_and_is_stated_apart():
    groups, whole = parse_nodes("1xh100:8"), job("llamagen-b", images=1_000_000)
    shown = outcome(whole, groups, PLACEMENTS["inference"], False)
    hours = 1_000_000 * image_seconds(whole.model, H100, 48) / 3600
    text = report(whole, groups, [shown], shown)
    assert f"Drawing: 1,000,000 images once, 48 at a time, in 576 forwards: {hours / 8 * 60:.1f} min" in text
    assert f"{hours:.3g} GPU hours, before training and not in the table" in text
    plain = job_of(load_recipe("llamagen-b"), whole.model, ZERO3, 1000)
    of_cca = outcome(plain, groups, PLACEMENTS["inference"], False)
    assert "Drawing:" not in report(plain, groups, [of_cca], of_cca)


def test_a_dry_run_names_the_images_and_their_cost():
    text = describe(load_recipe("var-d16-ddo"), {})
    assert "8 forwards a pair: 2 x forward and backward (3) + reference (1), as many as cca; an image" in text
    assert "generated images: data/imagenet256_var_generated" in text
