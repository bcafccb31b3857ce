"""python benchmarks/speed/data_loading.py --date 2026-11-20

Random access to codes: this project's Arrow table beside the original program's folder of .npy files.

Both hold the same 20,000 records of ten crops of 576 codes. The original's layout is one file of codes
([1, 10, 576] int64) and one of the label ([1] int64) per image, read by LlamaGen's dataset/imagenet.py with
two `np.load`s and a random crop; `read_files` does the same reads without the overhead of a DataLoader.
The page cache is warm for both, one thread reads, rounds are interleaved, and the result is the median.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from provenance import RESULTS, cpu, origin

from cca_ds.data.codes import CodeTable
from cca_ds.data.table_files import write_codes

CROPS, LENGTH, VOCABULARY, CLASSES = 10, 576, 16384, 1000
BATCH = 256
IMAGES_PER_SHARD = 1024


def write_layouts(folder: Path, records: int) -> tuple[Path, Path, Path]:
    """Write the same random codes as a table of one file, one of several files, and .npy files; returns the folders."""
    generator = np.random.default_rng(0)
    codes_NCL = generator.integers(0, VOCABULARY, (records, CROPS, LENGTH), dtype=np.uint16)
    labels_N = generator.integers(0, CLASSES, records)
    table = folder / "table"
    description = {"family": "llamagen", "tokenizer": "llamagen-vq16", "tokenizer_hash": "0" * 64}
    description |= {"vocab_size": VOCABULARY, "classes": CLASSES}
    write_codes(table, codes_NCL, labels_N, **description)
    write_codes(folder / "shards", codes_NCL, labels_N, images_per_shard=IMAGES_PER_SHARD, **description)
    files = folder / "files"
    for part in ("codes", "labels"):
        (files / f"imagenet384_{part}").mkdir(parents=True)
    for index in range(records):
        np.save(files / "imagenet384_codes" / f"{index}.npy", codes_NCL[None, index].astype(np.int64))
        np.save(files / "imagenet384_labels" / f"{index}.npy", labels_N[None, index])
    return table, folder / "shards", files


def bytes_on_disk(folder: Path) -> int:
    """Blocks that the files of a folder occupy, as `du` counts them."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def read_files(files: Path, rows: np.ndarray, crops: np.ndarray) -> int:
    """Read samples as the original's dataset does; returns a checksum."""
    codes, labels = str(files / "imagenet384_codes"), str(files / "imagenet384_labels")
    checksum = 0
    for row, crop in zip(rows.tolist(), crops.tolist(), strict=True):
        code_L = np.load(os.path.join(codes, f"{row}.npy"))[:, crop]
        label = np.load(os.path.join(labels, f"{row}.npy"))
        checksum += int(code_L[0, 0]) + int(label[0])
    return checksum


def read_table(table: CodeTable, rows: np.ndarray, crops: np.ndarray) -> int:
    """Read the same samples in batches, as the training loop does; returns the same checksum."""
    checksum = 0
    for start in range(0, len(rows), BATCH):
        batch = slice(start, start + BATCH)
        codes_BL, labels_B = table.take(rows[batch], crops[batch])
        checksum += int(codes_BL[:, 0].sum()) + int(labels_B.sum())
    return checksum


def read_table_one_by_one(table: CodeTable, rows: np.ndarray, crops: np.ndarray) -> int:
    """Read the same samples one at a time; returns the same checksum."""
    checksum = 0
    for row, crop in zip(rows.tolist(), crops.tolist(), strict=True):
        codes_BL, labels_B = table.take([row], crop)
        checksum += int(codes_BL[0, 0]) + int(labels_B[0])
    return checksum


def read_rows_of_datasets(dataset, rows: np.ndarray, crops: np.ndarray) -> int:
    """Read the same samples in batches through `datasets`' own row access; returns the same checksum."""
    checksum = 0
    for start in range(0, len(rows), BATCH):
        batch = slice(start, start + BATCH)
        found = dataset[rows[batch]]
        codes_BL = found["codes"][np.arange(len(found["codes"])), crops[batch]]
        checksum += int(codes_BL[:, 0].sum()) + int(found["label"].sum())
    return checksum


def measure(readers: dict[str, Callable], records: int, rounds: int) -> dict[str, float]:
    """Median samples per second of each reader; every round reads the same random samples with all."""
    rates: dict[str, list[float]] = {name: [] for name in readers}
    for number in range(rounds):
        generator = np.random.default_rng(number)
        rows, crops = generator.permutation(records), generator.integers(0, CROPS, records)
        checksums = set()
        for name, read in readers.items():
            start = time.perf_counter()
            checksums.add(read(rows, crops))
            rates[name].append(records / (time.perf_counter() - start))
        assert len(checksums) == 1, "the layouts disagree"
    return {name: statistics.median(values) for name, values in rates.items()}


def run(records: int, rounds: int, folder: Path) -> dict:
    """Write both layouts into `folder`, measure, and compare."""
    import datasets

    table_folder, shards_folder, files = write_layouts(folder, records)
    table, shards = CodeTable.open(table_folder), CodeTable.open(shards_folder)
    dataset = datasets.load_from_disk(str(table_folder)).with_format("numpy")
    readers = {
        "npy_files": lambda rows, crops: read_files(files, rows, crops),
        "table": lambda rows, crops: read_table(table, rows, crops),
        "table_of_several_files": lambda rows, crops: read_table(shards, rows, crops),
        "table_one_by_one": lambda rows, crops: read_table_one_by_one(table, rows, crops),
        "datasets_row_access": lambda rows, crops: read_rows_of_datasets(dataset, rows, crops),
    }
    measure(readers, records, 1)  # fills the page cache
    rates = measure(readers, records, rounds)
    sizes = {"npy_files": bytes_on_disk(files), "table": bytes_on_disk(table_folder)}
    return {
        "records": records,
        "samples_per_second": {name: round(rate) for name, rate in rates.items()},
        "bytes": sizes,
        "speedup_of_several_files": round(rates["table_of_several_files"] / rates["npy_files"], 1),
        "speedup": round(rates["table"] / rates["npy_files"], 1),
        "bytes_ratio": round(sizes["table"] / sizes["npy_files"], 4),
    }


def as_table(result: dict) -> str:
    """The result in Markdown."""
    rates, sizes = result["samples_per_second"], result["bytes"]
    base = rates["npy_files"]
    names = {
        "npy_files": "a .npy file per image (original)",
        "table": f"Arrow table, `CodeTable.take` of {BATCH}",
        "table_of_several_files": f"the same in files of {IMAGES_PER_SHARD} images, as `cca_ds.encode` writes",
        "table_one_by_one": "Arrow table, `CodeTable.take` of 1",
        "datasets_row_access": f"Arrow table, rows of `datasets`, {BATCH} at a time",
    }
    lines = ["| layout | samples/s | times the original | MB |", "| --- | --- | --- | --- |"]
    for name, words in names.items():
        size = sizes["npy_files" if name == "npy_files" else "table"]
        lines.append(f"| {words} | {rates[name]:,} | {rates[name] / base:.1f} | {size / 1e6:.0f} |")
    head = f"{result['records']:,} records of {CROPS} crops of {LENGTH} codes; {result['date']}, "
    head += f"{result['device']}, commit {result['commit']}, `{result['command']}`"
    return head + "\n\n" + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--date", help="of the result, YYYY-MM-DD (default: today)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of data_loading.json and .md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = run(arguments.records, arguments.rounds, Path(folder))
    command = " ".join(["python", "benchmarks/speed/data_loading.py", *sys.argv[1:]])
    result |= origin(command, cpu(), arguments.date)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "data_loading.json").write_text(json.dumps(result, indent=1) + "\n")
    (arguments.output / "data_loading.md").write_text(as_table(result))
    print(as_table(result))


if __name__ == "__main__":
    main()
