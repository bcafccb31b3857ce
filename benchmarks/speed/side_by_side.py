"""Measures this project's code beside an original program's: one process each, in turn, medians.

Each side runs in its own process that waits for its turn, so that both run on the same machine at nearly the same time
and peak memory is counted separately. glibc keeps freed memory in both: otherwise the originals spend much of their
time returning pages to the system.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))

from provenance import RESULTS, origin, processor

from cca_ds.files import write_atomic

KEEP_FREED_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "68719476736", "MALLOC_TOP_PAD_": "268435456"}
SIDES = ("ours", "original")
TARGETS = {  # of the original's time, and of its peak memory
    "train_step": {"fp32": (0.85, 0.65), "bf16": (0.6, 0.65)},
    "sample_speed": {"llamagen": (0.667, None), "var": (0.55, None)},
}
Builders = dict[str, Callable[..., Callable[[], object]]]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def parser(description: str) -> argparse.ArgumentParser:
    """The flags that both benchmarks take."""
    flags = argparse.ArgumentParser(description=description.splitlines()[0])
    flags.add_argument("--family", choices=("llamagen", "var"), default="llamagen")
    flags.add_argument("--dtype", choices=DTYPES, default="fp32")
    flags.add_argument("--llamagen", help="a checkout of LlamaGen's program")
    flags.add_argument("--var", help="a checkout of VAR's program")
    flags.add_argument("--rounds", type=int, default=5)
    flags.add_argument("--threads", type=int, default=os.cpu_count())
    flags.add_argument("--date", help="of the result, YYYY-MM-DD (default: today)")
    flags.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    return flags


def peak_gib() -> float:
    """Peak resident memory of this process, GiB (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 2**20


def matmul_bound(run: Callable[[], object], dtype: torch.dtype) -> dict[str, float]:
    """FLOPs of a run, the rate of a large square matmul, and the seconds that the run's matmuls take at that rate."""
    with FlopCounterMode(display=False) as counter:
        run()
    factors, rates = [torch.randn(2048, 2048).to(dtype) for _ in range(2)], []
    for _ in range(5):
        start = time.perf_counter()
        factors[0] @ factors[1]
        rates.append(2 * 2048**3 / (time.perf_counter() - start))
    rate = statistics.median(rates)
    return {
        "tflop": round(counter.get_total_flops() / 1e12, 3),
        "tflop_per_second": round(rate / 1e12, 3),
        "seconds": round(counter.get_total_flops() / rate, 3),
    }


def serve(prepare: Callable[[], Callable[[], object]], threads: int, dtype: torch.dtype) -> None:
    """A worker: warm up, then one measured run for each line on stdin, answered by a line of JSON on stdout.

    The line "matmul_bound" is answered with `matmul_bound`.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    run = prepare()
    run()
    print("{}", flush=True)  # ready
    for line in sys.stdin:
        if line.strip() == "matmul_bound":
            print(json.dumps(matmul_bound(run, dtype)), flush=True)
            continue
        wall, processor = time.perf_counter(), time.process_time()
        run()
        seconds, processor_seconds = time.perf_counter() - wall, time.process_time() - processor
        answer = {"seconds": seconds, "processor_seconds": processor_seconds, "peak_gib": peak_gib()}
        print(json.dumps(answer), flush=True)


def _start(side: str, threads: int) -> subprocess.Popen:
    environment = {**os.environ, **KEEP_FREED_MEMORY, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, *sys.argv, "--worker", side]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    _answer(worker)  # wait for its warm-up: two pools of spinning threads slow each other down
    return worker


def _turn(worker: subprocess.Popen, request: str = "go") -> dict[str, float]:
    worker.stdin.write(f"{request}\n")
    worker.stdin.flush()
    return _answer(worker)


def _answer(worker: subprocess.Popen) -> dict[str, float]:
    for line in worker.stdout:
        if line.startswith("{"):
            return json.loads(line)
    raise SystemExit("a side ended early; its own message is above")


def compare(rounds: int, threads: int, matmuls: bool = False) -> dict[str, dict[str, float]]:
    """Medians of each side's runs, taken in turn, and ours over the original's; with `matmuls` the matmul bound."""
    workers = {name: _start(name, threads) for name in SIDES}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in SIDES}
    for _ in range(rounds):
        for name in SIDES:
            runs[name].append(_turn(workers[name]))
    alone = {"matmuls_alone": _turn(workers["original"], "matmul_bound")} if matmuls else {}
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    medians = {
        name: {key: round(statistics.median(run[key] for run in taken), 3) for key in taken[0]}
        for name, taken in runs.items()
    }
    ratios = {key: round(medians["ours"][key] / medians["original"][key], 3) for key in medians["ours"]}
    return {**medians, "ours_over_original": ratios, **alone}


def main(name: str, description: str, ours: Builders, originals: Builders, matmuls: bool = False) -> None:
    """The benchmark's command; with --worker, one of the two measured processes.

    Args:
        name: of the result file.
        description: of the command.
        ours: by family, dtype -> a run to measure.
        originals: by family, (dtype, checkout) -> the same in the original program.
        matmuls: whether to add what the matmuls alone take.
    """
    arguments = parser(description).parse_args()
    family, dtype = arguments.family, DTYPES[arguments.dtype]
    checkout = getattr(arguments, family)
    if checkout is None:
        raise SystemExit(f"give --{family} PATH, a checkout of the original program")
    if arguments.worker == "ours":
        serve(lambda: ours[family](dtype), arguments.threads, dtype)
    elif arguments.worker == "original":
        serve(lambda: originals[family](dtype, checkout), arguments.threads, dtype)
    else:
        result = compare(arguments.rounds, arguments.threads, matmuls)
        record(name, f"{family}-{arguments.dtype}", result, arguments)


def record(name: str, key: str, result: dict, arguments: argparse.Namespace) -> None:
    """Put a result under `key` into results/NAME.json, with date, device, commit and command, and print it."""
    path = RESULTS / f"{name}.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    command = (
        f"python benchmarks/speed/{name}.py --family {arguments.family} --dtype {arguments.dtype} "
        f"--{arguments.family} PATH --rounds {arguments.rounds} --threads {arguments.threads}"
    )
    device = f"{processor()}, {arguments.threads} threads of {os.cpu_count()}, PyTorch {torch.__version__}"
    known[key] = {
        **result,
        "rounds": arguments.rounds,
        "load_average": round(os.getloadavg()[0], 1),
        **origin(command, device, arguments.date),
    }
    path.parent.mkdir(exist_ok=True)
    write_atomic(path, json.dumps(known, indent=1, sort_keys=True) + "\n")
    path.with_suffix(".md").write_text(table(name, known))
    print(json.dumps({key: known[key]}, indent=1))


def table(name: str, known: dict[str, dict]) -> str:
    """The results of `name` as Markdown: seconds and GiB of both, the targets, and what the matmuls alone take."""
    lines = [
        f"Ours beside the original's, `{name}.py`, medians; times of the processor, threads added up. "
        "What the matmuls alone would take is at the rate of the library's large square matmul.",
        "",
        "| | s | original | share of its time (target) | GiB | original | share (target) | matmuls alone, share |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for key, found in sorted(known.items()):
        targets = next(limits for part, limits in TARGETS[name].items() if part in key)
        cells = [key]
        for quantity, limit in zip(("processor_seconds", "peak_gib"), targets, strict=True):
            share = found["ours_over_original"][quantity]
            verdict = f" ({limit:g}{'' if share <= limit else ', missed'})" if limit else ""
            values = (found[side][quantity] for side in SIDES)
            cells += [*(f"{value:.1f}" for value in values), f"{share:.2f}{verdict}"]
        alone = found.get("matmuls_alone")
        cells.append(f"{alone['seconds'] / found['original']['seconds']:.2f}" if alone else "")
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    lines += [
        f"- {key}: {found['date']}, {found['device']}, {found['rounds']} rounds, commit {found['commit']}, "
        f"`{found['command']}`"
        for key, found in sorted(known.items())
    ]
    return "\n".join(lines) + "\n"
