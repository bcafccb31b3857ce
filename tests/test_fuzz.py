"""Every reader of files from outside, on a thousand damaged files each: an error of one line, and in time.

A mutation flips bits, cuts, repeats, inserts or overwrites a part; the generator's seed is the reader's name and the
mutation's number, so that a failure is found again.
"""

import io
import shutil
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from cca_ds.checkpoints import store
from cca_ds.checkpoints.restricted_load import restricted_load
from cca_ds.cluster.failures import explain_error
from cca_ds.config.deepspeed_file import conflicts, read_ds_config
from cca_ds.config.recipes import load_recipe
from cca_ds.data.codes import CodeTable
from cca_ds.data.crops import UnreadableImage, decode_image
from cca_ds.data.image_sources import open_images as open_source
from cca_ds.data.npy_folders import NpyFolders
from cca_ds.metrics.image_sets import open_images, read_statistics
from cca_ds.models.weight_files import read_metadata, read_weights
from cca_ds.reference.cache import ReferenceCache
from cca_ds.reporting.page import render
from cca_ds.reporting.recorded_run import read_run
from tests.commands.test_bad_flags import images
from tests.reference.test_cache import KEY, shard
from tests.support.refusals import OWN_ERRORS, time_limit
from tests.training.test_bad_input import table

pytestmark = pytest.mark.slow
MUTATIONS = 1000
SECONDS = 20  # of one read; most take a millisecond
WORDS = [b"\x00", b"\xff" * 8, b"9" * 400, b"NaN", b"1e999", b"-1", b"[" * 2000, b"{", b'"', b"../", b"null", b"true",
         b"\n", b"&a *a", b"!!python/object", b"\xf0\x9f\x98\x80"]  # fmt: skip


def mutated(data: bytes, draw: np.random.Generator) -> bytes:
    """The data with one to four changes."""
    changed = bytearray(data)
    for _ in range(int(draw.integers(1, 5))):
        # headers and directories are small and at the ends: half of the changes go there
        size = max(1, len(changed))
        near = int(min(size - 1, draw.exponential(64)))
        at = [int(draw.integers(size)), near, size - 1 - near][int(draw.choice(3, p=[0.5, 0.3, 0.2]))]
        length = int(min(draw.exponential(16) + 1, size))
        kind = draw.integers(7)
        if kind == 0 and changed:
            changed[at] ^= 1 << int(draw.integers(8))
        elif kind == 1:
            del changed[at:]
        elif kind == 2:
            del changed[at : at + length]
        elif kind == 3:
            changed[at:at] = changed[at : at + length]
        elif kind == 4:
            changed[at : at + length] = draw.bytes(length)
        elif kind == 5:
            changed[at:at] = WORDS[int(draw.integers(len(WORDS)))]
        else:
            word = WORDS[int(draw.integers(len(WORDS)))]
            changed[at : at + len(word)] = word
    return bytes(changed)


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def png() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(stream, "PNG")
    return stream.getvalue()


def jpeg() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(stream, "JPEG")
    return stream.getvalue()


def make_table(t: Path) -> list[Path]:
    folder = table(t / "table")
    return [folder / "manifest.json", next(folder.glob("*.arrow"))]


def read_table(t: Path) -> None:
    found = CodeTable.open(t / "table")
    found.check()
    found.take(np.arange(len(found)))


def make_cache(t: Path) -> list[Path]:
    cache = ReferenceCache(t / "cache", KEY)
    cache.write(0, shard())
    return [cache.path(0), t / "cache/key.json"]


def make_checkpoint(t: Path) -> list[Path]:
    from tests.checkpoints.test_store import save

    return [save(t, 1) / store.COMPLETE]


def make_run(t: Path) -> list[Path]:
    (t / "samples").mkdir()
    (t / "config.yaml").write_text("name: x\nmodel: {preset: digits}\npaper: {cca: {fid: 1.5}}\n")
    (t / "metrics.jsonl").write_text('{"step": 1, "time": 0.5, "loss": 0.5}\n{"step": 2, "time": 1.5, "loss": 0.25}\n')
    (t / "summary.json").write_text('{"steps": 2, "final": {"loss": 0.25}, "versions": {"torch": "2"}}')
    (t / "scores.json").write_text('{"metrics": {"fid": 1.25, "inception_score": 3.5}, "notes": ["few"]}')
    write(t / "samples/step_000001.png", png())
    return [
        t / "config.yaml",
        t / "metrics.jsonl",
        t / "summary.json",
        t / "scores.json",
        t / "samples/step_000001.png",
    ]


def make_npz(t: Path) -> list[Path]:
    np.savez(t / "a.npz", np.zeros((5, 8, 8, 3), np.uint8), np.arange(5))
    np.savez_compressed(t / "b.npz", np.zeros((5, 8, 8, 3), np.uint8), np.arange(5))
    return [t / "a.npz", t / "b.npz"]


def read_npz(t: Path) -> None:
    for name in ("a.npz", "b.npz"):
        found = open_images(t / name)
        list(found.batches(0, found.count, 2))


def make_statistics(t: Path) -> list[Path]:
    np.savez(t / "s.npz", mu=np.zeros(8), sigma=np.eye(8))
    return [t / "s.npz"]


def make_tar(t: Path) -> list[Path]:
    images(t / "images")
    for kind in ("", "gz", "xz"):
        with tarfile.open(t / f"a.tar{kind}", f"w:{kind}") as file:
            file.add(t / "images", "train")
    shutil.rmtree(t / "images")
    return [t / "a.tar", t / "a.targz", t / "a.tarxz"]


def read_tar(t: Path) -> None:
    for name in ("a.tar", "a.targz", "a.tarxz"):
        found = open_source(t / name)
        for index in range(len(found)):
            decode_image(found.read(index), "L", 90)


def make_npy(t: Path) -> list[Path]:
    for part, shape in (("x_codes", (1, 4, 16)), ("x_labels", (1,))):
        (t / part).mkdir()
        np.save(t / part / "0.npy", np.ones(shape, np.int64))
    return [t / "x_codes/0.npy", t / "x_labels/0.npy"]


def make_deepspeed_state(t: Path) -> list[Path]:
    state = {"module": {"weight": torch.ones(4)}, "step": 3, "names": ["a", "b"], "nested": {"x": (1, 2.5, None)}}
    torch.save(state, t / "state.pt")
    return [t / "state.pt"]


def read_deepspeed_state(t: Path) -> None:
    with restricted_load(t, [t / "state.pt"]):
        pass


def make_weights(t: Path) -> list[Path]:
    state = {"norm.weight": torch.ones(8), "head.weight": torch.zeros(4, 8)}
    save_file(state, t / "w.safetensors", {"family": "llamagen"})
    torch.save({"model": state}, t / "w.pt")
    torch.save({"model": state}, t / "old.pt", _use_new_zipfile_serialization=False)
    return [t / "w.safetensors", t / "w.pt", t / "old.pt"]


def read_all_weights(t: Path) -> None:
    for name in ("w.safetensors", "w.pt", "old.pt"):
        read_metadata(t / name)
        for tensor in read_weights(t / name).values():
            tensor.float().sum()


RECIPE = b"extends: digits\nname: mine\nloss: {beta: 0.02, lambda: 30}\nbatch:\n  global_size: 32\n  epochs: 1\n"
DS = b'{"zero_optimization": {"stage": 3, "reduce_bucket_size": 5e8}, "bf16": {"enabled": "auto"}}'
READERS: dict[str, tuple[Callable[[Path], list[Path]], Callable[[Path], object]]] = {
    "weights": (make_weights, read_all_weights),
    "tables": (make_table, read_table),
    "caches": (make_cache, lambda t: ReferenceCache(t / "cache", KEY, make=False).read(0)),
    "DeepSpeed's state": (make_deepspeed_state, read_deepspeed_state),
    "manifests of checkpoints": (make_checkpoint, lambda t: store.read_manifest(next(t.glob("step_*")))),
    "run folders": (make_run, lambda t: render(read_run(t))),
    "npz of images": (make_npz, read_npz),
    "npz of statistics": (make_statistics, lambda t: read_statistics(t / "s.npz")),
    "npy": (make_npy, lambda t: NpyFolders([t]).record(0)),
    "png": (lambda t: [write(t / "a.png", png())], lambda t: decode_image((t / "a.png").read_bytes(), "RGB", 90)),
    "jpeg": (lambda t: [write(t / "a.jpg", jpeg())], lambda t: decode_image((t / "a.jpg").read_bytes(), "RGB", 90)),
    "tar": (make_tar, read_tar),
    "recipes": (lambda t: [write(t / "r.yaml", RECIPE)], lambda t: load_recipe(str(t / "r.yaml"))),
    "DeepSpeed's files": (
        lambda t: [write(t / "ds.json", DS)],
        lambda t: conflicts(read_ds_config(t / "ds.json"), load_recipe("digits"))),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reader", READERS)
def test_damaged_files_are_one_line(tmp_path, reader):
    make, read = READERS[reader]
    paths = make(tmp_path)
    read(tmp_path)
    whole = {path: path.read_bytes() for path in paths}
    refused = 0
    for number in range(MUTATIONS):
        draw = np.random.default_rng((zlib.crc32(reader.encode()), number))
        path = paths[number % len(paths)]
        path.write_bytes(mutated(whole[path], draw))
        try:
            with time_limit(SECONDS):
                read(tmp_path)
        except (ValueError, OSError) as error:  # UnreadableImage is one
            refused += 1
            line = explain_error(error)
            assert not isinstance(error, TimeoutError) and "\n" not in line, (number, line)
            assert isinstance(error, UnreadableImage) or not OWN_ERRORS.search(line), (number, line)
        except Exception as error:
            raise AssertionError(f"mutation {number} of {path.name}: {type(error).__name__}: {error}") from error
        path.write_bytes(whole[path])
    assert refused > MUTATIONS // 20 or reader == "run folders"
