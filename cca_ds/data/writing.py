"""Writing tables of codes: Arrow files as Hugging Face `datasets` lays them out, plus the manifest.

N images, C crops, L codes per crop. A folder appears whole or not at all.
`datasets` is imported when something is written only: it takes a second, and opening needs none of it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from cca_ds.data.manifest import (
    MANIFEST_NAME,
    CodesError,
    Manifest,
    Shard,
    histogram,
    package_version,
    read_manifest,
)
from cca_ds.files import file_hash, partial_name, sync_folder, write_atomic, write_streamed

SHARD_BYTES = 512 * 2**20  # datasets' own default size of a shard


def _datasets():
    """Hugging Face `datasets`, kept off the network."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    import datasets
    import datasets.arrow_writer

    return datasets


def _features(crops: int, sequence_length: int):
    datasets = _datasets()
    codes = datasets.Sequence(datasets.Value("uint16"), length=sequence_length)
    if crops > 1:
        codes = datasets.Sequence(codes, length=crops)
    return datasets.Features({"codes": codes, "label": datasets.Value("int32")})


def check_rows(
    codes_NCL: np.ndarray, labels_N: np.ndarray, vocab_size: int, classes: int, source: str
) -> None:
    """Raise CodesError unless all codes are inside the vocabulary and all labels inside the classes."""
    if vocab_size > 2**16:
        raise CodesError(f"{source}: a vocabulary of {vocab_size} codes does not fit uint16 (at most 65536)")
    if codes_NCL.ndim != 3 or labels_N.ndim != 1 or len(codes_NCL) != len(labels_N):
        raise CodesError(
            f"{source}: codes of shape {codes_NCL.shape} labels {labels_N.shape}, not [N, crops, L] and [N]"
        )
    if not len(codes_NCL) or not codes_NCL[0].size:
        raise CodesError(f"{source}: the data set is empty")
    for name, values, limit in (("code", codes_NCL, vocab_size), ("label", labels_N, classes)):
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= limit:
            wrong = low if low < 0 else high
            row = int(np.argwhere(values == wrong)[0][0])
            raise CodesError(
                f"{source}: image {row} has the {name} {wrong}, outside 0..{limit - 1}: "
                "give the tokenizer and the classes that belong to these data"
            )


def write_shard(path: str | Path, codes_NCL: np.ndarray, labels_N: np.ndarray) -> Shard:
    """Write one Arrow file whole or not at all, as one record batch, so that a single view covers it.

    Args:
        codes_NCL: [N, C, L], any integer dtype inside uint16; labels_N: [N], inside int32.

    Raises:
        OSError: the disk is full or the folder not writable; no partial file stays.
    """
    import pyarrow

    path = Path(path)
    images, crops, length = codes_NCL.shape
    features = _features(crops, length)
    column = pyarrow.array(np.ascontiguousarray(codes_NCL, dtype=np.uint16).reshape(-1))
    for size in (length,) if crops == 1 else (length, crops):
        column = pyarrow.FixedSizeListArray.from_arrays(column, size)
    labels = pyarrow.array(labels_N.astype(np.int32))
    table = pyarrow.Table.from_arrays([column, labels], schema=features.arrow_schema)

    def write(stream: BinaryIO) -> None:
        writer = _datasets().arrow_writer.ArrowWriter(
            stream=stream, features=features, writer_batch_size=images
        )
        writer.write_table(table, writer_batch_size=images)
        writer.finalize(close_stream=False)

    write_streamed(path, write)
    return Shard(path.name, images, path.stat().st_size, file_hash(path))


def write_descriptions(folder: str | Path, manifest: Manifest) -> None:
    """Write what `datasets.load_from_disk` reads beside the Arrow files, and the manifest last."""
    folder = Path(folder)
    features = _features(manifest.crops, manifest.sequence_length)
    _datasets().DatasetInfo(features=features).write_to_directory(str(folder))
    fingerprint = hashlib.sha256("".join(shard.sha256 for shard in manifest.shards).encode()).hexdigest()[:16]
    state = {
        "_data_files": [{"filename": shard.file} for shard in manifest.shards],
        "_fingerprint": fingerprint,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    write_atomic(folder / "state.json", json.dumps(state, indent=1))
    write_atomic(folder / MANIFEST_NAME, manifest.to_json())
    sync_folder(folder)


@contextmanager
def one_line_errors(target: str | Path) -> Iterator[None]:
    """Turn a full disk or an unwritable folder into one CodesError naming the folder and the remedy."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CodesError(
                f"no space left while writing {target}: free some and run again, or choose another disk"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise CodesError(
                f"{target} cannot be written ({error.strerror}): choose another output folder"
            ) from error
        raise


def publish_folder(partial: Path, folder: Path) -> None:
    """Rename a finished folder to its name. Raises FileExistsError when another process was first."""
    sync_folder(partial)
    try:
        os.rename(partial, folder)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise FileExistsError(errno.EEXIST, "is there already", str(folder)) from error
        raise
    sync_folder(folder.parent)


def write_codes(
    folder: str | Path,
    codes_NCL: np.ndarray,
    labels_N: np.ndarray,
    *,
    vocab_size: int,
    classes: int,
    family: str,
    tokenizer: str,
    tokenizer_hash: str,
    crop_settings: dict | None = None,
    class_names: tuple[str, ...] = (),
    images_per_shard: int | None = None,
) -> Manifest:
    """Write a table of codes into a new folder, whole or not at all.

    Args:
        codes_NCL: [N, C, L] integers inside 0..vocab_size-1. labels_N: [N] inside 0..classes-1.
        images_per_shard: images in one Arrow file; None: as many as make half a GiB.

    Raises:
        CodesError: wrong shapes or ranges, no images, the folder is there already, the disk is full.
    """
    folder = Path(folder)
    codes_NCL, labels_N = np.asarray(codes_NCL), np.asarray(labels_N)
    check_rows(codes_NCL, labels_N, vocab_size, classes, str(folder))
    images, crops, length = codes_NCL.shape
    described = {"class_names": class_names, "package_version": package_version()}
    described |= {"label_histogram": histogram(labels_N, classes), "crop_settings": crop_settings or {}}
    manifest = Manifest(
        images, classes, crops, length, vocab_size, family, tokenizer, tokenizer_hash, **described
    )  # fmt: skip
    _write_table(folder, manifest, codes_NCL, labels_N, images_per_shard)
    return read_manifest(folder)


def _write_table(
    folder: Path,
    manifest: Manifest,
    codes_NCL: np.ndarray,
    labels_N: np.ndarray,
    images_per_shard: int | None,
) -> None:
    """Write shards and descriptions into a hidden sibling, then rename it."""
    if images_per_shard is None:
        images_per_shard = max(1, SHARD_BYTES // (2 * manifest.crops * manifest.sequence_length))
    starts = range(0, manifest.images, images_per_shard)
    partial = partial_name(folder)
    with one_line_errors(folder):
        if folder.exists():
            raise CodesError(f"{folder} is there already: choose another output folder or remove it")
        try:
            partial.mkdir(parents=True)
            shards = []
            for index, start in enumerate(starts):
                rows = slice(start, start + images_per_shard)
                name = f"data-{index:05d}-of-{len(starts):05d}.arrow"
                shards.append(write_shard(partial / name, codes_NCL[rows], labels_N[rows]))
            write_descriptions(partial, replace(manifest, shards=tuple(shards)))
            publish_folder(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def write_digits(folder: str | Path) -> None:
    """Build the table of scikit-learn's 1,797 digits; when another process is first, its table stays."""
    from cca_ds.vq import create_tokenizer
    from cca_ds.vq.digits import load_digit_images

    tokenizer = create_tokenizer("digits")
    images_BCHW, labels_B = load_digit_images()
    try:
        write_codes(
            folder,
            tokenizer.encode(images_BCHW)[:, None].numpy(),
            labels_B.numpy(),
            vocab_size=tokenizer.vocab_size,
            classes=10,
            family="llamagen",
            tokenizer="digits",
            tokenizer_hash=tokenizer.hash(),
            class_names=tuple(str(digit) for digit in range(10)),
        )
    except CodesError:
        if not Path(folder).exists():
            raise
