"""Two short runs in TensorBoard: curves, grids, configuration, the table that compares them; and their report."""

import functools
import io
import json
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from cca_ds.reporting.page import CHARTS, write_report
from tests.dist.ranks import REPOSITORY, clean_environment
from tests.dist.runs import PATIENCE, metrics, scratch, train

pytestmark = pytest.mark.dist

STEPS = 4
STATUSES = ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"]


@functools.cache
def runs() -> Path:
    """The folder of two runs that differ in lambda; made once."""
    for ranks, lambda_ in ((1, 1), (2, 30)):
        folder = scratch() / "compared" / f"lambda_{lambda_}"
        train(ranks, folder, f"loss.lambda={lambda_}", f"batch.max_steps={STEPS}", "logging.tensorboard=true",
              "logging.sample_every_steps=2")  # fmt: skip
    return scratch() / "compared"


@functools.cache
def events(run: str) -> EventAccumulator:
    """All events of a run; there is one file, since rank 0 alone writes."""
    folder = runs() / run
    assert len(list(folder.rglob("events.*"))) == 1
    return EventAccumulator(str(folder), size_guidance={"images": 0, "tensors": 0}).Reload()


def documented_tags() -> set[str]:
    """Of the README's table, less what a CPU in float32 does not have."""
    table = re.search(r"\| TensorBoard tag .*?\n\n", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    tags = re.findall(r"`([\w/]+)`", "\n".join(line.split("|")[1] for line in table[0].strip().splitlines()))
    return set(tags) - {"throughput/mfu", "loss_scale", "skipped_steps"}


def test_curves_are_the_documented_ones_with_the_values_of_the_log():
    found = events("lambda_30")
    assert set(found.Tags()["scalars"]) == documented_tags()
    lines = metrics(runs() / "lambda_30")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for tag in documented_tags():
        points = [(event.step, event.value) for event in found.Scalars(tag)]
        assert points == [(line["step"], pytest.approx(line[tag], rel=1e-6)) for line in lines if tag in line], tag


def test_grids_are_the_pictures_of_the_samples_folder():
    found = events("lambda_30").Images("samples")
    assert [event.step for event in found] == [0, 2, 4]
    for event in found:
        with Image.open(io.BytesIO(event.encoded_image_string)) as shown:
            pixels = np.asarray(shown.convert("L"))
        file = Image.open(runs() / "lambda_30" / "samples" / f"step_{event.step:06d}.png")
        np.testing.assert_array_equal(pixels, np.asarray(file))
        assert pixels.shape == (4 * 34, 10 * 34)  # forty digits, a column a class, enlarged, with gaps


def test_the_configuration_is_a_text_that_can_be_read_back():
    (event,) = events("lambda_30").Tensors("config/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    lines = text.splitlines()
    assert all(line.startswith("    ") for line in lines)  # Markdown's preformatted text
    config = yaml.safe_load((runs() / "lambda_30" / "config.yaml").read_text())
    shown = yaml.safe_load("\n".join(line[4:] for line in lines))
    for key in ("compile", "activation_checkpointing"):  # what "auto" is on a CPU
        assert config["model"].pop(key) == "auto" and shown["model"].pop(key) is False
    assert shown == config


def test_a_run_says_what_it_is_compared_by_and_that_it_ended_well():
    content = events("lambda_30").summary_metadata
    start = metadata.parse_session_start_info_plugin_data(content[metadata.SESSION_START_INFO_TAG].plugin_data.content)
    values = {key: getattr(value, value.WhichOneof("kind")) for key, value in start.hparams.items()}
    expected = {"loss.name": "cca", "loss.lambda": 30.0, "loss.beta": 0.5, "model.preset": "digits", "seed": 0,
                "model.dropout": "false", "optimizer.learning_rate": 1e-4, "batch.global_size": 32}  # fmt: skip
    assert values.items() >= expected.items()
    end = metadata.parse_session_end_info_plugin_data(content[metadata.SESSION_END_INFO_TAG].plugin_data.content)
    assert end.status == 1  # api.proto: STATUS_SUCCESS


def served(folder: Path) -> tuple[subprocess.Popen, str]:
    """A TensorBoard and its address, on a port that it finds free."""
    server = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--port", "0"],
        env=clean_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    said = []
    for line in server.stderr:
        said.append(line)
        if found := re.search(r"http://localhost:\d+", line):
            return server, found[0]
    raise AssertionError(f"TensorBoard did not start: {''.join(said)}")


def asked(address: str, path: str, body: dict | None = None) -> dict:
    """What the server answers, as the page in the browser would get it."""
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(f"{address}/data/{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def test_tensorboard_shows_both_runs_in_one_table():
    server, address = served(runs())
    try:
        end = time.monotonic() + PATIENCE
        while len(asked(address, "runs")) < 2 and time.monotonic() < end:
            time.sleep(0.1)  # it reads the folder in the background
        columns = asked(address, "plugin/hparams/experiment", {"experimentName": ""})
        settings = [info["name"] for info in columns["hparamInfos"] if info["differs"]]
        assert settings == ["loss.lambda"]
        tags = {info["name"]["tag"] for info in columns["metricInfos"]}
        assert tags == documented_tags()
        parameters = [{"hparam": info["name"], "includeInResult": True} for info in columns["hparamInfos"]]
        parameters += [{"metric": info["name"], "includeInResult": True} for info in columns["metricInfos"]]
        request = {"experimentName": "", "allowedStatuses": STATUSES, "colParams": parameters, "startIndex": 0,
                   "sliceSize": 10}  # fmt: skip
        rows = asked(address, "plugin/hparams/session_groups", request)["sessionGroups"]
        pictures = asked(address, "plugin/images/tags")
    finally:
        server.terminate()
        server.wait(60)
    assert {row["name"]: row["hparams"]["loss.lambda"] for row in rows} == {"lambda_1": 1.0, "lambda_30": 30.0}
    for row in rows:
        (session,) = row["sessions"]
        assert session["status"] == "STATUS_SUCCESS"
        last = metrics(runs() / row["name"])[-1]
        results = {result["name"]["tag"]: result["value"] for result in row["metricValues"]}
        for tag in ("loss", "rewards/margins", "rewards/accuracies"):
            assert results[tag] == pytest.approx(last[tag], rel=1e-6)
    assert all("samples" in tags for tags in pictures.values()) and len(pictures) == 2


def test_the_report_lacks_nothing_that_the_run_left():
    page = write_report(runs() / "lambda_30").read_text()
    assert "Missing or unreadable" not in page
    for text in ("Before (step 0, left) and after (step 4, right)", "2 x cpu", "class 9", "lambda: 30.0"):
        assert text in page, text
    tags = set(documented_tags())
    charted = [tags & set(of_chart) for *_, of_chart in CHARTS]  # a chart per entry, one per tag of no entry
    assert page.count('class="chart"') == sum(map(bool, charted)) + len(tags - set().union(*charted))
