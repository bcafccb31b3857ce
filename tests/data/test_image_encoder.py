"""Batches and pixel values that the tokenizer gets, and the lock that each rank holds."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from cca_ds import folder_lock
from cca_ds.data.crops import CropSettings
from cca_ds.data.image_encoder import ImageEncoder
from cca_ds.data.image_sources import open_images
from cca_ds.data.manifest import CodesError, Manifest
from cca_ds.data.table_builder import ShardContent, TableBuilder, TablePlan, build_table


class Counting(torch.nn.Module):
    """A tokenizer that records the size of each batch; an image's code is its mean grey level."""

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


def test_pixels_are_scaled_as_in_the_originals(tmp_path, device):
    """ToTensor and Normalize(0.5, 0.5), and VAR's x + x - 1, bit for bit."""

    class Recording(Counting):
        def encode(self, images_BCHW):
            self.images_BCHW = images_BCHW.cpu()
            return super().encode(images_BCHW)

    tokenizer = Recording()
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    (tmp_path / "i" / "c").mkdir(parents=True)
    Image.fromarray(np.stack([pixels, pixels.T, 255 - pixels], axis=-1)).save(tmp_path / "i" / "c" / "0.png")
    encoder = ImageEncoder(open_images(tmp_path / "i"), CropSettings("none", 16), tokenizer, device)
    encoder(range(1), lambda: None)
    unit = torch.from_numpy(pixels).float().div(255)
    torch.testing.assert_close(tokenizer.images_BCHW[0, 0], (unit - 0.5) / 0.5, rtol=0, atol=0)
    torch.testing.assert_close(tokenizer.images_BCHW[0, 1], unit.T.add(unit.T).add(-1), rtol=0, atol=0)


def test_a_second_process_of_the_same_rank_is_refused(tmp_path):
    builder = TableBuilder(tmp_path / "t", TablePlan(Manifest(0, 1, 1, 1, 2, "llamagen", "x", ""), 4, 2, {}))
    builder.begin()
    with builder.as_rank(0):
        with (
            pytest.raises(CodesError, match=r"as rank 0: process .* is writing there; wait for it"),
            builder.as_rank(0),
        ):
            pass
        with builder.as_rank(1):
            pass
    with builder.as_rank(0):
        pass


def test_a_refused_start_leaves_the_first_ones_folder(tmp_path):
    """Even before its first shard is finished; and a table whose builder was killed is built on."""
    plan = TablePlan(Manifest(0, 2, 1, 1, 4, "llamagen", "x", ""), 4, 2, {})

    def produce(rows, advance):
        return ShardContent(np.zeros((len(rows), 1, 1), np.int64), np.array([row % 2 for row in rows]), [])

    builder = TableBuilder(tmp_path / "t", plan)
    builder.begin()
    with builder.as_rank(0):
        with pytest.raises(CodesError, match="is writing there"):
            build_table(tmp_path / "t", plan, produce, 0.0, rank=0, world_size=1)
        assert (builder.work / "plan.json").is_file()
    gone = json.dumps({"host": "a40-7", "pid": 1, "machine": folder_lock._machine(), "process_start": 1})
    (builder.work / "rank0.lock").write_text(gone)
    assert build_table(tmp_path / "t", plan, produce, 0.0, rank=0, world_size=1).images == 4
    assert not list((tmp_path / "t").glob("*lock*"))
