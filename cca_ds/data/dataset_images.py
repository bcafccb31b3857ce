"""Images of a Hugging Face dataset on disk (`save_to_disk`), or of a tar of such a dataset.

`datasets` opens a folder. It cannot open a dataset inside a tar without unpacking it, so there the Arrow files are
mapped in place. Nothing in the folder is executed: the images are taken as bytes, and no script is loaded.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow

from cca_ds.data.image_sources import ImageSource, PlainArchive, TarMember, open_archive
from cca_ds.data.manifest import CodesError
from cca_ds.data.table_files import offline_datasets
from cca_ds.untrusted import decoding, parse_json, read_json

if TYPE_CHECKING:
    import datasets  # takes a second to import

STATE_NAME, INFO_NAME = "state.json", "dataset_info.json"  # of one split


def is_dataset(folder: Path) -> bool:
    """Whether a folder was written by `save_to_disk`."""
    return (folder / STATE_NAME).is_file() or (folder / "dataset_dict.json").is_file()


def open_dataset(folder: Path, split: str) -> DatasetImages:
    """Open the dataset in `folder`, or its split of that name if it has several.

    Raises:
        CodesError: no such split, files that `datasets` cannot open, or columns without images and labels.
    """
    chosen = folder if (folder / STATE_NAME).is_file() else folder / split
    if not (chosen / STATE_NAME).is_file():
        found = ", ".join(sorted(path.parent.name for path in folder.glob(f"*/{STATE_NAME}")))
        raise CodesError(f"--source {folder} has the splits {found}, not {split}: choose with --split")
    library = offline_datasets()
    with decoding(f"--source {folder}: not a readable dataset", CodesError):
        for name in (STATE_NAME, INFO_NAME):
            if not isinstance(read_json(chosen / name), dict):
                raise CodesError(f"--source {folder}: not a readable dataset ({name} holds no object)")
    with decoding(f"--source {folder}: not a readable dataset", CodesError):
        dataset = library.Dataset.load_from_disk(str(chosen), keep_in_memory=False)
    return DatasetImages(folder, dataset.data, dataset.features)


def open_dataset_in_tar(path: Path, members: list[TarMember], split: str) -> DatasetImages:
    """Open the dataset in an uncompressed tar, or its split of that name if it has several.

    Args:
        members: of the tar, from `index_tar`.

    Raises:
        CodesError: a compressed tar, no such split, damaged files, or columns without images and labels.
    """
    archive = open_archive(path)
    if not isinstance(archive, PlainArchive):
        raise CodesError(f"--source {path}: a compressed tar of a dataset cannot be mapped: decompress it, or unpack")
    by_name = {member.name: member for member in members}
    roots = [PurePosixPath(name).parent for name in by_name if PurePosixPath(name).name == STATE_NAME]
    chosen = [root for root in roots if root.name == split] if len(roots) > 1 else roots
    if len(chosen) != 1:
        found = ", ".join(sorted(root.name for root in roots))
        raise CodesError(f"--source {path} has the splits {found}, not one named {split}: choose with --split")

    def content(name: str) -> Any:
        member = by_name[str(chosen[0] / name)]
        return parse_json(archive.read(member.offset, member.size))

    mapped = pyarrow.py_buffer(memoryview(np.memmap(path, mode="r")))
    with decoding(f"--source {path}: not a readable dataset", CodesError):
        files = [by_name[str(chosen[0] / entry["filename"])] for entry in content(STATE_NAME)["_data_files"]]
        buffers = [pyarrow.BufferReader(mapped.slice(file.offset, file.size)) for file in files]
        table = pyarrow.concat_tables(pyarrow.ipc.open_stream(buffer).read_all() for buffer in buffers)
        features = offline_datasets().DatasetInfo.from_dict(content(INFO_NAME)).features
    return DatasetImages(path, table, features)


class DatasetImages(ImageSource):
    """One column of encoded images and one of labels, both found by their types.

    Args:
        source: for messages.
        table: the rows, memory-mapped.
        features: the columns' types: one Image, and one ClassLabel or a column named label or labels.

    Raises:
        CodesError: other columns, no rows, a negative label, a class without images.
    """

    def __init__(self, source: Path, table: pyarrow.Table, features: datasets.Features) -> None:
        library = offline_datasets()
        self._source = source
        images = [name for name, feature in features.items() if isinstance(feature, library.Image)]
        labels = [name for name, feature in features.items() if isinstance(feature, library.ClassLabel)]
        labels = labels or [name for name in ("label", "labels") if name in features]
        if len(images) != 1 or len(labels) != 1:
            raise CodesError(
                f"--source {source}: needs one Image column and one ClassLabel (or label) column, "
                f"found {images} and {labels}"
            )
        self._column = table.column(images[0])
        self.labels_N = table.column(labels[0]).to_numpy().astype(np.int64)
        if not len(self.labels_N):
            raise CodesError(f"--source {source}: the data set is empty")
        if self.labels_N.min() < 0:
            raise CodesError(
                f"--source {source}: an image has the label {self.labels_N.min()}; is this an unlabelled split?"
            )
        names = getattr(features[labels[0]], "names", None) or range(int(self.labels_N.max()) + 1)
        self.class_names = tuple(str(name) for name in names)
        empty = set(range(len(self.class_names))) - set(self.labels_N.tolist())
        if empty:
            raise CodesError(
                f"--source {source}: {len(empty)} class(es) without images ({self.class_names[min(empty)]}, ...)"
            )

    def name(self, index: int) -> str:
        return f"row {index}"

    def read(self, index: int) -> bytes:
        value = self._column[index].as_py()
        if value is None:
            return b""
        if value["bytes"] is None:
            raise OSError(f"{self._source} stores the path {value['path']!r} instead of the image")
        return value["bytes"]
