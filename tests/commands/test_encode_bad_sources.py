"""Encoding unreadable images, unusable sources, and into folders that hold a table already."""

import io
import json
import re
import shutil
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from cca_ds.data.codes import CodeTable
from tests.support.encoded_digits import IMAGES, assert_expected, contents, run


def add_unusable(folder, names):
    """Put unusable images into the folder; returns how many."""
    bad = {
        "zero.png": b"",
        "text.jpeg": b"not an image",
        "half.png": (folder / "class1" / "0001.png").read_bytes()[:70],
    }
    stream = io.BytesIO()
    Image.new("1", (12500, 8000)).save(stream, "PNG")
    bad["huge.png"] = stream.getvalue()
    for name in names:
        (folder / "class1" / name).write_bytes(bad[name])
    return len(names)


@pytest.fixture
def own_folder(tmp_path, digits_folder):
    return Path(shutil.copytree(digits_folder, tmp_path / "images"))


def test_unreadable_images_are_listed_and_skipped(tmp_path, own_folder, expected, capsys):
    bad = add_unusable(own_folder, ["zero.png", "text.jpeg", "half.png", "huge.png"])
    settings = ["--source", own_folder, "--output", tmp_path / "t", "--images_per_shard", 5]
    assert run(*settings, "--max_unreadable", bad / (IMAGES + bad)) == 0
    table = CodeTable.open(tmp_path / "t")
    assert_expected(table, expected)
    assert table.manifest.skipped_images == bad and len(table) == IMAGES
    listed = [json.loads(line) for line in (tmp_path / "t" / "skipped.jsonl").read_text().splitlines()]
    reasons = {Path(entry["name"]).name: entry["reason"] for entry in listed}
    assert reasons["zero.png"] == "zero bytes" and "100 megapixels" in reasons["huge.png"]
    assert set(reasons) == {"zero.png", "text.jpeg", "half.png", "huge.png"}
    assert "4 images skipped, listed in" in capsys.readouterr().err


def test_too_many_unreadable_images_are_an_error_unless_allowed(tmp_path, own_folder, expected, capsys):
    add_unusable(own_folder, ["zero.png", "text.jpeg"])
    settings = ["--source", own_folder, "--output", tmp_path / "t", "--images_per_shard", 5]
    assert run(*settings, "--max_unreadable", 0.02) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(r"2 of 62 images cannot be used.*zero.png: zero bytes.*raise --max_unreadable", line)
    assert not (tmp_path / "t").exists()
    assert run(*settings, "--max_unreadable", 0.1) == 0
    assert_expected(CodeTable.open(tmp_path / "t"), expected)


@pytest.mark.parametrize("shard", [5, 1000])
def test_a_table_goes_on_when_the_files_were_replaced(tmp_path, own_folder, expected, capsys, shard):
    whole = (own_folder / "class1" / "0001.png").read_bytes()
    (own_folder / "class1" / "0001.png").write_bytes(b"not an image")
    settings = ["--source", own_folder, "--output", tmp_path / "t", "--images_per_shard", shard, "--max_unreadable", 0]
    for _ in range(2):
        assert run(*settings) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert "(class1/0001.png: not an image that Pillow reads): replace these files and start again" in line
    (own_folder / "class1" / "0001.png").write_bytes(whole)
    assert run(*settings) == 0
    assert_expected(CodeTable.open(tmp_path / "t"), expected)


def test_a_higher_limit_throws_no_finished_shard_away(tmp_path, own_folder, monkeypatch):
    add_unusable(own_folder, ["zero.png"])
    settings = ["--source", own_folder, "--output", tmp_path / "t", "--images_per_shard", 100, "--max_unreadable"]
    assert run(*settings, 0) == 2
    monkeypatch.setattr("cca_ds.data.image_encoder.ImageEncoder.__call__", None)  # nothing is encoded again
    assert run(*settings, 0.1) == 0


def test_files_that_are_no_images_by_their_name_are_counted(tmp_path, own_folder, capsys):
    for name in ("loose.png", "class1/notes.txt", "class1/.hidden"):
        (own_folder / name).write_bytes(b"x")
    assert run("--source", own_folder, "--output", tmp_path / "t") == 0
    assert "note: 2 files are left out (loose.png, class1/notes.txt): images are files in a" in capsys.readouterr().err


def test_a_class_that_cannot_be_printed_is_refused(tmp_path, own_folder, capsys):
    (own_folder / "class1").rename(own_folder / "a\nname")
    assert run("--source", own_folder, "--output", tmp_path / "t") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert r"the class 'a\nname' has a character in its name that is not printed: rename it" in line


def test_images_in_other_modes_are_converted_and_counted(tmp_path, own_folder, capsys):
    for name, mode in {"a.png": "RGBA", "b.jpg": "CMYK", "c.png": "LA", "d.png": "RGBA"}.items():
        Image.new(mode, (8, 8)).save(own_folder / "class2" / name)
    assert run("--source", own_folder, "--output", tmp_path / "t") == 0
    assert CodeTable.open(tmp_path / "t").manifest.converted == {"RGBA": 2, "CMYK": 1, "LA": 1}
    assert "converted to L: 1 CMYK, 1 LA, 2 RGBA" in capsys.readouterr().err


def make_nothing(tmp_path, images):
    return tmp_path / "nowhere"


def make_empty_folder(tmp_path, images):
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


def make_empty_class(tmp_path, images):
    (images / "class10").mkdir()
    return images


def make_empty_class_in_tar(tmp_path, images):
    (images / "class10").mkdir()
    with tarfile.open(tmp_path / "i.tar", "w") as archive:
        archive.add(images, arcname="images")
    return tmp_path / "i.tar"


def make_truncated_tar(tmp_path, images):
    with tarfile.open(tmp_path / "i.tar", "w") as archive:
        archive.add(images, arcname="images")
    content = (tmp_path / "i.tar").read_bytes()
    (tmp_path / "i.tar").write_bytes(content[: len(content) // 2 + 100])
    return tmp_path / "i.tar"


def make_truncated_gz(tmp_path, images):
    with tarfile.open(tmp_path / "i.tar.gz", "w:gz") as archive:
        archive.add(images, arcname="images")
    content = (tmp_path / "i.tar.gz").read_bytes()
    (tmp_path / "i.tar.gz").write_bytes(content[: len(content) // 2])
    return tmp_path / "i.tar.gz"


def make_text_file(tmp_path, images):
    (tmp_path / "i.tar").write_text("not a tar")
    return tmp_path / "i.tar"


def make_broken_dataset(tmp_path, images):
    (images / "state.json").write_text("{")
    return images


def make_truncated_dataset(tmp_path, images):
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a"])})
    content = (images / "class1" / "0001.png").read_bytes()
    rows = [{"image": {"bytes": content, "path": None}, "label": 0}] * 50
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(tmp_path / "set"))
    [path] = (tmp_path / "set").glob("*.arrow")
    path.write_bytes(path.read_bytes()[:2000])
    return tmp_path / "set"


def make_tar_of_truncated_dataset(tmp_path, images):
    folder = make_truncated_dataset(tmp_path, images)
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        archive.add(folder, arcname="set")
    return tmp_path / "set.tar"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_nothing, "no such file"),
        (make_empty_folder, "no class folders with images"),
        (make_empty_class, r"1 class folder\(s\) without images \(class10\)"),
        (make_empty_class_in_tar, r"1 class folder\(s\) without images \(class10\)"),
        (make_truncated_tar, "nor a readable tar"),
        (make_truncated_gz, "nor a readable tar"),
        (make_text_file, "nor a readable tar"),
        (make_broken_dataset, "not a readable dataset"),
        (make_truncated_dataset, "not a readable dataset"),
        (make_tar_of_truncated_dataset, "not a readable dataset"),
    ],
)
def test_unusable_sources_give_one_line_and_leave_no_file(tmp_path, own_folder, make, message, capsys):
    source = make(tmp_path, own_folder)
    capsys.readouterr()  # datasets' own progress bar
    assert run("--source", source, "--output", tmp_path / "t") == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and re.search(message, errors[0])
    assert not list(tmp_path.glob("t*"))


def test_other_settings_do_not_continue_a_begun_table(tmp_path, own_folder, capsys):
    add_unusable(own_folder, ["zero.png"])
    settings = ["--source", own_folder, "--output", tmp_path / "t"]
    assert run(*settings, "--images_per_shard", 5, "--max_unreadable", 0) == 2
    assert run(*settings, "--images_per_shard", 9, "--max_unreadable", 1) == 2
    assert "was begun with another images_per_shard" in capsys.readouterr().err
    (own_folder / "class3" / "new.png").write_bytes((own_folder / "class1" / "0001.png").read_bytes())
    assert run(*settings, "--images_per_shard", 5, "--max_unreadable", 1) == 2
    assert "was begun with another images, table.source_hash" in capsys.readouterr().err


def test_a_finished_table_is_never_overwritten(tmp_path, own_folder, capsys):
    settings = ["--source", own_folder, "--output", tmp_path / "t"]
    assert run(*settings) == 0
    before = contents(tmp_path / "t")
    (own_folder / "class3" / "new.png").write_bytes((own_folder / "class1" / "0001.png").read_bytes())
    assert run(*settings) == 2
    assert "exists already, with other contents" in capsys.readouterr().err
    assert contents(tmp_path / "t") == before
