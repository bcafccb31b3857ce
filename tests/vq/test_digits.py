"""The digits' tokenizer: lossless on every image, and one clear line for what it cannot take."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from cca_ds.data.codes import CodeTable
from cca_ds.vq import TOKENIZERS, create_tokenizer
from cca_ds.vq.digits import load_digit_images


@pytest.fixture(scope="module")
def tokenizer():
    return create_tokenizer("digits")


def test_every_digit_comes_back_bit_equal(tokenizer):
    images, labels = load_digit_images()
    assert images.shape == (1797, 1, 8, 8) and images.min() == -1 and images.max() == 1
    codes = tokenizer.encode(images)
    assert codes.dtype == torch.int64 and codes.shape == (1797, 64)
    assert torch.equal(tokenizer.decode(codes), images)
    source = load_digits()
    assert np.array_equal(codes.numpy(), source.data.astype(int))  # code = grey level, row by row
    assert np.array_equal(labels.numpy(), source.target)


def test_every_code_is_a_grey_level_of_its_own(tokenizer):
    codes = torch.arange(17).repeat(4)[:64][None]
    images = tokenizer.decode(codes.to(torch.uint8))
    assert torch.equal(tokenizer.encode(images), codes)
    assert images.unique().tolist() == [level / 8 - 1 for level in range(17)]
    assert torch.equal(tokenizer.encode(images * 1.5), codes.new_tensor(
        [min(max(round(1.5 * level - 4), 0), 16) for level in range(17)]
    ).repeat(4)[:64][None])  # fmt: skip


def test_its_built_in_table_is_written_once(tmp_path, tokenizer):
    folder = TOKENIZERS["digits"].builtin_codes(tmp_path)
    written = (folder / "manifest.json").stat().st_mtime_ns
    assert TOKENIZERS["digits"].builtin_codes(tmp_path) == folder
    assert (folder / "manifest.json").stat().st_mtime_ns == written
    assert folder.name == f"digits-{tokenizer.hash()[:12]}" and list(tmp_path.iterdir()) == [folder]
    table, (images, labels) = CodeTable.open(folder), load_digit_images()
    codes, table_labels = table.take(np.arange(1797))
    assert np.array_equal(codes, tokenizer.encode(images).numpy())
    assert np.array_equal(table_labels, labels.numpy())
    assert table.manifest.tokenizer_hash == tokenizer.hash()


@pytest.mark.dist
def test_two_processes_may_write_its_table_at_once(tmp_path):
    program = "import sys; from cca_ds.vq.digits import builtin_codes; builtin_codes(sys.argv[1])"
    both = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path)]) for _ in range(2)]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    (folder,) = tmp_path.iterdir()
    CodeTable.open(folder).check()


def test_its_numbers(tokenizer):
    assert (tokenizer.vocab_size, tokenizer.sequence_length(8), tokenizer.sequence_length()) == (17, 64, 64)
    assert len(tokenizer.hash()) == 64 and tokenizer.hash() == create_tokenizer("digits").hash()
    assert not list(tokenizer.parameters()) and not tokenizer.training


def test_bad_input_gets_one_line(tokenizer):
    for bad in (torch.zeros(2, 3, 8, 8), torch.zeros(2, 1, 8, 9), torch.zeros(1, 8, 8)):
        with pytest.raises(ValueError, match=r"takes images of shape \[B, 1, 8, 8\]"):
            tokenizer.encode(bad)
    with pytest.raises(ValueError, match=r"takes codes of shape \[B, 64\], not \[2, 63\]"):
        tokenizer.decode(torch.zeros(2, 63, dtype=torch.long))
    for code in (17, -1):
        with pytest.raises(ValueError, match=rf"code {code} is outside the tokenizer's codebook 0\.\.16"):
            tokenizer.decode(torch.full((1, 64), code))
    with pytest.raises(ValueError, match="8 x 8 images, not 16"):
        tokenizer.sequence_length(16)
    with pytest.raises(ValueError, match="neither weights nor shapes to set: leave out weights, channels"):
        create_tokenizer("digits", weights="x", channels=3)
