"""Folders of images with links: every image once, whatever the links lead to."""

import os
from pathlib import Path

import pytest
from PIL import Image

from cca_ds.data.image_sources import ImageFolder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes of ten images."""
    for name in ("a", "b", "c"):
        (tmp_path / "images" / name / "deep").mkdir(parents=True)
        for i in range(10):
            Image.new("L", (8, 8), i).save(tmp_path / "images" / name / ("deep" if i > 6 else "") / f"{i}.png")
    return tmp_path / "images"


@pytest.mark.parametrize(
    "links",
    [
        {"a/loop": "."},
        {"a/loop": ".."},
        {"a/deep/loop": "../../.."},
        {"a/loop": "../../.."},
        {"a/loop": "loop"},
        {"a/one": "deep", "a/two": "deep"},
        {"a/nothing": "nowhere"},
    ],
    ids=str,
)
def test_loops_and_repeats_add_nothing(folder, links):
    before = ImageFolder(folder)
    for link, target in links.items():
        (folder / link).symlink_to(target)
    after = ImageFolder(folder)
    assert len(after) == len(before) == 30
    assert sorted(map(os.path.basename, after._paths)) == sorted(map(os.path.basename, before._paths))


def test_links_between_classes_end(folder):
    """As torchvision's ImageFolder: what a class links to is of that class too."""
    (folder / "a/other").symlink_to("../b")
    (folder / "b/other").symlink_to("../a")
    images = ImageFolder(folder)
    assert [int((images.labels_N == label).sum()) for label in range(3)] == [20, 20, 10]


def test_a_linked_class_and_linked_images_count(folder, tmp_path):
    (folder / "c").rename(tmp_path / "elsewhere")
    (folder / "c").symlink_to(tmp_path / "elsewhere")
    (folder / "a" / "more.png").symlink_to("../b/1.png")
    assert len(ImageFolder(folder)) == 31
