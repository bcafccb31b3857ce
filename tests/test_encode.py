"""Encoding from every kind of source, by one or several ranks, with bad images, and the command line."""

import io
import json
import os
import re
import resource
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from cca_ds import encode
from cca_ds.data.codes import CodesError, CodeTable
from cca_ds.data.images import open_images

ROOT = Path(__file__).parents[1]
IMAGES = 60


@pytest.fixture(scope="session")
def digits_folder(tmp_path_factory):
    """The first digits as PNG files in ImageNet's layout."""
    folder = tmp_path_factory.mktemp("digits") / "train"
    digits = load_digits()
    for number, (image, label) in enumerate(zip(digits.images[:IMAGES], digits.target, strict=False)):
        (folder / f"class{label}").mkdir(parents=True, exist_ok=True)
        grey = np.round(image * 255 / 16).astype(np.uint8)
        Image.fromarray(grey).save(folder / f"class{label}" / f"{number:04d}.png")
    return folder


@pytest.fixture(scope="session")
def expected():
    """Codes [N, 64] and labels [N] of the digits, in the folder's order: by class, then by number."""
    digits = load_digits()
    order = np.argsort(digits.target[:IMAGES], kind="stable")
    return digits.images[:IMAGES].reshape(IMAGES, 64).astype(int)[order], digits.target[:IMAGES][order]


def run(*arguments, device="cpu"):
    return encode.main(["--recipe", "digits", "--device", device, "--threads", "2", *map(str, arguments)])


def assert_expected(table, expected):
    codes_BL, labels_B = table.take(np.arange(len(table)))
    np.testing.assert_array_equal(codes_BL, expected[0])
    np.testing.assert_array_equal(labels_B, expected[1])
    assert table.manifest.label_histogram == tuple(np.bincount(expected[1], minlength=10))
    table.check()


def test_folder_of_images(tmp_path, digits_folder, expected, device):
    assert (
        run("--source", digits_folder, "--output", tmp_path / "t", "--images_per_shard", 16, device=device)
        == 0
    )
    table = CodeTable.open(tmp_path / "t")
    assert_expected(table, expected)
    manifest = table.manifest
    assert (manifest.images, manifest.classes, manifest.crops, manifest.sequence_length) == (
        IMAGES,
        10,
        1,
        64,
    )
    assert manifest.vocab_size == 17 and manifest.tokenizer == "digits" and len(manifest.tokenizer_hash) == 64
    assert manifest.crop_settings == {"kind": "none", "image_size": 8, "mode": "L"}
    assert manifest.class_names == tuple(f"class{digit}" for digit in range(10))
    assert len(manifest.shards) == 4 and re.match(r"\d+\.\d+", manifest.package_version)
    assert [path for path in os.listdir(tmp_path) if path != "t"] == []
    assert not [
        name for name in os.listdir(tmp_path / "t") if name.startswith((".", "rank", "records", "plan"))
    ]


@pytest.mark.parametrize("compression", ["", "gz", "xz"])
def test_tar_of_images(tmp_path, digits_folder, expected, compression):
    """Members in the folder's order, below leading folders, with a link that must not be followed."""
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
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=source.class_names)}
    )
    rows = [
        {"image": {"bytes": source.read(i), "path": None}, "label": int(source.labels_N[i])}
        for i in range(IMAGES)
    ]
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


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.mark.parametrize("world_size", [2, 5])
def test_ranks_share_the_shards(tmp_path, digits_folder, monkeypatch, world_size, capsys):
    """Every rank makes its part, the last to finish publishes; the files are those of one rank."""
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
    assert run(*settings, "--output", tmp_path / "t") == 0  # a rank that comes late, or a requeued job
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


def spoil(folder, names):
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
    import shutil

    return Path(shutil.copytree(digits_folder, tmp_path / "images"))


def test_unreadable_images_are_listed_and_skipped(tmp_path, own_folder, expected, capsys):
    bad = spoil(own_folder, ["zero.png", "text.jpeg", "half.png", "huge.png"])
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


def test_too_many_unreadable_images_are_an_error_that_can_be_lifted(tmp_path, own_folder, expected, capsys):
    spoil(own_folder, ["zero.png", "text.jpeg"])
    settings = ["--source", own_folder, "--output", tmp_path / "t", "--images_per_shard", 5]
    assert run(*settings, "--max_unreadable", 0.02) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(r"2 of 62 images cannot be used.*zero.png: zero bytes.*allow more", line)
    assert not (tmp_path / "t").exists()
    assert run(*settings, "--max_unreadable", 0.1) == 0
    assert_expected(CodeTable.open(tmp_path / "t"), expected)


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


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_nothing, "no such file or folder"),
        (make_empty_folder, "no class folders with images"),
        (make_empty_class, r"1 class folder\(s\) without images \(class10\)"),
        (make_empty_class_in_tar, r"1 class folder\(s\) without images \(class10\)"),
        (make_truncated_tar, "nor a readable tar"),
        (make_truncated_gz, "nor a readable tar"),
        (make_text_file, "nor a readable tar"),
        (make_broken_dataset, "not a readable dataset"),
    ],
)
def test_unusable_sources_give_one_line_and_leave_nothing(tmp_path, own_folder, make, message, capsys):
    assert run("--source", make(tmp_path, own_folder), "--output", tmp_path / "t") == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and re.search(message, errors[0])
    assert not list(tmp_path.glob("t*"))


def test_other_settings_do_not_continue_a_begun_table(tmp_path, own_folder, capsys):
    spoil(own_folder, ["zero.png"])
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
    assert "there already, with other contents" in capsys.readouterr().err
    assert contents(tmp_path / "t") == before


def test_verify_decodes_a_grid(tmp_path, digits_folder, expected, capsys):
    assert run("--source", digits_folder, "--output", tmp_path / "t", "--verify") == 0
    lines = capsys.readouterr().out
    assert f"{IMAGES} images, 10 classes" in lines and "17 of 17 in use" in lines
    labels = [int(label) for label in re.search(r"labels ([\d, ]+)\)", lines)[1].split(",")]
    grid = np.asarray(Image.open(tmp_path / "t" / "verify.png"))
    assert grid.shape == (32, 32)
    tiles = grid.reshape(4, 8, 4, 8).swapaxes(1, 2).reshape(16, 64)
    for tile, label in zip(tiles, labels, strict=True):
        found = (np.round(tile * (16 / 255)).astype(int) == expected[0]).all(axis=1)
        assert label in expected[1][found]


def test_verify_finds_a_changed_table_and_another_tokenizer(tmp_path, digits_folder, capsys):
    assert run("--source", digits_folder, "--output", tmp_path / "t") == 0
    path = tmp_path / "t" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"tokenizer_hash": "0" * 64}))
    assert run("--output", tmp_path / "t", "--verify") == 2
    assert "made by the tokenizer 000000000000" in capsys.readouterr().err
    histogram = manifest["label_histogram"]
    histogram[0], histogram[1] = histogram[1] + 1, histogram[0] - 1
    path.write_text(json.dumps(manifest | {"label_histogram": histogram}))
    assert run("--output", tmp_path / "t", "--verify") == 2
    assert "differ from the manifest's histogram" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "t"], "--source is missing"),
        (["--source", "."], "--output is missing"),
        (
            ["--source", ".", "--output", "t", "--set", "tokenizer.name=llamagen-vq16"],
            "tokenizer.weights is missing",
        ),
        (["--import_npy", ".", "--output", "t"], "takes LlamaGen's codes"),
        (["--set", "data.crop=none"], "did you mean crops"),
        (["--verify", "--output", "t"], "no table of codes"),
    ],
)
def test_command_lines_that_cannot_work(tmp_path, monkeypatch, digits_folder, arguments, message, capsys):
    monkeypatch.chdir(digits_folder)
    assert encode.main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not (digits_folder / "t").exists()


def test_help_answers_at_once_and_as_a_script():
    """In processor seconds, which a busy machine does not stretch."""
    for program in (["-m", "cca_ds.encode"], ["cca_ds/encode.py"]):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, *program, "--help"]
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert "--import_npy" in result.stdout
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_deepspeeds_argument_is_taken(tmp_path, digits_folder):
    assert run("--local_rank=0", "--source", digits_folder, "--output", tmp_path / "t") == 0


def test_nothing_heavy_is_imported_for_the_command_line():
    heavy = "{'torch', 'datasets', 'pyarrow', 'PIL', 'numpy'}"
    code = f"import sys, cca_ds.encode; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert result.stdout.strip() == "[]"


class Counting(torch.nn.Module):
    """A tokenizer that shows how it is called: the code is the mean grey level."""

    vocab_size = 256

    def __init__(self):
        super().__init__()
        self.batches = []

    def sequence_length(self, image_size):
        return 1

    def encode(self, images_BCHW):
        self.batches.append(len(images_BCHW))
        assert images_BCHW.is_contiguous() and images_BCHW.dtype == torch.float32
        return ((images_BCHW.mean((1, 2, 3)) + 1) * 127.5).round().long()[:, None]


def test_forwards_are_batched_across_images(tmp_path, device):
    from cca_ds.data.crops import CropSettings
    from cca_ds.data.encoding import ImageEncoder

    for number in range(9):
        (tmp_path / "i" / "c").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (number * 20,) * 3).save(tmp_path / "i" / "c" / f"{number}.png")
    tokenizer = Counting()
    settings = CropSettings("ten_crop", 16, (1.1,))
    encoder = ImageEncoder(open_images(tmp_path / "i"), settings, tokenizer, device, batch_size=40)
    seen = []
    content = encoder(range(1, 9), lambda: seen.append(1))
    assert tokenizer.batches == [40, 40] and len(seen) == 8
    assert content.codes_NCL.tolist() == [[[number * 20]] * 10 for number in range(1, 9)]


def test_pixels_are_scaled_as_the_originals_do(device):
    """ToTensor and Normalize(0.5, 0.5), and VAR's x + x - 1, to the last bit."""
    from cca_ds.data.crops import CropSettings
    from cca_ds.data.encoding import ImageEncoder

    class Recording(Counting):
        def encode(self, images_BCHW):
            self.images_BCHW = images_BCHW.cpu()
            return super().encode(images_BCHW)

    tokenizer = Recording()
    encoder = ImageEncoder([], CropSettings("none", 16), tokenizer, device)
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    encoder._encode(np.stack([pixels, pixels.T, 255 - pixels], axis=-1)[None, None])
    unit = torch.from_numpy(pixels).float().div(255)
    torch.testing.assert_close(tokenizer.images_BCHW[0, 0], (unit - 0.5) / 0.5, rtol=0, atol=0)
    torch.testing.assert_close(tokenizer.images_BCHW[0, 1], unit.T.add(unit.T).add(-1), rtol=0, atol=0)


def test_one_place_per_rank(tmp_path):
    from cca_ds.data.building import Plan, TableBuilder
    from cca_ds.data.manifest import Manifest

    builder = TableBuilder(tmp_path / "t", Plan(Manifest(0, 1, 1, 1, 2, "llamagen", "x", ""), 4, 2, {}))
    builder.begin()
    with builder.as_rank(0):
        with pytest.raises(CodesError, match="as rank 0: wait for it"), builder.as_rank(0):
            pass
        with builder.as_rank(1):
            pass
    with builder.as_rank(0):
        pass
