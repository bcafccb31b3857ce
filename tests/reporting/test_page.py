"""The report page of a run: complete, self-contained, escaped, and whole when parts of the run are missing."""

import base64
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cca_ds import evaluate
from cca_ds.config.recipes import dump_recipe, load_recipe
from cca_ds.data.table_files import write_codes
from cca_ds.reporting.charts import COLOURS, line_chart, value_range
from cca_ds.reporting.page import columns_of, write_report
from cca_ds.reporting.recorded_run import read_run

HOSTILE = "</pre></title><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">'\"&"
MAGENTA, GREEN = (255, 0, 255), (0, 200, 0)
CHARTS_OF_RUN = ["Loss", "Rewards", "Learning rate", "Throughput", "Peak memory"]  # of `run_folder`


def solid_grid(colour: tuple[int, int, int], columns: int = 10) -> bytes:
    """A grid of ten columns of 34 pixels in one colour."""
    picture = io.BytesIO()
    Image.new("RGB", (columns * 34, 68), colour).save(picture, format="PNG")
    return picture.getvalue()


def colour_of(address: str) -> tuple[int, int, int]:
    """Of the first pixel of a picture in a data URI."""
    data = base64.b64decode(address.removeprefix("data:image/png;base64,"))
    return Image.open(io.BytesIO(data)).convert("RGB").getpixel((0, 0))


def metrics_line(step: int) -> str:
    values = {"loss": 1 / step, "rewards/chosen": 0.1 * step, "rewards/rejected": -0.2 * step, "lr": 1e-4,
              "throughput/images_per_second": 100.0 + step, "memory/peak_gib": 1.25}  # fmt: skip
    return json.dumps({"step": step, "time": 0.0, **values})


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "run"
    (folder / "samples").mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_recipe(load_recipe("llamagen-l")))
    (folder / "metrics.jsonl").write_text("".join(metrics_line(step) + "\n" for step in range(1, 57)))
    (folder / "samples" / "step_000000.png").write_bytes(solid_grid(MAGENTA))
    (folder / "samples" / "step_000028.png").write_bytes(solid_grid((1, 2, 3)))
    (folder / "samples" / "step_000056.png").write_bytes(solid_grid(GREEN))
    (folder / "summary.json").write_text(json.dumps({"steps": 56, "versions": {"torch": "2.13.0"}}))
    scores = {"metrics": {"fid": 3.51, "inception_score": 271.25, "precision": None}, "notes": ["one note"],
              "protocol": {"neighbours": 3}, "sampler": {"seed": 9}}  # fmt: skip
    (folder / "after.json").write_text(json.dumps(scores))
    return folder


class Page(HTMLParser):
    """Tags, their attributes, and the text of a page."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data):
        self.text += data


def report_of(folder: Path) -> tuple[str, Page]:
    html = write_report(folder).read_text()
    return html, Page(html)


def test_page_holds_every_part_of_the_run(run_folder):
    html, page = report_of(run_folder)
    assert [alt for _, name, alt in page.attributes if name == "alt" and alt] == CHARTS_OF_RUN
    assert page.tags.count("img") == 25  # also ten columns, before and after
    for text in ("llamagen-l", "lambda: 300.0", "3.510", "271.25", "one note", "2.13.0"):
        assert text in page.text, text
    for of_paper in ("paper, base", "19.000", "paper, cca", "3.430", "s = 0, top-k 0, top-p 1"):  # Table 3
        assert of_paper in page.text, of_paper
    for note in ("<li>after: one note</li>", "<li>after: sampler seed 9</li>", "<li>after: protocol neighbours 3</li>"):
        assert note in html, note
    assert "Missing or unreadable" not in page.text
    assert re.search(r"median images per second</td><td>131", html)  # of steps 6 to 56
    assert "56 steps" in page.text
    assert "Before (step 0, left) and after (step 56, right)" in page.text
    pictures = [value for _, name, value in page.attributes if name == "src"]
    assert [colour_of(picture) for picture in pictures[:20]] == [MAGENTA, GREEN] * 10
    assert "class 900" in page.text  # the tenth column of ImageNet's thousand classes


def test_page_is_self_contained(run_folder):
    """No script, no address but data URIs, and a policy that forbids both."""
    html, page = report_of(run_folder)
    allowed = """html head meta title style body header section h1 h2 h3 p table thead tbody tr th td pre div figure
        figcaption span img ul li"""
    assert set(page.tags) <= set(allowed.split())
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        assert name not in ("href", "srcset", "action", "style"), (tag, name)
        if name == "src":
            assert value.startswith("data:image/png;base64,")
    assert "default-src 'none'" in html
    assert "url(" not in html
    assert "@import" not in html


def test_everything_from_the_run_is_escaped(run_folder):
    """Markup in names, tags, notes, the summary or the configuration adds no tag to the page."""
    _, clean = report_of(run_folder)
    config = (run_folder / "config.yaml").read_text()
    (run_folder / "config.yaml").write_text(config.replace("name: llamagen-l", f"name: {json.dumps(HOSTILE)}", 1))
    (run_folder / "summary.json").write_text(json.dumps({HOSTILE: HOSTILE, "versions": {HOSTILE: HOSTILE}}))
    hostile = {"metrics": {"fid": HOSTILE}, "notes": [HOSTILE], "protocol": {HOSTILE: HOSTILE}, "sampler": HOSTILE}
    (run_folder / "after.json").write_text(json.dumps(hostile))
    (run_folder / f"{HOSTILE.replace('/', '_')[:60]}.json").write_text(json.dumps(hostile))
    with open(run_folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 57, HOSTILE: 1.0}) + "\n")
    (run_folder / "samples" / "zz<script>.png").write_bytes(solid_grid(GREEN))
    html, page = report_of(run_folder)
    assert "script" not in page.tags
    assert set(page.tags) <= set(clean.tags)
    assert "<script" not in html
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert page.text.count("document.title='taken'") > 6  # as text


def test_the_demos_comparison_is_among_the_results(run_folder):
    rows = [{"name": "base", "s": 0.75, "fid": {"mean": 1.69, "spread": 0.1}, "inception_score": 8.44,
             "accuracy": 0.84, "seconds": 3.04},
            {"name": HOSTILE, "s": "0", "fid": 1.55}, "no row", {"name": "without scores"}]  # fmt: skip
    (run_folder / "demo.json").write_text(json.dumps({"rows": rows, "claims": {"holds": True}}))
    (run_folder / "samples.png").write_bytes(solid_grid(GREEN))
    html, page = report_of(run_folder)
    for text in ("base, s = 0.75", "1.690", "8.44", "0.840", "class accuracy", "sampling, s", "3.0"):
        assert text in page.text, text
    assert "1.550" in page.text
    assert "<script" not in html
    assert page.tags.count("img") == 26
    assert "without scores" not in page.text


def test_missing_and_damaged_parts_are_named(tmp_path):
    folder = tmp_path / "run"
    (folder / "samples").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(
        metrics_line(1) + "\n" + metrics_line(2) + '\n[1]\n{"step": 3, "loss": NaN, "lr": true}\n{"step": 4, "lo'
    )
    (folder / "samples" / "step_000001.png").write_bytes(solid_grid(GREEN)[:60])
    (folder / "summary.json").write_text("{")
    _, page = report_of(folder)
    for problem in ("config.yaml is missing", "metrics.jsonl: 2 lines", "summary.json is not JSON",
                    "samples/step_000001.png is not a picture"):  # fmt: skip
        assert problem in page.text, problem
    assert "img" in page.tags
    assert read_run(folder).series["loss"] == [(1, 1.0), (2, 0.5)]


def test_steps_logged_twice_count_once_and_the_later_line_wins(tmp_path):
    lines = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "loss": 2.5}, {"step": 3, "loss": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_run(tmp_path).series["loss"] == [(1, 3.0), (2, 2.5), (3, 1.0)]


def test_a_folder_without_a_run_is_refused_in_one_line(tmp_path, capsys):
    for folder, message in ((tmp_path, "no run in this folder"), (tmp_path / "none", "no such folder")):
        assert evaluate.main(["--report", str(folder)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert message in error
    assert not (tmp_path / "report.html").exists()


def test_command_prints_where_the_page_is(run_folder, capsys):
    assert evaluate.main(["--report", str(run_folder)]) == 0
    assert capsys.readouterr().out.strip() == str(run_folder / "report.html")


def test_page_states_the_guidance_of_the_grids(run_folder):
    assert "(step 56, right), without guidance." in report_of(run_folder)[1].text
    guided = dump_recipe(load_recipe("llamagen-l-cfg", ["sampling.guidance_scale=0.5"]))
    (run_folder / "config.yaml").write_text(guided)
    assert "(step 56, right), guidance s = 0.5." in report_of(run_folder)[1].text


def test_scores_stand_beside_the_settings_they_were_sampled_with(run_folder):
    scores = {"metrics": {"fid": 5.2}, "sampler": {"guidance_scale": 0.25, "top_k": 900, "top_p": 0.96, "seed": 3}}
    (run_folder / "after.json").write_text(json.dumps(scores))
    html, _ = report_of(run_folder)
    assert "<th>sampled with</th>" in html and "<td>s = 0.25, top-k 900, top-p 0.96</td>" in html
    (run_folder / "after.json").write_text(json.dumps({"metrics": {"fid": 5.2}, "sampler": HOSTILE}))
    (run_folder / "config.yaml").write_text("name: mine\n")
    assert "sampled with" not in report_of(run_folder)[0]  # nothing says with which


def test_classes_have_their_names_where_the_table_of_codes_is_there(run_folder, tmp_path):
    names = [f"breed {label}" for label in range(8)] + ["<b>Alsatian</b>", "9"]
    codes = tmp_path / "codes"
    write_codes(codes, np.zeros((10, 1, 4), np.uint16), np.arange(10), vocab_size=8, classes=10, family="llamagen",
                tokenizer="llamagen-vq16", tokenizer_hash="0", class_names=tuple(names))  # fmt: skip
    config = load_recipe("llamagen-l", [f"data.codes={codes}", "model.overrides={num_classes: 10}"])
    (run_folder / "config.yaml").write_text(dump_recipe(config))
    html, page = report_of(run_folder)
    for text in ("class 0: breed 0", "class 7: breed 7", "class 8: <b>Alsatian</b>"):
        assert text in page.text, text
    assert "<b>" not in html and ">class 9<" in html  # a name that is the number is not said twice
    (codes / "manifest.json").write_text("{")
    assert ">class 8<" in report_of(run_folder)[0]


def test_grids_are_cut_into_columns():
    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    grid = io.BytesIO()
    Image.fromarray(pixels).save(grid, format="PNG")
    parts = [np.asarray(Image.open(io.BytesIO(part))) for part in columns_of(grid.getvalue(), 3)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), pixels)
    assert len(columns_of(grid.getvalue(), 4)) == 1  # 6 pixels do not divide by 4


def pixels_of(png: bytes) -> np.ndarray:
    """[H, W, 3] of a picture."""
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def rows_of(pixels: np.ndarray, colour: str) -> np.ndarray:
    """Indices of the rows in which a line of this colour is drawn, from the top."""
    rgb = [int(colour[place : place + 2], 16) for place in (1, 3, 5)]
    return np.nonzero((np.abs(pixels - rgb).max(axis=-1) < 24).any(axis=1))[0]


def test_lines_have_colours_of_their_own_and_values_their_place():
    """One line at 0, one at 10, on an axis with a margin of 5%: at 1/22 of its height from the bottom and the top."""
    lines = {"chosen": [(0, 0.0), (100, 0.0)], "rejected": [(0, 10.0), (100, 10.0)]}
    assert value_range([0.0, 10.0]) == (-0.5, 10.5)
    pixels = pixels_of(line_chart(lines, "reward"))
    first, second = rows_of(pixels, COLOURS[0]), rows_of(pixels, COLOURS[1])
    assert second.min() < first.min() and second.max() < first.max()
    assert not len(rows_of(pixels, COLOURS[2]))
    assert tuple(pixels[0, 0]) == (255, 255, 255)


def test_chart_without_points_is_empty_and_one_point_is_a_dot():
    assert line_chart({}, "loss") == line_chart({"loss": []}, "loss") == b""
    assert len(rows_of(pixels_of(line_chart({"loss": [(5, 2.0)]}, "loss")), COLOURS[0])) > 4


@pytest.mark.parametrize(
    "points",
    [
        [(step, (-1.0) ** step * 1e308) for step in range(50)],
        [(0, 5e-324), (1, 0.0)],
        [(0, 1e300), (2**53, -1e300)],
        [(step, float(step % 7)) for step in range(100_000)],
        [(-5, 1.0), (-5, 2.0)],
    ],
)
def test_extreme_values_are_drawn(points):
    assert len(rows_of(pixels_of(line_chart({"$x_{$ <b> \u2603\U0001f600": points, "": points}, "$")), COLOURS[1]))


@pytest.mark.parametrize(
    ("values", "limits"),
    [
        ([2.0, 2.0 + 1e-12], (-0.1, 2.1)),
        ([-0.3], (-0.315, 0.015)),
        ([0.0, 0.0], (-0.05, 1.05)),
        ([1.0, 2.0], (0.95, 2.05)),
    ],
)
def test_a_constant_is_drawn_on_an_axis_from_zero(values, limits):
    assert value_range(values) == pytest.approx(limits)


def test_odd_values_in_files_leave_the_page_whole(run_folder):
    """NaN, infinities, integers beyond float64 and values of other types, in the log, the summary and the scores."""
    huge = "1" + "0" * 400
    with open(run_folder / "metrics.jsonl", "a") as file:
        for line in (
            '{"step": 57, "loss": NaN, "lr": Infinity, "grad_norm": null, "rewards/chosen": "high"}',
            f'{{"step": 58, "loss": {huge}, "odd": [1], "mfu": {{}}}}',
            f'{{"step": {huge}, "loss": 1.0}}',
            '{"step": Infinity, "loss": 1.0}',
            '{"step": NaN, "loss": 1.0}',
            '{"loss": 1.0}',
            "null",
        ):
            file.write(line + "\n")
    scores = f'{{"metrics": {{"fid": NaN, "inception_score": {huge}, "precision": true, "recall": []}}, "notes": 3}}'
    (run_folder / "after.json").write_text(scores)
    (run_folder / "demo.json").write_text(f'{{"rows": [{{"fid": -Infinity, "s": {huge}, "seconds": NaN}}]}}')
    (run_folder / "summary.json").write_text(f'{{"steps": {huge}, "final": [], "versions": null, "loss": NaN}}')
    _, page = report_of(run_folder)
    assert "metrics.jsonl: 5 lines could not be read" in page.text
    assert "56 steps" in page.text
    run = read_run(run_folder)
    assert len(run.series["loss"]) == 56
    assert [alt for tag, name, alt in page.attributes if (tag, name) == ("img", "alt") and alt] == CHARTS_OF_RUN


def test_headless_chromium_shows_pictures_and_curves_and_runs_no_script(run_folder, tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here; Debian's is `apt-get install chromium`")
    config = (run_folder / "config.yaml").read_text()
    (run_folder / "config.yaml").write_text(config + f"\n# {HOSTILE}\n")
    page = write_report(run_folder).resolve()
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
               "--force-color-profile=srgb", "--window-size=1400,2600", "--no-first-run", "--disable-sync",
               "--disable-background-networking", "--disable-component-update", "--disable-quic",
               "--host-resolver-rules=MAP * ~NOTFOUND"]  # fmt: skip
    picture = tmp_path / "page.png"
    subprocess.run([*command, f"--screenshot={picture}", page.as_uri()], check=True, capture_output=True, timeout=120)
    pixels = np.asarray(Image.open(picture).convert("RGB")).reshape(-1, 3).astype(int)

    def share_of(colour: tuple[int, int, int]) -> float:
        return float((np.abs(pixels - colour).max(axis=1) < 12).sum())

    assert share_of(MAGENTA) > 10_000  # before
    assert share_of(GREEN) > 10_000  # after
    assert share_of((0x2F, 0x6F, 0xDE)) > 300  # curves
    dumped = subprocess.run(
        [*command, "--dump-dom", page.as_uri()], check=True, capture_output=True, text=True, timeout=120
    ).stdout
    assert "<title>llamagen-l</title>" in dumped
    assert dumped.count('class="chart"') == 5
