"""Tables of codes: rows read, by views and by `datasets`, are the rows written; damaged tables are refused."""

import errno
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

from cca_ds.data import table_files
from cca_ds.data.codes import CodeTable
from cca_ds.data.manifest import CodesError, class_names_of, expected_images, fewer_classes_note, write_class_names
from cca_ds.data.table_files import write_codes

FIELDS = {
    "vocab_size": 100,
    "classes": 5,
    "family": "llamagen",
    "tokenizer": "llamagen-vq16",
    "tokenizer_hash": "ab" * 32,
}


def rows(images=11, crops=3, length=7, seed=0):
    """Random codes [N, C, L] and labels [N]."""
    generator = np.random.default_rng(seed)
    codes_NCL = generator.integers(0, FIELDS["vocab_size"], (images, crops, length))
    return codes_NCL, generator.integers(0, FIELDS["classes"], images)


@pytest.mark.parametrize("crops", [1, 3])
@pytest.mark.parametrize("images_per_shard", [None, 4])
def test_rows_read_are_the_rows_written(tmp_path, crops, images_per_shard):
    codes_NCL, labels_N = rows(crops=crops)
    write_codes(tmp_path / "t", codes_NCL, labels_N, images_per_shard=images_per_shard, **FIELDS)
    table = CodeTable.open(tmp_path / "t")
    order = np.random.default_rng(1).permutation(len(table))
    crop = order % crops
    codes_BL, labels_B = table.take(order, crop)
    assert codes_BL.dtype == labels_B.dtype == np.int64
    np.testing.assert_array_equal(codes_BL, codes_NCL[order, crop])
    np.testing.assert_array_equal(labels_B, labels_N[order])
    table.check()
    assert table.manifest.label_histogram == tuple(np.bincount(labels_N, minlength=5))
    assert len(table.manifest.shards) == (1 if images_per_shard is None else 3)
    assert [path for path in os.listdir(tmp_path) if path != "t"] == []


@pytest.mark.parametrize("crops", [1, 3])
def test_datasets_reads_the_same_folder(tmp_path, crops):
    import datasets

    codes_NCL, labels_N = rows(crops=crops)
    write_codes(tmp_path / "t", codes_NCL, labels_N, images_per_shard=4, **FIELDS)
    loaded = datasets.load_from_disk(str(tmp_path / "t"))
    assert loaded.features["label"].dtype == "int32"
    assert loaded.features["codes"].length == (7 if crops == 1 else 3)
    np.testing.assert_array_equal(np.array(loaded["codes"]), codes_NCL[:, 0] if crops == 1 else codes_NCL)
    np.testing.assert_array_equal(loaded["label"], labels_N)


def test_state_has_the_keys_that_datasets_writes(tmp_path):
    import datasets

    write_codes(tmp_path / "t", *rows(), **FIELDS)
    datasets.load_from_disk(str(tmp_path / "t")).save_to_disk(str(tmp_path / "library"))
    own, library = (json.loads((tmp_path / name / "state.json").read_text()) for name in ("t", "library"))
    assert own.keys() == library.keys()
    assert own["_data_files"] == library["_data_files"]


def test_codes_are_a_view_of_the_file(tmp_path):
    codes_NCL, labels_N = rows()
    write_codes(tmp_path / "t", codes_NCL, labels_N, **FIELDS)
    table = CodeTable.open(tmp_path / "t")
    assert table.codes.dtype == np.uint16 and table.codes.shape == codes_NCL.shape
    assert not table.codes.flags.owndata and not table.codes.flags.writeable
    np.testing.assert_array_equal(table.codes, codes_NCL)


def test_table_of_several_files_has_no_single_view(tmp_path):
    write_codes(tmp_path / "t", *rows(), images_per_shard=4, **FIELDS)
    with pytest.raises(CodesError, match="3 files"):
        _ = CodeTable.open(tmp_path / "t").codes


def test_a_pickled_table_holds_its_folder_only(tmp_path):
    codes_NCL, labels_N = rows(images=2000)
    write_codes(tmp_path / "t", codes_NCL, labels_N, **FIELDS)
    sent = pickle.dumps(CodeTable.open(tmp_path / "t"))
    assert len(sent) < 500
    np.testing.assert_array_equal(pickle.loads(sent).take([7], [2])[0], codes_NCL[[7], 2])


def test_a_file_that_is_cut_short_while_open_is_one_line(tmp_path):
    """Mapped memory would end the process with a SIGBUS."""
    codes_NCL, labels_N = rows()
    write_codes(tmp_path / "t", codes_NCL, labels_N, images_per_shard=4, **FIELDS)
    table = CodeTable.open(tmp_path / "t")
    (shard,) = (tmp_path / "t").glob("data-00001*")
    os.truncate(shard, 100)
    np.testing.assert_array_equal(table.take([0])[0], codes_NCL[[0], 0])
    with pytest.raises(CodesError, match=f"{shard} was cut short while it was read: copy it again"):
        table.take([0, 5])
    np.testing.assert_array_equal(table.labels, labels_N)


def test_files_are_closed_with_their_table(tmp_path):
    write_codes(tmp_path / "t", *rows(), images_per_shard=4, **FIELDS)
    before = len(os.listdir("/proc/self/fd"))
    table = CodeTable.open(tmp_path / "t")
    assert len(os.listdir("/proc/self/fd")) == before + 3
    del table
    assert len(os.listdir("/proc/self/fd")) == before


def test_opening_imports_neither_datasets_nor_torch(tmp_path):
    write_codes(tmp_path / "t", *rows(), **FIELDS)
    code = "import sys; from cca_ds.data.codes import CodeTable; CodeTable.open(sys.argv[1]);"
    code += "print('datasets' in sys.modules, 'torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code, tmp_path / "t"], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda c, y: (c + 50, y), "image .* has the code .* outside 0..99"),
        (lambda c, y: (c - 60, y), "has the code -"),
        (lambda c, y: (c, y + 3), "has the label .* outside 0..4"),
        (lambda c, y: (c[:0], y[:0]), "empty"),
        (lambda c, y: (c[0], y), "not \\[N, crops, L\\]"),
        (lambda c, y: (c, y[:-1]), "not \\[N, crops, L\\]"),
    ],
)
def test_wrong_rows_are_refused_and_no_file_is_left(tmp_path, spoil, message):
    with pytest.raises(CodesError, match=message):
        write_codes(tmp_path / "t", *spoil(*rows()), **FIELDS)
    assert os.listdir(tmp_path) == []


def test_an_existing_table_is_not_overwritten(tmp_path):
    write_codes(tmp_path / "t", *rows(), **FIELDS)
    before = (tmp_path / "t" / "manifest.json").read_bytes()
    with pytest.raises(CodesError, match="exists already"):
        write_codes(tmp_path / "t", *rows(seed=1), **FIELDS)
    assert (tmp_path / "t" / "manifest.json").read_bytes() == before


def test_a_full_disk_is_one_line_and_no_file_is_left(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(table_files.os, "fsync", full)
    with pytest.raises(CodesError, match="no space left") as caught:
        write_codes(tmp_path / "t", *rows(), **FIELDS)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []


def damage_truncate(folder):
    path = folder / "data-00000-of-00001.arrow"
    path.write_bytes(path.read_bytes()[:-100])


def damage_missing(folder):
    (folder / "data-00000-of-00001.arrow").unlink()


def damage_garbage(folder):
    path = folder / "data-00000-of-00001.arrow"
    path.write_bytes(b"\x80" * path.stat().st_size)


def damage_manifest(folder):
    (folder / "manifest.json").write_text('{"images": 3')


def damage_no_manifest(folder):
    (folder / "manifest.json").unlink()


def edit_manifest(folder, **values):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def damage_count(folder):
    edit_manifest(folder, images=12)


def damage_length(folder):
    edit_manifest(folder, sequence_length=8)


def damage_version(folder):
    edit_manifest(folder, format_version=99)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_truncate, "bytes instead of"),
        (damage_missing, "is missing"),
        (damage_garbage, "not a shard"),
        (damage_manifest, "not a manifest"),
        (damage_no_manifest, "no table of codes"),
        (damage_count, "contradicts itself"),
        (damage_length, "not a shard"),
        (damage_version, "format 99"),
    ],
)
def test_damaged_tables_are_refused_in_one_line(tmp_path, damage, message):
    write_codes(tmp_path / "t", *rows(), **FIELDS)
    damage(tmp_path / "t")
    with pytest.raises(CodesError, match=message) as caught:
        CodeTable.open(tmp_path / "t")
    assert "\n" not in str(caught.value)


def test_code_outside_a_smaller_vocabulary_is_named_when_taken(tmp_path):
    codes_NCL, labels_N = np.zeros((6, 2, 4), int), np.zeros(6, int)
    codes_NCL[4, 1, 2] = 77
    write_codes(tmp_path / "t", codes_NCL, labels_N, **FIELDS)
    edit_manifest(tmp_path / "t", vocab_size=50)
    table = CodeTable.open(tmp_path / "t")
    table.take([3, 4], 0)
    with pytest.raises(CodesError, match=r"image 4 has the code 77, outside 0\.\.49"):
        table.take([3, 4], 1)


def test_label_outside_fewer_classes_is_refused_when_opened(tmp_path):
    write_codes(tmp_path / "t", np.zeros((3, 1, 4), int), np.array([0, 1, 4]), **FIELDS)
    edit_manifest(tmp_path / "t", classes=3, label_histogram=[1, 1, 1])
    with pytest.raises(CodesError, match="label 4 is outside"):
        CodeTable.open(tmp_path / "t")


def test_check_finds_one_changed_bit(tmp_path):
    write_codes(tmp_path / "t", *rows(), **FIELDS)
    path = tmp_path / "t" / "data-00000-of-00001.arrow"
    content = bytearray(path.read_bytes())
    content[-300] ^= 1
    path.write_bytes(content)
    with pytest.raises(CodesError, match="differs from its hash"):
        CodeTable.open(tmp_path / "t").check()


def test_a_table_that_another_process_publishes_first_is_kept(tmp_path, monkeypatch):
    """The other table appears between the check for the folder and the rename."""
    rename = os.rename

    def publish_first(source, target):
        monkeypatch.setattr(table_files.os, "rename", rename)
        write_codes(target, np.zeros((2, 1, 4), int), np.zeros(2, int), **FIELDS)
        return rename(source, target)

    monkeypatch.setattr(table_files.os, "rename", publish_first)
    with pytest.raises(CodesError, match="exists already"):
        write_codes(tmp_path / "t", *rows(), **FIELDS)
    assert len(CodeTable.open(tmp_path / "t")) == 2
    assert os.listdir(tmp_path) == ["t"]


def test_expected_images(tmp_path):
    """A table's own number, ImageNet's for a folder that does not exist yet, and a given one for a built-in table."""
    write_codes(tmp_path / "t", *rows(images=11), **FIELDS)
    assert expected_images(str(tmp_path / "t")) == (11, f"the manifest of {tmp_path / 't'}")
    assert expected_images(str(tmp_path / "later"))[0] == 1_281_167
    assert expected_images("some-name", builtin_images=42)[0] == 42


def test_a_table_of_fewer_classes_than_the_model_is_noted():
    assert fewer_classes_note(10, 10) == []
    (line,) = fewer_classes_note(2, 1000)
    assert "data.codes has 2 classes and the model 1000" in line and "model.overrides.num_classes=2" in line


def test_the_names_of_a_runs_classes_outlive_its_table(tmp_path):
    names = ("Café\u00a0noir", "a\u200cb", "plain")
    write_class_names(tmp_path, names)
    assert class_names_of("gone", tmp_path) == names
    (tmp_path / "older").mkdir()
    write_class_names(tmp_path / "older", ("two\nlines", "plain"))  # of a table from before such names were refused
    assert class_names_of("gone", tmp_path / "older") == () and class_names_of("gone") == ()
    for odd in (b"\xff\n", b"a\x1b[0m\n"):
        (tmp_path / "classes.txt").write_bytes(odd)
        with pytest.raises(CodesError):
            class_names_of("gone", tmp_path)
