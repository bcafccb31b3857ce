"""Flags, overrides and sources that encode, sample, export and plan refuse: one line each, and nothing is written."""

import bz2
import gzip
import io
import lzma
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cca_ds import encode, export, plan, sample
from tests.support.refusals import refusal

FEW = ["--set", "sampling.images_per_class=1", "logging.progress=false"]


def setting(*overrides):
    return ["--set", "logging.progress=false", *overrides]


SAMPLE = {
    "a class too many": (["--classes", "10", *FEW], "--classes 10: the model has classes 0 to 9"),
    "a negative class": (["--classes", "-1", *FEW], "--classes -1"),
    "a side of nothing": (["--resize", "0", *FEW], "--resize 0"),
    "a side of a million": (["--resize", "1000000", *FEW], "--resize 1000000"),
    "guidance that is none": (["--guidance_scale", "nan", *FEW], "must be finite"),
    "infinite guidance": (["--cfg", "inf", *FEW], "must be finite"),
    "negative guidance": (["--guidance_scale=-1", *FEW], "at least 0"),
    "guidance twice": (["--guidance_scale", "1", "--cfg", "2", *FEW], "give one"),
    "a folder below a file": (["--output", "{t}/text/x", *FEW], "cannot be written"),
    "a file": (["--output", "{t}/text", *FEW], "cannot be written"),
    "a pipe": (["--output", "{t}/pipe", *FEW], "cannot be written"),
    "no folder that can be made": (["--output", "/proc/x", *FEW], "cannot be written"),
    "no user of that name": (["--output", "~nosuchuser/x", *FEW], "no such user"),
    "weights that are not there": (["--weights", "{t}/none", *FEW], "does not exist"),
    "weights that are a pipe": (["--weights", "{t}/pipe", *FEW], "pipe"),
    "weights that are a text": (["--weights", "{t}/text", *FEW], "{t}/text"),
    "weights that are an empty folder": (["--weights", "{t}/empty", *FEW], "a folder without config.yaml"),
    "a checkpoint of a file": (["--checkpoint", "{t}/empty", *FEW], "neither an average nor checkpoints"),
    "an average of a file": (["--ema", *FEW], "neither an average nor checkpoints"),
    "no weights": (["--recipe", "llamagen-b", *FEW], "--weights is missing"),
    "no picture": (setting("sampling.images_per_class=0"), "images_per_class"),
    "a batch of none": (setting("sampling.batch_size=0"), "batch_size"),
    "a negative top-k": (setting("sampling.top_k=-4"), "top_k"),
    "a top-p of two": (setting("sampling.top_p=2"), "top_p"),
    "options of no tokenizer": (setting("tokenizer.options={x: 3}"), "leave out x"),
    "a tokenizer without weights": (setting("tokenizer.name=var-vqvae"), "tokenizer.weights is missing"),
    "an override there is not": (setting("model.overrides={dimm: 7}"), "did you mean dim?"),
    "a word as a width": (setting("model.overrides={dim: abc}"), "dim=abc is no int"),
    "a switch as a width": (setting("model.overrides={dim: true}"), "dim=True is no int"),
    "half a layer": (setting("model.overrides={n_layer: 1.5}"), "n_layer=1.5 is no int"),
    "a list of layers": (setting("model.overrides={n_layer: [1]}"), "n_layer=[1] is no int"),
    "a width of a million million": (setting("model.overrides={dim: 1000000000000}"), "more than 1,048,576"),
    "an infinite norm": (setting("model.overrides={norm_eps: .inf}"), "norm_eps"),
    "no norm": (setting("model.overrides={norm_eps: .nan}"), "norm_eps"),
    "heads that do not divide": (setting("model.overrides={n_head: 7}"), "multiple of"),
    "no head": (setting("model.overrides={n_head: 0}"), "at least 1"),
    "fewer than no layers": (setting("model.overrides={n_layer: -1}"), "at least 1"),
    "codes of another vocabulary": (setting("model.overrides={vocab_size: 99}"), "do not belong together"),
}

EXPORT = {
    "an empty folder": (["--run", "{t}/empty"], "holds no config.yaml"),
    "no folder": (["--run", "{t}/none"], "no such folder"),
    "a file": (["--run", "{t}/text"], "no such folder"),
    "a pipe": (["--run", "{t}/pipe"], "no such folder"),
    "no user of that name": (["--run", "~nosuchuser/x"], "no such user"),
    "a type there is not": (["--run", "{t}/empty", "--dtype", "int8"], "int8"),
    "a number that is none": (["--run", "{t}/empty", "--lambda", "x"], "--lambda"),
}

PLAN = {
    "a hundred thousand million GPUs": (["--nodes", "1xh100:99999999999"], "at most 100,000"),
    "as many nodes": (["--nodes", "99999999999xh100:8"], "at most 100,000"),
    "3,000 groups": (["--nodes", ",".join(["1xh100:8"] * 3000)], "3000 groups"),
    "a number of 5,000 digits": (["--nodes", "9" * 5000 + "xh100:8"], "--nodes"),
    "no node": (["--nodes", "0xh100:8"], "0xh100:8"),
    "no GPU": (["--nodes", "1xh100:0"], "1xh100:0"),
    "no GPU, in two digits": (["--nodes", "1xh100:00"], "1xh100:00"),
    "nothing": (["--nodes", ""], "names no node"),
    "another device": (["--nodes", "1xtpu:8"], "no GPU named tpu"),
    "no image": (["--nodes", "1xh100", "--images", "0"], "--images 0"),
    "fewer than no images": (["--nodes", "1xh100", "--images", "-5"], "--images -5"),
    "too many images": (["--nodes", "1xh100", "--images", "1" * 30], "at most"),
    "an efficiency of two": (["--nodes", "1xh100", "--efficiency", "h100=2"], "(0, 1]"),
    "an efficiency of none": (["--nodes", "1xh100", "--efficiency", "h100=nan"], "h100=nan"),
    "an efficiency of nothing": (["--nodes", "1xh100", "--efficiency", "h100"], "DEVICE=NUMBER"),
    "the network of what is not there": (["--nodes", "1xh100", "--network", "a40=5"], "--network a40=5: "),
    "efficiency of what is not there": (["--nodes", "1xh100", "--efficiency", "a100=0.5"], "--efficiency a100=0.5: "),
    "an infinite network": (["--nodes", "1xh100", "--network", "h100=inf"], "h100=inf"),
    "a word as a width": (["--nodes", "1xh100", "--set", "model.overrides={dim: x}"], "dim=x is no int"),
    "a width too large": (["--nodes", "1xh100", "--set", "model.overrides={dim: 1000000000000}"], "more than"),
    "a batch too large": (["--nodes", "1xh100", "--set", "batch.global_size=1000000000"], "batch.global_size"),
    "a pipe for DeepSpeed's file": (["--nodes", "1xh100", "--ds_config", "{t}/pipe"], "--ds_config {t}/pipe"),
}

ENCODE = {
    "no source": ([], "--source is missing"),
    "a source that is not there": (["--source", "{t}/none"], "no such file"),
    "a pipe": (["--source", "{t}/pipe"], "pipe"),
    "a device": (["--source", "/dev/zero"], "device"),
    "pictures that are not read": (["--source", "{t}/gifs"], "--source {t}/gifs: a/y.gif is not read"),
    "a tar of pictures that are not read": (["--source", "{t}/gifs.tar"], "--source {t}/gifs.tar: a/y.gif is not read"),
    "mirrored centre crops": (["--source", "{t}/images", "--flip"], "--flip mirrors random crops, and data.crops=none"),
    "codes and images": (
        ["--recipe", "llamagen-b", "--import_npy", "{t}", "--source", "{t}"],
        "takes finished codes: leave out",
    ),
    "a text": (["--source", "{t}/text"], "neither a folder nor a readable tar"),
    "an empty folder": (["--source", "{t}/empty"], "no class folders"),
    "a share that is none": (["--source", "{t}/images", "--max_unreadable", "nan"], "nan is no number from 0 to 1"),
    "a negative share": (["--source", "{t}/images", "--max_unreadable=-0.1"], "-0.1 is no number"),
    "a share of two": (["--source", "{t}/images", "--max_unreadable", "2"], "2 is no number"),
    "megapixels that are none": (["--source", "{t}/images", "--max_megapixels", "nan"], "nan is no number"),
    "infinite megapixels": (["--source", "{t}/images", "--max_megapixels", "inf"], "inf is no number"),
    "no megapixels": (["--source", "{t}/images", "--max_megapixels", "0"], "0 is no number"),
    "a device there is not": (["--source", "{t}/images", "--device", "tpu"], "--device tpu"),
    "a device's number": (["--source", "{t}/images", "--device", "cuda:999"], "--device cuda:999"),
    "a batch of none": (["--source", "{t}/images", "--batch_size", "0"], "--batch_size"),
    "a batch in Arabic digits": (["--source", "{t}/images", "--batch_size", "\u0663"], "--batch_size"),
    "threads without end": (["--source", "{t}/images", "--threads", "999999999"], "--threads"),
    "shards of none": (["--source", "{t}/images", "--images_per_shard", "0"], "--images_per_shard"),
    "a thousand million crops": (["--source", "{t}/images", "--set", "data.crops_per_image=1000000000"], "less than"),
    "a side of a million": (["--source", "{t}/images", "--set", "data.image_size=1000000"], "data.image_size"),
    "no table to verify": (["--verify"], "holds no table"),
    "codes for another model": (["--import_npy", "{t}/empty"], "--import_npy"),
}
TABLE = [("sample", sample.main, ["--output", "{t}/out"], SAMPLE), ("plan", plan.main, [], PLAN),
         ("export", export.main, ["--output", "{t}/w.safetensors"], EXPORT),
         ("encode", encode.main, ["--recipe", "digits", "--output", "{t}/out"], ENCODE)]  # fmt: skip
CASES = [pytest.param(main, [*first, *flags], said, id=f"{name}: {case}")
         for name, main, first, cases in TABLE for case, (flags, said) in cases.items()]  # fmt: skip


@pytest.fixture
def place(tmp_path):
    """A text, a pipe, an empty folder and a folder of images."""
    (tmp_path / "text").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").mkdir()
    (tmp_path / "gifs" / "a").mkdir(parents=True)
    for name in ("x.png", "y.gif"):
        Image.new("RGB", (8, 8)).save(tmp_path / "gifs" / "a" / name)
    with tarfile.open(tmp_path / "gifs.tar", "w") as archive:
        archive.add(tmp_path / "gifs" / "a", "a")
    images(tmp_path / "images")
    return tmp_path


def images(folder: Path) -> Path:
    for label in range(10):
        (folder / f"class{label}").mkdir(parents=True)
        Image.fromarray(np.full((8, 8), label * 17, np.uint8)).save(folder / f"class{label}" / "0.png")
    return folder


@pytest.mark.parametrize(("main", "flags", "said"), CASES)
def test_flags(place, main, flags, said):
    flags = [flag.replace("{t}", str(place)) for flag in flags]
    line = refusal(main, flags, place)
    assert said.replace("{t}", str(place)) in line, line


def archive(path: Path, folder: Path, kind: str = "") -> Path:
    with tarfile.open(path, f"w:{kind}") as file:
        file.add(folder, "train")
    return path


def damaged(path: Path, at: float, keep: float = 1.0) -> Path:
    data = bytearray(path.read_bytes())
    for place in range(int(len(data) * at), min(len(data), int(len(data) * at) + 16)):
        data[place] ^= 0x5A
    path.write_bytes(data[: int(len(data) * keep)])
    return path


def tar_of(path: Path, **members: bytes) -> Path:
    with tarfile.open(path, "w") as file:
        for name, data in members.items():
            entry = tarfile.TarInfo(name.replace("__", "/"))
            entry.size = len(data)
            file.addfile(entry, io.BytesIO(data))
    return path


SOURCES = {
    "gzip cut short": lambda t: damaged(archive(t / "a.tar.gz", t / "images", "gz"), 1.0, 0.6),
    "bzip2 cut short": lambda t: damaged(archive(t / "a.tar.bz2", t / "images", "bz2"), 1.0, 0.6),
    "xz cut short": lambda t: damaged(archive(t / "a.tar.xz", t / "images", "xz"), 1.0, 0.6),
    "gzip damaged": lambda t: damaged(archive(t / "a.tar.gz", t / "images", "gz"), 0.5),
    "bzip2 damaged": lambda t: damaged(archive(t / "a.tar.bz2", t / "images", "bz2"), 0.5),
    "xz damaged": lambda t: damaged(archive(t / "a.tar.xz", t / "images", "xz"), 0.5),
    "gzip whose checksum differs": lambda t: other_checksum(archive(t / "a.tar.gz", t / "images", "gz")),
    "gzip of a text": lambda t: Path(shutil.copy(t / "text", t / "a")) and write(t / "a", gzip.compress(b"x" * 99)),
    "bzip2 of a text": lambda t: write(t / "a", bz2.compress(b"x" * 99)),
    "xz of a text": lambda t: write(t / "a", lzma.compress(b"x" * 99)),
    "an empty file": lambda t: write(t / "a", b""),
    "zeros": lambda t: write(t / "a", bytes(10240)),
    "a tar of nothing": lambda t: tar_of(t / "a.tar"),
    "a tar of texts": lambda t: tar_of(t / "a.tar", train__x__a=b"text"),
    "a tar in a tar that is none": lambda t: tar_of(t / "a.tar", train__n01=b"", n01_tar=b"x") and rename_member(t),
    "a dataset of no JSON": lambda t: tar_of(t / "a.tar", **{"d__state.json": b"{", "d__dataset_info.json": b"{"}),
    "a dataset of a list": lambda t: tar_of(t / "a.tar", **{"d__state.json": b"[1]", "d__dataset_info.json": b"[]"}),
    "a dataset nested deeply": lambda t: tar_of(t / "a.tar", **{"d__state.json": b"[" * 100_000}),
    "a dataset of pipes": lambda t: dataset(t / "d", state=None),
    "a dataset's state is a list": lambda t: dataset(t / "d", state="[1]"),
    "a dataset's state is no JSON": lambda t: dataset(t / "d", state="{"),
    "a dataset without files": lambda t: dataset(t / "d", state='{"_data_files": []}'),
    "a dataset of files elsewhere": lambda t: dataset(t / "d", state='{"_data_files": [{"filename": "../../x"}]}'),
    "a dataset of no splits": lambda t: dataset(t / "d", splits="{}"),
    "a dataset of splits that are numbers": lambda t: dataset(t / "d", splits='{"splits": 3}'),
}


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def other_checksum(path: Path) -> Path:
    """It stands in the last eight bytes, behind the end of the tar."""
    data = path.read_bytes()
    return write(path, data[:-8] + bytes([data[-8] ^ 1]) + data[-7:])


def rename_member(t: Path) -> Path:
    return tar_of(t / "a.tar", **{"n01.tar": b"not a tar" * 100})


def dataset(folder: Path, state: str | None = "{}", splits: str | None = None) -> Path:
    folder.mkdir()
    if splits is not None:
        (folder / "dataset_dict.json").write_text(splits)
    elif state is None:
        os.mkfifo(folder / "state.json")
        (folder / "dataset_dict.json").write_text("{}")
    else:
        (folder / "state.json").write_text(state)
        (folder / "dataset_info.json").write_text("{}")
    return folder


@pytest.mark.parametrize("case", SOURCES)
def test_sources(place, case):
    source = SOURCES[case](place)
    line = refusal(encode.main, ["--recipe", "digits", "--output", place / "out", "--source", source], place)
    assert str(source) in line and line.startswith("encode: "), line
