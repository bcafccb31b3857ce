"""Reading tables of codes: single rows from their place in the Arrow files, whole files as zero-copy NumPy views.

Letters: N images, C crops, L codes per crop, B rows of one call.
Rows are read here instead of with `datasets`, whose row access is thirty times slower and whose import takes a second;
`datasets.load_from_disk` opens the same folder. A row is read rather than looked up in mapped memory, where a file that
was cut short, or a network disk that fails, would end the process without a word.
"""

from __future__ import annotations

import json
import os
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cca_ds.data.manifest import MANIFEST_NAME, CodesError, Manifest, Shard, read_manifest
from cca_ds.data.table_files import check_rows
from cca_ds.files import file_hash, write_atomic
from cca_ds.untrusted import read_json

VERIFIED = "verified.json"


@dataclass(frozen=True, eq=False)
class OpenShard:
    """One Arrow file, open for reading."""

    path: Path
    descriptor: int
    codes_NCL: np.ndarray  # uint16, a read-only view of the mapped file
    labels_N: np.ndarray  # int32
    offset: int  # where in the file the codes begin

    def __post_init__(self) -> None:
        weakref.finalize(self, os.close, self.descriptor)


class CodeTable:
    """A table of codes; open it with `CodeTable.open`.

    A pickled table holds its folder only: a data-loader worker opens the files itself.
    """

    def __init__(self, folder: Path, manifest: Manifest, shards: list[OpenShard]) -> None:
        self.folder = folder
        self.manifest = manifest
        self._shards = shards
        self._starts = np.cumsum([0] + [len(shard.codes_NCL) for shard in shards])
        self._offsets = np.array([shard.offset for shard in shards])
        self._labels = np.concatenate([shard.labels_N for shard in shards])
        self._labels.flags.writeable = False

    @classmethod
    def open(cls, folder: str | Path) -> CodeTable:
        """Open the files of the table in `folder`. Reads the labels but not the codes.

        Raises:
            CodesError: no table, an empty one, files that differ from the manifest, labels outside the classes.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        if not manifest.images:
            raise CodesError(f"{folder}: the data set is empty")
        table = cls(folder, manifest, [_open_shard(folder, shard, manifest) for shard in manifest.shards])
        low, high = int(table.labels.min()), int(table.labels.max())
        if low < 0 or high >= manifest.classes:
            wrong = low if low < 0 else high
            raise CodesError(
                f"{folder}: the label {wrong} is outside 0..{manifest.classes - 1}: encode the images again"
            )
        return table

    def __len__(self) -> int:
        return self.manifest.images

    def __getstate__(self) -> Path:
        return self.folder

    def __setstate__(self, folder: Path) -> None:
        self.__dict__.update(CodeTable.open(folder).__dict__)

    @property
    def labels(self) -> np.ndarray:
        """[N] int32, read-only."""
        return self._labels

    @property
    def codes(self) -> np.ndarray:
        """[N, C, L] uint16, a read-only view of the file. Raises CodesError for a table of several files."""
        if len(self._shards) > 1:
            raise CodesError(f"{self.folder} has {len(self._shards)} files, so no single view: read it with take()")
        return self._shards[0].codes_NCL

    def _stored(self, indices: np.ndarray, crops: np.ndarray | int = 0) -> np.ndarray:
        """Codes [B, L] uint16 of the rows `indices` [B]; `crops` is one crop per row, or one for all rows."""
        rows = np.asarray(indices, dtype=np.int64)
        crops = np.broadcast_to(np.asarray(crops, dtype=np.int64), rows.shape)
        if rows.size and (rows.min() < 0 or rows.max() >= len(self)):
            raise IndexError(f"row {int(rows.max())} of a table of {len(self)} images")
        if crops.size and (crops.min() < 0 or crops.max() >= self.manifest.crops):
            raise IndexError(f"crop {int(crops.max())} of {self.manifest.crops}")
        length = self.manifest.sequence_length
        codes_BL = np.empty((len(rows), length), dtype=np.uint16)
        shards = np.searchsorted(self._starts, rows, side="right") - 1
        places = self._offsets[shards] + 2 * length * ((rows - self._starts[shards]) * self.manifest.crops + crops)
        space, row_bytes = memoryview(codes_BL).cast("B"), 2 * length
        for number, (shard, place) in enumerate(zip(shards.tolist(), places.tolist(), strict=True)):
            row_space = space[number * row_bytes : (number + 1) * row_bytes]
            if os.preadv(self._shards[shard].descriptor, [row_space], place) != row_bytes:
                path = self._shards[shard].path
                raise CodesError(f"{path} was cut short while it was read: copy it again or encode the images again")
        return codes_BL

    def take(self, indices: np.ndarray, crops: np.ndarray | int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Codes [B, L] int64 and labels [B] int64 of the rows `indices` [B].

        Args:
            crops: which crop of each image, one per row or one for all rows.

        Raises:
            IndexError: a row or crop outside the table.
            CodesError: a code outside the vocabulary, or a file that was cut short.
        """
        codes_BL = self._stored(indices, crops)
        if codes_BL.size and int(codes_BL.max()) >= self.manifest.vocab_size:
            row = int(np.asarray(indices)[codes_BL.max(axis=1).argmax()])
            raise CodesError(
                f"{self.folder}: image {row} has the code {int(codes_BL.max())}, outside "
                f"0..{self.manifest.vocab_size - 1}: encode the images again"
            )
        return codes_BL.astype(np.int64), self._labels[indices].astype(np.int64)

    def check(self, part: slice = slice(None)) -> None:
        """Read every file and compare hashes, ranges and the label histogram with the manifest.

        Args:
            part: of the files; with one of several parts, the files of the others are not read.

        Raises:
            CodesError: the first difference.
        """
        for shard, opened in list(zip(self.manifest.shards, self._shards, strict=True))[part]:
            if file_hash(opened.path) != shard.sha256:
                raise CodesError(f"{opened.path} differs from its hash in the manifest: encode it again")
            vocab_size, classes = self.manifest.vocab_size, self.manifest.classes
            check_rows(opened.codes_NCL, opened.labels_N, vocab_size, classes, str(opened.path))
        counts = np.bincount(self._labels, minlength=self.manifest.classes)
        if tuple(counts.tolist()) != self.manifest.label_histogram:
            raise CodesError(f"{self.folder}: the labels differ from the manifest's histogram: encode the images again")

    def is_verified(self) -> bool:
        """Whether an earlier start has checked exactly these files: their sizes and times are those it wrote down."""
        try:
            return read_json(self.folder / VERIFIED) == self._fingerprint()
        except (OSError, ValueError):
            return False

    def mark_verified(self) -> bool:
        """Write down that the files were checked. False where the folder cannot be written."""
        try:
            write_atomic(self.folder / VERIFIED, json.dumps(self._fingerprint(), indent=1) + "\n")
        except OSError:
            return False
        return True

    def _fingerprint(self) -> dict[str, Any]:
        names = [MANIFEST_NAME, *(shard.file for shard in self.manifest.shards)]
        found = {name: (self.folder / name).stat() for name in names}
        return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in found.items()}

    def used_codes(self) -> int:
        """Number of different codes in the table; reads all of it."""
        seen_V = np.zeros(self.manifest.vocab_size, dtype=bool)
        for shard in self._shards:
            for start in range(0, len(shard.codes_NCL), 4096):  # the index array takes 8 bytes a code
                seen_V[shard.codes_NCL[start : start + 4096].ravel()] = True
        return int(seen_V.sum())


def _open_shard(folder: Path, shard: Shard, manifest: Manifest) -> OpenShard:
    """Open one Arrow file and check its shape."""
    import pyarrow

    path = folder / shard.file
    size = path.stat().st_size if path.is_file() else None
    if size != shard.bytes:
        found = "is missing" if size is None else f"has {size} bytes instead of {shard.bytes}"
        raise CodesError(f"{path} {found}: copy it again or encode the images again")
    shape = (shard.images, manifest.crops, manifest.sequence_length)
    try:
        with pyarrow.memory_map(str(path)) as stream:
            whole = stream.read_buffer()
            table = pyarrow.ipc.open_stream(whole).read_all()
        column, label = table.column("codes"), table.column("label")
        if column.num_chunks != 1 or table.num_rows != shard.images:
            raise CodesError(f"{table.num_rows} rows in {column.num_chunks} batches, not {shard.images} in one")
        flat = column.chunk(0)
        while pyarrow.types.is_fixed_size_list(flat.type):
            flat = flat.flatten()
        codes_NCL = flat.to_numpy(zero_copy_only=True).reshape(shape)
        labels_N = label.chunk(0).to_numpy(zero_copy_only=True)
        offset = codes_NCL.ctypes.data - whole.address
        if not 0 <= offset <= shard.bytes - codes_NCL.nbytes:
            raise CodesError("its codes are compressed")
    except (pyarrow.ArrowException, OSError, KeyError, ValueError) as error:
        raise CodesError(f"{path} is not a shard of this table ({error}): encode the images again") from error
    if codes_NCL.dtype != np.uint16 or labels_N.dtype != np.int32:
        raise CodesError(f"{path} stores {codes_NCL.dtype} codes and {labels_N.dtype} labels, not uint16 and int32")
    return OpenShard(path, os.open(path, os.O_RDONLY | os.O_CLOEXEC), codes_NCL, labels_N, offset)
