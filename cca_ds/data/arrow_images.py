"""Images of a Hugging Face dataset on disk (`save_to_disk`), or of a tar of one, read from its Arrow files.

The files are memory-mapped, in a tar in place; `datasets` itself is not needed.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow

from cca_ds.data.images import CodesError, ImageSource, PlainArchive, TarMember, open_archive


def is_dataset(folder: Path) -> bool:
    """Whether a folder was written by `save_to_disk`."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def open_dataset(folder: Path, split: str) -> ArrowImages:
    """Open a dataset's folder; of several splits the named one."""
    if not (folder / "state.json").is_file():
        if not (folder / split / "state.json").is_file():
            splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
            raise CodesError(
                f"--source {folder} has the splits {', '.join(splits)}, not {split}: choose with --split"
            )
        folder = folder / split
    try:
        state = json.loads((folder / "state.json").read_text())
        info = json.loads((folder / "dataset_info.json").read_text())
        maps = [pyarrow.memory_map(str(folder / entry["filename"])) for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError) as error:
        raise CodesError(f"--source {folder}: not a readable dataset ({error})") from error
    return ArrowImages(folder, maps, info["features"])


def open_dataset_in_tar(path: Path, members: list[TarMember], split: str) -> ArrowImages:
    """Open a dataset inside an uncompressed tar; of several splits the named one."""
    archive = open_archive(path)
    if not isinstance(archive, PlainArchive):
        raise CodesError(
            f"--source {path}: a compressed tar of a dataset cannot be mapped: decompress it, or unpack"
        )
    place = {member.name: member for member in members}
    roots = [PurePosixPath(name).parent for name in place if PurePosixPath(name).name == "state.json"]
    chosen = [root for root in roots if root.name == split] if len(roots) > 1 else roots
    if len(chosen) != 1:
        found = ", ".join(sorted(root.name for root in roots))
        raise CodesError(
            f"--source {path} has the splits {found}, not one named {split}: choose with --split"
        )

    def member(name: str) -> TarMember:
        return place[str(chosen[0] / name)]

    whole = pyarrow.py_buffer(memoryview(np.memmap(path, mode="r")))
    try:
        state, info = (
            json.loads(archive.read(member(name).offset, member(name).size))
            for name in ("state.json", "dataset_info.json")
        )
        files = [member(entry["filename"]) for entry in state["_data_files"]]
        slices = [pyarrow.BufferReader(whole.slice(file.offset, file.size)) for file in files]
    except (OSError, ValueError, KeyError) as error:
        raise CodesError(f"--source {path}: not a readable dataset ({error!r})") from error
    return ArrowImages(path, slices, info["features"])


class ArrowImages(ImageSource):
    """A column of encoded images and a column of labels, both found by their types."""

    def __init__(self, source: Path, files: list, features: dict) -> None:
        self._source = source
        images = [name for name, feature in features.items() if feature.get("_type") == "Image"]
        labels = [name for name, feature in features.items() if feature.get("_type") == "ClassLabel"]
        labels = labels or [name for name in ("label", "labels") if name in features]
        if len(images) != 1 or len(labels) != 1:
            raise CodesError(
                f"--source {source}: needs one Image column and one ClassLabel (or label) column, "
                f"found {images} and {labels}"
            )
        try:
            table = pyarrow.concat_tables(pyarrow.ipc.open_stream(file).read_all() for file in files)
        except (pyarrow.ArrowException, OSError) as error:
            raise CodesError(f"--source {source}: a truncated or foreign Arrow file ({error})") from error
        self._column = table.column(images[0])
        self.labels_N = table.column(labels[0]).to_numpy().astype(np.int64)
        if not len(self.labels_N):
            raise CodesError(f"--source {source}: the data set is empty")
        if self.labels_N.min() < 0:
            raise CodesError(
                f"--source {source}: the label {self.labels_N.min()} is none (an unlabelled split?)"
            )
        names = features[labels[0]].get("names") or range(int(self.labels_N.max()) + 1)
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
