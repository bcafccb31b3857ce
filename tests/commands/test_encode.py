"""Encoding from every kind of source, on one rank or several."""

import os
import re
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest

from cca_ds.data.codes import CodeTable
from cca_ds.data.image_sources import open_images
from tests.support.encoded_digits import IMAGES, ROOT, assert_expected, contents, run


def test_folder_of_images(tmp_path, digits_folder, expected, device):
    assert run("--source", digits_folder, "--output", tmp_path / "t", "--images_per_shard", 16, device=device) == 0
    table = CodeTable.open(tmp_path / "t")
    assert_expected(table, expected)
    manifest = table.manifest
    assert (manifest.images, manifest.classes, manifest.crops, manifest.sequence_length) == (IMAGES, 10, 1, 64)
    assert manifest.vocab_size == 17 and manifest.tokenizer == "digits" and len(manifest.tokenizer_hash) == 64
    assert manifest.crop_settings == {"kind": "none", "image_size": 8, "mode": "L"}
    assert manifest.class_names == tuple(f"class{digit}" for digit in range(10))
    assert len(manifest.shards) == 4 and re.match(r"\d+\.\d+", manifest.package_version)
    assert [path for path in os.listdir(tmp_path) if path != "t"] == []
    assert not [name for name in os.listdir(tmp_path / "t") if name.startswith((".", "rank", "records", "plan"))]


@pytest.mark.parametrize("compression", ["", "gz", "xz"])
def test_tar_of_images(tmp_path, digits_folder, expected, compression):
    """Below leading folders, with a link that must not be followed."""
    path = tmp_path / f"images.tar{'.' if compression else ''}{compression}"
    with tarfile.open(path, f"w:{compression}") as archive:
        for image in sorted(digits_folder.rglob("*.png")):
            archive.add(image, arcname=f"./data/imagenet/train/{image.relative_to(digits_folder)}")
        link = tarfile.TarInfo("data/imagenet/train/class0/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
    assert run("--source", path, "--output", tmp_path / "t", "--images_per_shard", 16) == 0
    assert_expected(CodeTable.open(tmp_path / "t"), expected)


def test_shuffled_tar_has_the_folders_order(tmp_path, digits_folder, expected):
    images = np.random.default_rng(0).permutation(sorted(map(str, digits_folder.rglob("*.png"))))
    with tarfile.open(tmp_path / "i.tar", "w") as archive:
        for image in images:
            archive.add(image, arcname=os.path.relpath(image, digits_folder))
    assert run("--source", tmp_path / "i.tar", "--output", tmp_path / "t") == 0
    assert_expected(CodeTable.open(tmp_path / "t"), expected)


@pytest.mark.parametrize("outer", ["", "gz"])
def test_tar_of_a_tar_per_class(tmp_path, digits_folder, expected, outer):
    """ImageNet's own archive: one tar in the tar for every class."""
    with tarfile.open(tmp_path / "i.tar", f"w:{outer}") as archive:
        for folder in sorted(digits_folder.iterdir()):
            with tarfile.open(tmp_path / f"{folder.name}.tar", "w") as inner:
                for image in sorted(folder.iterdir()):
                    inner.add(image, arcname=image.name)
            archive.add(tmp_path / f"{folder.name}.tar", arcname=f"{folder.name}.tar")
    assert run("--source", tmp_path / "i.tar", "--output", tmp_path / "t") == 0
    assert_expected(CodeTable.open(tmp_path / "t"), expected)


@pytest.fixture(scope="session")
def dataset_folder(tmp_path_factory, digits_folder):
    """The same images as a Hugging Face dataset of two splits, in several record batches and files."""
    import datasets

    folder = tmp_path_factory.mktemp("dataset") / "set"
    source = open_images(digits_folder)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=source.class_names)})
    rows = [{"image": {"bytes": source.read(i), "path": None}, "label": int(source.labels_N[i])} for i in range(IMAGES)]
    whole = datasets.Dataset.from_list(rows, features=features)
    splits = datasets.DatasetDict({"train": whole, "validation": whole.select(range(0, IMAGES, 2))})
    splits.save_to_disk(str(folder), num_shards={"train": 3, "validation": 1})
    return folder


def test_dataset_on_disk(tmp_path, dataset_folder, expected):
    assert run("--source", dataset_folder, "--output", tmp_path / "t") == 0
    assert_expected(CodeTable.open(tmp_path / "t"), expected)
    assert run("--source", dataset_folder, "--split", "validation", "--output", tmp_path / "v") == 0
    assert_expected(CodeTable.open(tmp_path / "v"), (expected[0][::2], expected[1][::2]))
    assert run("--source", dataset_folder / "train", "--output", tmp_path / "d") == 0
    assert_expected(CodeTable.open(tmp_path / "d"), expected)


def test_no_script_in_a_dataset_is_run(tmp_path, dataset_folder, expected):
    """A loading script named like its folder, as `datasets` used to run."""
    folder = shutil.copytree(dataset_folder, tmp_path / "set")
    for script in (folder / "set.py", folder / "train" / "train.py"):
        script.write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    assert run("--source", folder, "--output", tmp_path / "t") == 0
    assert_expected(CodeTable.open(tmp_path / "t"), expected)
    assert not (tmp_path / "executed").exists()


def test_tar_of_a_dataset(tmp_path, dataset_folder, expected, capsys):
    for mode in ("w", "w:gz"):
        with tarfile.open(tmp_path / f"d{mode[2:]}.tar", mode) as archive:
            archive.add(dataset_folder, arcname="somewhere/set")
    assert run("--source", tmp_path / "d.tar", "--output", tmp_path / "t") == 0
    assert_expected(CodeTable.open(tmp_path / "t"), expected)
    assert run("--source", tmp_path / "d.tar", "--split", "test", "--output", tmp_path / "v") == 2
    assert run("--source", tmp_path / "dgz.tar", "--output", tmp_path / "v") == 2
    errors = capsys.readouterr().err
    assert "train, validation, not one named test" in errors and "decompress it" in errors


@pytest.mark.parametrize("world_size", [2, 5])
def test_ranks_share_the_shards(tmp_path, digits_folder, monkeypatch, world_size, capsys):
    """Each rank makes its shards and the last one publishes; the files equal those of one rank."""
    settings = ["--source", digits_folder, "--images_per_shard", 7]
    assert run(*settings, "--output", tmp_path / "alone") == 0
    for name, value in {"WORLD_SIZE": world_size, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    for rank in range(world_size):
        assert not (tmp_path / "t").exists()
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert run(*settings, "--output", tmp_path / "t") == 0
    assert contents(tmp_path / "t") == contents(tmp_path / "alone")
    assert "rank 0 has finished its shards" in capsys.readouterr().err
    assert run(*settings, "--output", tmp_path / "t") == 0  # a rank that starts late, or a requeued job
    assert "finished already" in capsys.readouterr().err


@pytest.mark.dist
def test_ranks_at_the_same_time(tmp_path, digits_folder, expected):
    """Three processes as torchrun starts them; whichever ends last publishes, and all succeed."""
    command = [sys.executable, "-m", "cca_ds.encode", "--recipe", "digits", "--source", str(digits_folder)]
    command += ["--output", str(tmp_path / "t"), "--images_per_shard", "3", "--device", "cpu"]
    common = {"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    started = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    errors = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], errors
    assert_expected(CodeTable.open(tmp_path / "t"), expected)
    assert os.listdir(tmp_path) == ["t"]
