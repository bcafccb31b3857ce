"""Images, statistics, reports and flags that `evaluate` cannot score: one line each, and nothing is written."""

import io
import json
import os
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cca_ds.evaluate import main
from tests.support.refusals import called, refusal

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)


def archive(path: Path, *arrays, **named) -> Path:
    np.savez(path, *arrays, **named)
    return path


def zip_of(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, data in members.items():
            file.writestr(name.replace("__", "."), data)
    return path


def npy(array) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


def header(text: bytes, length: int | None = None) -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text) if length is None else length) + text


def pictures(folder: Path, **files: bytes | Path) -> Path:
    folder.mkdir()
    for number, image in enumerate(PIXELS[:3]):
        Image.fromarray(image).save(folder / f"{number}.png")
    for name, data in files.items():
        (folder / name.replace("__", ".")).write_bytes(data)
    return folder


def png(image: Image.Image, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


def cut(path: Path, size: float) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * size)])
    return path


def flipped(path: Path, at: float) -> Path:
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 0xFF
    path.write_bytes(data)
    return path


def encrypted(path: Path) -> Path:
    data = bytearray(archive(path, PIXELS).read_bytes())
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = data.find(mark)
        data[at + offset] |= 1
    path.write_bytes(data)
    return path


def pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def huge_png() -> bytes:
    """A PNG of 60,000 x 60,000 pixels in a few bytes: its header says so."""
    data = bytearray(png(Image.new("L", (8, 8))))
    data[16:24] = struct.pack(">II", 60000, 60000)
    import zlib

    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


SAMPLES = {
    "nothing there": (lambda t: t / "none.npz", "no such file"),
    "empty file": (lambda t: (zip_of(t / "a.npz") and (t / "a.npz").write_bytes(b"")) or t / "a.npz", "not an .npz"),
    "a text": (lambda t: (t / "a.npz").write_text("hello") and t / "a.npz", "not an .npz"),
    "a pipe": (lambda t: pipe(t / "a.npz"), "pipe"),
    "a device": (lambda t: Path("/dev/zero"), "/dev/zero"),
    "an empty archive": (lambda t: zip_of(t / "a.npz"), "no arr_0"),
    "another member": (lambda t: archive(t / "a.npz", images=PIXELS), "no arr_0"),
    "an encrypted archive": (lambda t: encrypted(t / "a.npz"), "encrypted"),
    "cut in half": (lambda t: cut(archive(t / "a.npz", PIXELS), 0.5), "a.npz"),
    "a flipped byte of the pixels": (lambda t: flipped(archive(t / "a.npz", PIXELS), 0.5), "Bad CRC-32"),
    "a flipped byte, compressed": (
        lambda t: flipped((np.savez_compressed(t / "a.npz", PIXELS), t / "a.npz")[1], 0.5), "a.npz"),
    "floats": (lambda t: archive(t / "a.npz", PIXELS / 255), "uint8"),
    "objects": (lambda t: zip_of(t / "a.npz", arr_0__npy=npy(np.array([{}, 1], dtype=object))), "uint8"),
    "channels first": (lambda t: archive(t / "a.npz", PIXELS.transpose(0, 3, 1, 2)), "channels last"),
    "fortran order": (lambda t: archive(t / "a.npz", np.asfortranarray(PIXELS)), "Fortran"),
    "no image": (lambda t: archive(t / "a.npz", PIXELS[:0]), "no image"),
    "images without pixels": (lambda t: archive(t / "a.npz", PIXELS[:, :0]), "shape"),
    "one image": (lambda t: archive(t / "a.npz", PIXELS[:1]), "at least 2"),
    "a header of nothing": (lambda t: zip_of(t / "a.npz", arr_0__npy=b""), "arr_0"),
    "a header that is no dictionary": (lambda t: zip_of(t / "a.npz", arr_0__npy=header(b"[1]\n")), "arr_0"),
    "a header of code": (
        lambda t: zip_of(t / "a.npz", arr_0__npy=header(b"{'descr': '|u1', 'shape': __import__('os')}\n")), "arr_0"),
    "a header that is too long": (lambda t: zip_of(t / "a.npz", arr_0__npy=header(b"{" * 60000)), "arr_0"),
    "a shape of 10^30": (
        lambda t: zip_of(t / "a.npz", arr_0__npy=header(
            b"{'descr': '|u1', 'fortran_order': False, 'shape': (1, 10000000000000000, 10000000000000000, 3)}\n")),
        "pixels"),
    "more images than are there": (
        lambda t: zip_of(t / "a.npz", arr_0__npy=header(
            b"{'descr': '|u1', 'fortran_order': False, 'shape': (99, 8, 8, 3)}\n") + bytes(1000)),
        "a.npz"),
    "a negative shape": (
        lambda t: zip_of(t / "a.npz", arr_0__npy=header(
            b"{'descr': '|u1', 'fortran_order': False, 'shape': (-2, 8, 8, 3)}\n") + bytes(1000)), "shape"),
    "labels of another number": (lambda t: archive(t / "a.npz", PIXELS, np.arange(3)), "3"),
    "labels that are floats": (lambda t: archive(t / "a.npz", PIXELS, np.full(12, 0.5)), "arr_1"),
    "labels that are NaN": (lambda t: archive(t / "a.npz", PIXELS, np.full(12, np.nan)), "arr_1"),
    "labels that are objects": (
        lambda t: zip_of(t / "a.npz", arr_0__npy=npy(PIXELS), arr_1__npy=npy(np.array([{}] * 12))), "arr_1"),
    "labels outside the classes": (lambda t: archive(t / "a.npz", PIXELS, np.arange(12) + 5), "label"),
    "images of another size": (lambda t: archive(t / "a.npz", PIXELS.repeat(2, 1)), "8 x 8"),
    "an empty folder": (lambda t: (t / "f").mkdir() or t / "f", "no image"),
    "a folder of texts": (lambda t: pictures(t / "f", x__png=b"no picture"), "x.png"),
    "a picture of zero bytes": (lambda t: pictures(t / "f", x__png=b""), "x.png"),
    "a picture cut short": (lambda t: pictures(t / "f", x__png=png(Image.fromarray(PIXELS[0]))[:90]), "x.png"),
    "a picture of 3.6 gigapixels": (lambda t: pictures(t / "f", x__png=huge_png()), "x.png"),
    "pictures of two sizes": (lambda t: pictures(t / "f", x__png=png(Image.new("RGB", (9, 8)))), "mixed sizes"),
    "a transparent picture": (lambda t: pictures(t / "f", x__png=png(Image.new("RGBA", (8, 8)))), "RGBA"),
    "a picture of 16 bits": (lambda t: pictures(t / "f", x__png=png(Image.new("I;16", (8, 8)))), "I;16"),
    "a pipe among pictures": (lambda t: (pictures(t / "f"), pipe(t / "f/x.png"))[0], "x.png"),
    "a folder named like a picture": (lambda t: (pictures(t / "f"), (t / "f/x.png").mkdir())[0], "x.png"),
    "a link to nowhere": (lambda t: (pictures(t / "f"), (t / "f/x.png").symlink_to("nowhere"))[0], "x.png"),
    "a gif": (lambda t: pictures(t / "f", x__gif=png(Image.new("P", (8, 8)), "GIF")), "x.gif"),
}  # fmt: skip


@pytest.mark.parametrize("case", SAMPLES)
def test_samples(tmp_path, case):
    make, said = SAMPLES[case]
    line = refusal(main, [make(tmp_path), "--recipe", "digits"], tmp_path)
    assert said in line and line.startswith("evaluate: "), line


MEAN, COVARIANCE = np.zeros(64), np.eye(64)
NAN, INFINITE = MEAN + np.nan, COVARIANCE + np.inf


def reference_of(t: Path, **named) -> Path:
    return archive(t / "r.npz", **named)


REFERENCES = {
    "nothing there": (lambda t: t / "none.npz", "no such file"),
    "a pipe": (lambda t: pipe(t / "r.npz"), "pipe"),
    "NaN in the mean": (lambda t: reference_of(t, mu=NAN, sigma=COVARIANCE), "NaN"),
    "infinite covariance": (lambda t: reference_of(t, mu=MEAN, sigma=INFINITE), "NaN or infinite"),
    "a covariance of another width": (lambda t: reference_of(t, mu=MEAN, sigma=np.eye(63)), "(63, 63)"),
    "another network's": (lambda t: reference_of(t, mu=np.zeros(2048), sigma=np.eye(2048)), "2048"),
    "a mean of two dimensions": (lambda t: reference_of(t, mu=COVARIANCE, sigma=COVARIANCE), "(64, 64)"),
    "a mean of none": (lambda t: reference_of(t, mu=np.float64(1), sigma=COVARIANCE), "()"),
    "no numbers": (lambda t: reference_of(t, mu=np.zeros(0), sigma=np.zeros((0, 0))), "(0,)"),
    "words": (lambda t: reference_of(t, mu=np.array(["a"] * 64), sigma=COVARIANCE), "<U1"),
    "complex numbers": (lambda t: reference_of(t, mu=MEAN + 1j, sigma=COVARIANCE), "complex128"),
    "objects": (lambda t: zip_of(t / "r.npz", mu__npy=npy(np.array([{}] * 64)), sigma__npy=npy(COVARIANCE)), "r.npz"),
    "negative variances": (lambda t: reference_of(t, mu=MEAN, sigma=-COVARIANCE), "no covariance"),
    "a covariance that is not symmetric": (
        lambda t: reference_of(t, mu=MEAN, sigma=COVARIANCE + np.triu(np.ones((64, 64)))), "no covariance"),
    "statistics cut short": (lambda t: cut(reference_of(t, mu=MEAN, sigma=COVARIANCE), 0.5), "r.npz"),
    "a flipped byte": (lambda t: flipped(reference_of(t, mu=MEAN, sigma=COVARIANCE), 0.5), "r.npz"),
    "one image": (lambda t: archive(t / "r.npz", PIXELS[:1]), "two vectors"),
    "images of another size": (lambda t: archive(t / "r.npz", PIXELS.repeat(2, 1)), "8 x 8"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFERENCES)
def test_references(tmp_path, case):
    make, said = REFERENCES[case]
    arguments = [archive(tmp_path / "a.npz", PIXELS), "--reference", make(tmp_path), "--recipe", "digits", "--no_cache"]
    line = refusal(main, arguments, tmp_path)
    assert said in line and line.startswith("evaluate: "), line


FLAGS = {
    "batches of none": (["--batch_size", "0"], "--batch_size"),
    "batches of fewer": (["--batch_size", "-3"], "--batch_size"),
    "a device there is not": (["--device", "tpu"], "--device tpu"),
    "a device's number": (["--device", "cuda:999"], "--device cuda:999"),
    "a folder as the output": (["--output", "{t}/taken"], "--output"),
    "an output below a file": (["--output", "{t}/a.npz/report.json"], "--output"),
    "an output of another kind": (["--output", "{t}/report.md"], ".json"),
    "an output that is the samples": (["--output", "{t}/a.npz"], ".json"),
    "no writable output": (["--output", "/proc/report.json"], "--output"),
    "a format there is not": (["--format", "xml"], "xml"),
    "an unknown recipe": (["--recipe", "nothing"], "nothing"),
    "no weights of Inception": (["--recipe", "llamagen-b"], "--inception_weights"),
    "weights that are not there": (["--recipe", "llamagen-b", "--inception_weights", "{t}/none"], "no such file"),
    "weights that are a pipe": (["--recipe", "llamagen-b", "--inception_weights", "{t}/pipe"], "pipe"),
    "weights that are none": (["--recipe", "llamagen-b", "--inception_weights", "{t}/a.npz"], "not the FID network"),
    "samples and a report": (["--report", "{t}"], "--report RUN_DIR"),
    "no such user": (["--output", "~nosuchuser/x.json"], "no such user"),
}


@pytest.mark.parametrize("case", FLAGS)
def test_flags(tmp_path, case):
    flags, said = FLAGS[case]
    archive(tmp_path / "a.npz", PIXELS)
    (tmp_path / "taken").mkdir()
    pipe(tmp_path / "pipe")
    own = [] if "--recipe" in flags else ["--recipe", "digits"]
    flags = [flag.replace("{t}", str(tmp_path)) for flag in flags]
    line = refusal(main, [tmp_path / "a.npz", "--no_cache", *own, *flags], tmp_path)
    assert said in line and line.startswith(("evaluate: ", "config error: ")), line


ODD = ["", "{", "[1]", "null", "{}", '{"step": "x"}', '{"step": 1e999}', "\0" * 40, "[" * 100_000, '{"a": ' * 5000,
       "9" * 5000, '{"metrics": {"fid": {}}}', '{"metrics": 3}', '{"final": {"loss": [[]]}, "versions": 7}',
       '{"rows": [{"fid": "x", "s": true}, 3, null]}', '{"step": 1, "loss": "NaN"}', "a: &a [*a]", "? [a]\n: b",
       "name: {x: 1}\nmodel: 3\nsampling: {guidance_scale: .nan}", "\ud800", "logging: {samples_per_grid: -4}",
       "paper: {cca: {fid: x}, 3: {fid: 1e400}}", "seed: 2024-99-99",
       "a: !!python/object/apply:os.system [ls]"]  # fmt: skip
FILES = ["config.yaml", "metrics.jsonl", "summary.json", "evaluation/scores.json", "samples/step_000001.png",
         "samples.png"]  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_report_is_written_whatever_a_file_of_the_run_holds(tmp_path, name):
    for number, content in enumerate(ODD):
        folder = tmp_path / str(number)
        for part in ("samples", "evaluation"):
            (folder / part).mkdir(parents=True)
        (folder / "metrics.jsonl").write_text('{"step": 1, "time": 0, "loss": 0.5}\n')
        (folder / name).write_bytes(content.encode("utf-8", "surrogatepass"))
        code, _, err = called(main, ["--report", folder])
        assert (code, err) == (0, ""), (content[:60], err)
        assert (folder / "report.html").stat().st_size > 1000


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["a pipe", "a folder", "a link to itself"])
def test_a_report_is_written_whatever_a_file_of_the_run_is(tmp_path, name, kind):
    for part in ("samples", "evaluation"):
        (tmp_path / part).mkdir()
    mark = "summary.json" if name == "metrics.jsonl" else "metrics.jsonl"
    (tmp_path / mark).write_text("{}")
    path = tmp_path / name
    {"a pipe": os.mkfifo, "a folder": Path.mkdir, "a link to itself": lambda p: p.symlink_to(p)}[kind](path)
    code, _, err = called(main, ["--report", tmp_path])
    assert (code, err) == (0, ""), err


def test_a_folder_without_a_run_has_no_report(tmp_path):
    assert "no run in this folder" in refusal(main, ["--report", tmp_path], tmp_path)
    assert "no such folder" in refusal(main, ["--report", tmp_path / "none"], tmp_path)


def test_settings_beside_the_samples_may_hold_anything(tmp_path):
    archive(tmp_path / "a.npz", PIXELS)
    for content in ODD:
        (tmp_path / "a.json").write_bytes(content.encode("utf-8", "surrogatepass"))
        code, out, err = called(main, [tmp_path / "a.npz", "--recipe", "digits", "--format", "json"])
        assert code == 0 and "Error" not in err, (content[:60], err)
        assert json.loads(out)["samples"]["images"] == 12
