"""docs/own_data.md as it stands there: five classes of generated photos, all the way to a report."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cca_ds.metrics.inception import InceptionFID
from tests.dist.fork_server import CPU_ONLY
from tests.dist.ranks import free_port

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs" / "own_data.md").read_text()
CLASSES = ("beagle", "corgi", "poodle", "terrier", "whippet")
MODES = ("RGB", "RGBA", "L", "P", "LA")


def photos(folder: Path) -> None:
    """Four of each class: JPEG and PNG, with transparency, grey and palettes, of mixed sizes."""
    draw = np.random.default_rng(0)
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for number in range(4):
            mode, side = MODES[(label + number) % 5], (70 + 9 * number, 90 - 5 * label)
            image = Image.fromarray(draw.integers(0, 256, (6, 5, 3), dtype=np.uint8)).resize(side).convert(mode)
            suffix = "jpg" if mode in ("RGB", "L") else "png"
            image.save(folder / name / f"{number}.{suffix}")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


@pytest.mark.slow  # eight commands, two of them trainings: a minute and a half
def test_the_documented_path_from_photos_to_a_report(tmp_path):
    photos(tmp_path / "photos")
    (recipe,) = blocks("yaml")
    (tmp_path / "mine.yaml").write_text(recipe)
    (tmp_path / "cca_ds").symlink_to(REPOSITORY / "cca_ds")
    torch.manual_seed(0)
    torch.save(InceptionFID().state_dict(), tmp_path / "inception.pth")  # the published file is not fetched
    environment = {**os.environ, **CPU_ONLY, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    shown = []
    for command in "".join(blocks("bash")).splitlines():
        done = subprocess.run(
            ["bash", "-c", re.sub("^deepspeed", f"deepspeed --master_port={free_port()}", command)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
        shown.append(done.stdout + done.stderr)
    assert sorted(path.name for path in (tmp_path / "poodles" / "images").iterdir()) == ["0002"]
    assert len(list((tmp_path / "runs" / "cca" / "drawn" / "images").rglob("*.png"))) == 20
    cca = next(text for text in shown if "mine: llamagen-b" in text and "reference inference" in text)
    assert f"5 classes ({', '.join(CLASSES)})" in cca
    assert json.loads((tmp_path / "mine" / "config.json").read_text())["id2label"]["2"] == "poodle"
    assert "paper" not in cca and "nll" not in cca  # no published figure of another model
    reference = np.load(tmp_path / "real.npz")
    assert reference["arr_0"].shape == (20, 64, 64, 3) and reference["mu"].shape == (2048,)
    assert reference["arr_1"].tolist() == [label for label in range(5) for _ in range(4)]
    page = (tmp_path / "runs" / "cca" / "report.html").read_text()
    assert "drawn.scores" in page and "weights are not the published ones" in page and "FID" in page
    card = (tmp_path / "mine" / "README.md").read_text()
    assert "mine" in card and str(tmp_path) not in card


def test_the_page_names_no_key_that_there_is_not():
    from cca_ds.config.recipes import load_recipe

    (recipe,) = blocks("yaml")
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mine.yaml"
        path.write_text(recipe)
        run = load_recipe(str(path))
    assert run.paper == {} and run.baseline.nll_band is None and run.model.overrides["num_classes"] == 5
