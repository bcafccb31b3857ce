"""The files of a table of codes: Arrow files that `datasets.load_from_disk` opens, and the manifest.

    data-00000-of-00002.arrow, ...    shards, written by `datasets`, each as one record batch
    dataset_info.json                 the columns, written by `datasets`
    state.json                        the list of shards, for `datasets.load_from_disk`
    manifest.json                     everything else, written last

Letters: N images, C crops, L codes per crop. A folder appears whole or not at all. `datasets` takes a second to
import and is imported only to write.
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
from types import ModuleType
from typing import BinaryIO

import numpy as np

from cca_ds.data.manifest import MANIFEST_NAME, CodesError, Manifest, Shard, histogram, read_manifest
from cca_ds.files import FORBIDDEN, FULL, file_hash, partial_name, sync_folder, write_atomic, write_streamed

SHARD_BYTES = 512 * 2**20  # datasets' own default size of a shard


def offline_datasets() -> ModuleType:
    """Hugging Face `datasets`, imported so that it opens no connection."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    import datasets
    import datasets.arrow_writer

    return datasets


def _features(crops: int, sequence_length: int):
    """Columns of a shard: codes uint16 [L], or [crops, L] with several crops, and label int32."""
    datasets = offline_datasets()
    codes = datasets.Sequence(datasets.Value("uint16"), length=sequence_length)
    if crops > 1:
        codes = datasets.Sequence(codes, length=crops)
    return datasets.Features({"codes": codes, "label": datasets.Value("int32")})


def check_rows(codes_NCL: np.ndarray, labels_N: np.ndarray, vocab_size: int, classes: int, source: str) -> None:
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
    """Write one Arrow file as one record batch, so that a single NumPy view covers it; whole or not at all.

    Args:
        codes_NCL: [N, C, L] integers inside uint16. labels_N: [N] integers inside int32.

    Returns:
        Name, size and hash of the file, for the manifest.

    Raises:
        OSError: the disk is full or the folder not writable; no partial file is left.
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
        writer = offline_datasets().arrow_writer.ArrowWriter(stream=stream, features=features, writer_batch_size=images)
        writer.write_table(table, writer_batch_size=images)
        writer.finalize(close_stream=False)

    write_streamed(path, write)
    return Shard(path.name, images, path.stat().st_size, file_hash(path))


def write_descriptions(folder: str | Path, manifest: Manifest) -> None:
    """Write `dataset_info.json` and `state.json` beside the Arrow files, and the manifest last.

    `datasets` writes state.json only in `save_to_disk`, which would write all shards again in batches of its own.
    """
    folder = Path(folder)
    features = _features(manifest.crops, manifest.sequence_length)
    offline_datasets().DatasetInfo(features=features).write_to_directory(str(folder))
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
    """In this block, an OSError of a full disk or an unwritable folder becomes a CodesError that names `target`."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise CodesError(
                f"no space left while writing {target}: free some and run again, or choose another disk"
            ) from error
        if error.errno in (*FORBIDDEN, errno.ENOTDIR, errno.EEXIST):
            raise CodesError(f"{target} cannot be written ({error.strerror}): choose another output folder") from error
        raise


def publish_folder(partial: Path, folder: Path) -> None:
    """Rename a finished folder to its name. Raises FileExistsError where another process has done so already."""
    sync_folder(partial)
    try:
        os.rename(partial, folder)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise FileExistsError(errno.EEXIST, "exists already", str(folder)) from error
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
        family: of the models that the codes are for. tokenizer, tokenizer_hash: name, and hash of its weights.
        images_per_shard: images in one Arrow file; None: as many as fit into half a GiB.

    Returns:
        The manifest as written.

    Raises:
        CodesError: wrong shapes or ranges, no images, the folder exists already, the disk is full.
    """
    folder = Path(folder)
    codes_NCL, labels_N = np.asarray(codes_NCL), np.asarray(labels_N)
    check_rows(codes_NCL, labels_N, vocab_size, classes, str(folder))
    images, crops, length = codes_NCL.shape
    manifest = replace(
        Manifest.before_encoding(tokenizer, family, vocab_size, tokenizer_hash),
        images=images,
        classes=classes,
        crops=crops,
        sequence_length=length,
        crop_settings=crop_settings or {},
        label_histogram=histogram(labels_N, classes),
        class_names=class_names,
    )
    _write_table(folder, manifest, codes_NCL, labels_N, images_per_shard)
    return read_manifest(folder)


def _write_table(
    folder: Path, manifest: Manifest, codes_NCL: np.ndarray, labels_N: np.ndarray, images_per_shard: int | None
) -> None:
    """Write shards and descriptions into a hidden sibling, then rename it."""
    if images_per_shard is None:
        images_per_shard = max(1, SHARD_BYTES // (2 * manifest.crops * manifest.sequence_length))
    starts = range(0, manifest.images, images_per_shard)
    partial = partial_name(folder)
    with one_line_errors(folder):
        if folder.exists():
            raise CodesError(f"{folder} exists already: choose another output folder or remove it")
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
