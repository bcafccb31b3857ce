"""Importing the original program's folders of .npy files; damaged ones give one line."""

import json
import re
import shutil

import numpy as np
import pytest

from cca_ds import encode
from cca_ds.data.codes import CodeTable

LENGTH, VOCABULARY = 6, 64
SETTINGS = ["--recipe", "llamagen-b", "--set", f"tokenizer.options.codebook_size={VOCABULARY}",
            "tokenizer.options.channels=32", "tokenizer.options.z_channels=32"]  # fmt: skip


def write_folder(folder, codes_NCL, labels_N, crops_axis=True):
    """What LlamaGen's extract_codes_c2i.py saves for each image."""
    for part in ("codes", "labels"):
        (folder / f"imagenet384_{part}").mkdir(parents=True)
    for index, (codes_CL, label) in enumerate(zip(codes_NCL, labels_N, strict=True)):
        codes = codes_CL[None] if crops_axis else codes_CL
        np.save(folder / "imagenet384_codes" / f"{index}.npy", codes.astype(np.int64))
        np.save(folder / "imagenet384_labels" / f"{index}.npy", np.array([label], dtype=np.int64))
    return folder


def rows(images, crops, seed=0):
    draw = np.random.default_rng(seed)
    return draw.integers(0, VOCABULARY, (images, crops, LENGTH)), np.sort(draw.integers(0, 5, images))


def run(*arguments):
    return encode.main([*SETTINGS, *map(str, arguments)])


def assert_holds(folder, codes_NCL, labels_N):
    table = CodeTable.open(folder)
    images, crops, _ = codes_NCL.shape
    assert (len(table), table.manifest.crops, table.manifest.sequence_length) == (images, crops, LENGTH)
    for crop in range(crops):
        codes_BL, labels_B = table.take(np.arange(images), crop)
        np.testing.assert_array_equal(codes_BL, codes_NCL[:, crop])
        np.testing.assert_array_equal(labels_B, labels_N)
    table.check()
    return table


def test_ten_crops(tmp_path):
    codes_NCL, labels_N = rows(23, 10)
    source = write_folder(tmp_path / "s", codes_NCL, labels_N)
    assert run("--import_npy", source, "--output", tmp_path / "t", "--images_per_shard", 10) == 0
    manifest = assert_holds(tmp_path / "t", codes_NCL, labels_N).manifest
    assert manifest.label_histogram == tuple(np.bincount(labels_N)) and len(manifest.shards) == 3
    assert manifest.crop_settings == {"kind": "imported", "folders": ["s"]}
    assert manifest.vocab_size == VOCABULARY and manifest.tokenizer_hash == ""


def test_one_crop_without_its_axis(tmp_path):
    codes_NCL, labels_N = rows(7, 1)
    source = write_folder(tmp_path / "s", codes_NCL, labels_N, crops_axis=False)
    assert run("--import_npy", source, "--output", tmp_path / "t") == 0
    assert_holds(tmp_path / "t", codes_NCL, labels_N)


def test_both_crop_ranges_are_joined(tmp_path):
    """The original finds the second folder by replacing `ten_crop/` in the path; here both are named."""
    codes_NCL, labels_N = rows(9, 20)
    for name, part in {"ten_crop": codes_NCL[:, :10], "ten_crop_105": codes_NCL[:, 10:]}.items():
        write_folder(tmp_path / name, part, labels_N)
    folders = [tmp_path / "ten_crop", tmp_path / "ten_crop_105"]
    assert run("--import_npy", *folders, "--output", tmp_path / "t") == 0
    assert_holds(tmp_path / "t", codes_NCL, labels_N)


@pytest.mark.parametrize("padding", [1, 5])
def test_padding_of_the_originals_sampler_is_left_out(tmp_path, capsys, padding):
    codes_NCL, labels_N = rows(19, 3)
    padded = np.concatenate([codes_NCL, codes_NCL[:padding]]), np.concatenate([labels_N, labels_N[:padding]])
    source = write_folder(tmp_path / "s", *padded)
    assert run("--import_npy", source, "--output", tmp_path / "t") == 0
    assert f"the last {padding} files repeat the first" in capsys.readouterr().err
    assert_holds(tmp_path / "t", codes_NCL, labels_N)


def test_hash_of_the_tokenizer_is_kept_when_its_weights_are_given(tmp_path, golden):
    source = write_folder(tmp_path / "s", *rows(4, 2))
    more = [f"tokenizer.weights={golden / 'vq16_ch32.pt'}", "tokenizer.options.channel_multipliers=[1,1,1,1,2]"]
    assert encode.main([*SETTINGS, *more, "--import_npy", str(source), "--output", str(tmp_path / "t")]) == 0
    assert len(CodeTable.open(tmp_path / "t").manifest.tokenizer_hash) == 64


def test_import_continues_where_it_stopped(tmp_path, capsys):
    codes_NCL, labels_N = rows(23, 4)
    source = write_folder(tmp_path / "s", codes_NCL, labels_N)
    damaged = source / "imagenet384_codes" / "17.npy"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-8])
    arguments = ["--import_npy", source, "--output", tmp_path / "t", "--images_per_shard", 5]
    assert run(*arguments) == 2
    assert re.search(r"17.npy is not a readable .npy file", capsys.readouterr().err)
    records = tmp_path / "t.partial" / "records"
    assert len(list(records.iterdir())) == 3 and not (tmp_path / "t").exists()
    damaged.write_bytes(whole)
    assert run(*arguments) == 0
    assert_holds(tmp_path / "t", codes_NCL, labels_N)


class Malicious:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


def damage_pickle(folder):
    np.save(folder / "imagenet384_codes" / "3.npy", np.array([Malicious()], dtype=object))


def damage_missing(folder):
    (folder / "imagenet384_codes" / "3.npy").unlink()
    (folder / "imagenet384_labels" / "3.npy").unlink()


def damage_count(folder):
    (folder / "imagenet384_labels" / "8.npy").unlink()


def damage_shape(folder):
    np.save(folder / "imagenet384_codes" / "3.npy", np.zeros((1, 2, LENGTH + 1), dtype=np.int64))


def damage_axes(folder):
    np.save(folder / "imagenet384_codes" / "0.npy", np.zeros(LENGTH, dtype=np.int64))


def damage_floats(folder):
    np.save(folder / "imagenet384_codes" / "3.npy", np.zeros((1, 2, LENGTH)))


def damage_vocabulary(folder):
    np.save(folder / "imagenet384_codes" / "3.npy", np.full((1, 2, LENGTH), VOCABULARY))


def damage_label(folder):
    np.save(folder / "imagenet384_labels" / "3.npy", np.array([1, 2]))


def damage_negative_label(folder):
    np.save(folder / "imagenet384_labels" / "3.npy", np.array([-1]))


def damage_folders(folder):
    shutil.rmtree(folder / "imagenet384_labels")


def damage_no_files(folder):
    for part in ("codes", "labels"):
        for path in (folder / f"imagenet384_{part}").iterdir():
            path.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_pickle, "3.npy is not a readable .npy file"),
        (damage_missing, "3.npy is missing of 0 to 8"),
        (damage_count, r"different numbers of files \[8, 9\]"),
        (damage_shape, r"3.npy is \[1, 2, 7\], the first file is \[1, 2, 6\]"),
        (damage_axes, r"0.npy is \[6\], not \[1, crops, L\]"),
        (damage_floats, "3.npy holds float64, not integers"),
        (damage_vocabulary, r"has the code 64, outside 0\.\.63"),
        (damage_label, r"3.npy is \[2\], not \[1\]"),
        (damage_negative_label, "has the label -1"),
        (damage_folders, "needs one \\*_codes and one \\*_labels folder"),
        (damage_no_files, "holds no .npy files"),
    ],
)
def test_damaged_folders_give_one_line_and_leave_no_file(tmp_path, capsys, damage, message):
    source = write_folder(tmp_path / "s", *rows(9, 2))
    damage(source)
    assert run("--import_npy", source, "--output", tmp_path / "t") == 2
    lines = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "encode:" in line]
    assert len(lines) == 1 and re.search(message, lines[0]), lines
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_labels_that_differ_between_the_folders(tmp_path, capsys):
    codes_NCL, labels_N = rows(6, 2)
    other = labels_N.copy()
    other[4] += 1
    folders = [write_folder(tmp_path / "a", codes_NCL, labels_N), write_folder(tmp_path / "b", codes_NCL, other)]
    assert run("--import_npy", *folders, "--output", tmp_path / "t") == 2
    assert "image 4 has the labels" in capsys.readouterr().err


def test_imported_table_is_verified_against_the_grid_only(tmp_path, golden, capsys):
    source = write_folder(tmp_path / "s", np.random.default_rng(0).integers(0, VOCABULARY, (5, 2, 16)), [0, 0, 1, 1, 1])
    more = [f"tokenizer.weights={golden / 'vq16_ch32.pt'}", "tokenizer.options.channel_multipliers=[1,1,1,1,2]"]
    assert run("--import_npy", source, "--output", tmp_path / "t") == 0
    assert json.loads((tmp_path / "t" / "manifest.json").read_text())["tokenizer_hash"] == ""
    assert encode.main([*SETTINGS, *more, "--output", str(tmp_path / "t"), "--verify"]) == 0
    assert "imported without their tokenizer: look at the grid" in capsys.readouterr().out
    assert (tmp_path / "t" / "verify.png").is_file()
