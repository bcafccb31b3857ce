"""Reading tables of codes: a table's memory-mapped Arrow files as zero-copy NumPy views.

Letters: N images, C crops, L codes per crop, B rows of one call.
Rows come from these views instead of `datasets`, whose row access is thirty times slower and whose import takes a
second. `datasets.load_from_disk` opens the same folder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from cca_ds.data.manifest import MANIFEST_NAME, CodesError, Manifest, Shard, read_manifest
from cca_ds.data.table_files import check_rows
from cca_ds.files import file_hash, write_atomic

VERIFIED = "verified.json"


class CodeTable:
    """A table of codes, memory-mapped; open it with `CodeTable.open`.

    A pickled table holds its folder only: a data-loader worker maps the files itself.
    """

    def __init__(self, folder: Path, manifest: Manifest, views: list[tuple[np.ndarray, np.ndarray]]) -> None:
        self.folder = folder
        self.manifest = manifest
        self._chunks = [codes_NCL for codes_NCL, _ in views]
        self._starts = np.cumsum([0] + [len(codes_NCL) for codes_NCL in self._chunks])
        self._labels = views[0][1] if len(views) == 1 else np.concatenate([labels_N for _, labels_N in views])

    @classmethod
    def open(cls, folder: str | Path) -> CodeTable:
        """Map the files of the table in `folder`. Reads the labels but not the codes.

        Raises:
            CodesError: no table, an empty one, files that differ from the manifest, labels outside the classes.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        if not manifest.images:
            raise CodesError(f"{folder}: the data set is empty")
        table = cls(folder, manifest, [_map_shard(folder, shard, manifest) for shard in manifest.shards])
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
        if len(self._chunks) > 1:
            raise CodesError(f"{self.folder} has {len(self._chunks)} files, so no single view: read it with take()")
        return self._chunks[0]

    def _stored(self, indices: np.ndarray, crops: np.ndarray | int = 0) -> np.ndarray:
        """Codes [B, L] uint16 of the rows `indices` [B]; `crops` is one crop per row, or one for all rows."""
        rows = np.asarray(indices, dtype=np.int64)
        crops = np.broadcast_to(np.asarray(crops, dtype=np.int64), rows.shape)
        if rows.size and (rows.min() < 0 or rows.max() >= len(self)):
            raise IndexError(f"row {int(rows.max())} of a table of {len(self)} images")
        if len(self._chunks) == 1:
            return self._chunks[0][rows, crops]
        codes_BL = np.empty((len(rows), self.manifest.sequence_length), dtype=np.uint16)
        shards = np.searchsorted(self._starts, rows, side="right") - 1
        places = zip(shards.tolist(), (rows - self._starts[shards]).tolist(), crops.tolist(), strict=True)
        # row by row: a random batch touches nearly as many files as it has rows, and indexing per file is slower
        for number, (shard, row, crop) in enumerate(places):
            codes_BL[number] = self._chunks[shard][row, crop]
        return codes_BL

    def take(self, indices: np.ndarray, crops: np.ndarray | int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Codes [B, L] int64 and labels [B] int64 of the rows `indices` [B].

        Args:
            crops: which crop of each image, one per row or one for all rows.

        Raises:
            IndexError: a row outside the table. CodesError: a code outside the vocabulary.
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
        files = list(zip(self.manifest.shards, self._chunks, self._starts[:-1], strict=True))
        for shard, codes_NCL, start in files[part]:
            if file_hash(self.folder / shard.file) != shard.sha256:
                raise CodesError(f"{self.folder / shard.file} differs from its hash in the manifest: encode it again")
            labels_N = self._labels[start : start + shard.images]
            source = str(self.folder / shard.file)
            check_rows(codes_NCL, labels_N, self.manifest.vocab_size, self.manifest.classes, source)
        counts = np.bincount(self._labels, minlength=self.manifest.classes)
        if tuple(counts.tolist()) != self.manifest.label_histogram:
            raise CodesError(f"{self.folder}: the labels differ from the manifest's histogram: encode the images again")

    def is_verified(self) -> bool:
        """Whether an earlier start has checked exactly these files: their sizes and times are those it wrote down."""
        try:
            return json.loads((self.folder / VERIFIED).read_text()) == self._fingerprint()
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
        for codes_NCL in self._chunks:
            for start in range(0, len(codes_NCL), 4096):  # the index array takes 8 bytes a code
                seen_V[codes_NCL[start : start + 4096].ravel()] = True
        return int(seen_V.sum())


def _map_shard(folder: Path, shard: Shard, manifest: Manifest) -> tuple[np.ndarray, np.ndarray]:
    """Views of one Arrow file: codes [n, C, L] uint16 and labels [n] int32."""
    import pyarrow

    path = folder / shard.file
    size = path.stat().st_size if path.is_file() else None
    if size != shard.bytes:
        found = "is missing" if size is None else f"has {size} bytes instead of {shard.bytes}"
        raise CodesError(f"{path} {found}: copy it again or encode the images again")
    shape = (shard.images, manifest.crops, manifest.sequence_length)
    try:
        with pyarrow.memory_map(str(path)) as stream:
            table = pyarrow.ipc.open_stream(stream).read_all()
        column, label = table.column("codes"), table.column("label")
        if column.num_chunks != 1 or table.num_rows != shard.images:
            raise CodesError(f"{table.num_rows} rows in {column.num_chunks} batches, not {shard.images} in one")
        flat = column.chunk(0)
        while pyarrow.types.is_fixed_size_list(flat.type):
            flat = flat.flatten()
        codes_NCL = flat.to_numpy(zero_copy_only=True).reshape(shape)
        labels_N = label.chunk(0).to_numpy(zero_copy_only=True)
    except (pyarrow.ArrowException, OSError, KeyError, ValueError) as error:
        raise CodesError(f"{path} is not a shard of this table ({error}): encode the images again") from error
    if codes_NCL.dtype != np.uint16 or labels_N.dtype != np.int32:
        raise CodesError(f"{path} stores {codes_NCL.dtype} codes and {labels_N.dtype} labels, not uint16 and int32")
    return codes_NCL, labels_N
