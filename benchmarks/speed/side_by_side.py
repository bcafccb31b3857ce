"""Measuring this project's code beside an original program's, fairly: one process each, in turn, medians.

Each contender runs in a process of its own that waits for its turn, so that both see the same machine at
nearly the same time and neither one's memory counts for the other. glibc keeps freed memory in both: without
it the originals spend much of their time on returning pages to the system.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

RESULTS = Path(__file__).parents[1] / "results"
KEEP_FREED_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "68719476736",
    "MALLOC_TOP_PAD_": "268435456",
}
CONTENDERS = ("ours", "original")
ASKED = {  # of the original's time, and of its peak memory
    "train_step": {"fp32": (0.85, 0.65), "bf16": (0.6, 0.65)},
    "sample_speed": {"llamagen": (0.667, None), "var": (0.55, None)},
}
Contenders = dict[str, Callable[..., Callable[[], object]]]
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
    flags.add_argument("--date", help="for the record, e.g. 2026-11-20")
    flags.add_argument("--worker", choices=CONTENDERS, help=argparse.SUPPRESS)
    return flags


def peak_gib() -> float:
    """The most memory this process has held at once, GiB (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 2**20


def floor(run: Callable[[], object], dtype: torch.dtype) -> dict[str, float]:
    """What a run's matrix products alone would take at the rate of a large product, in the same process."""
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

    The line "floor" is answered with what the matrix products alone would take.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    run = prepare()
    run()
    print("{}", flush=True)  # ready
    for line in sys.stdin:
        if line.strip() == "floor":
            print(json.dumps(floor(run, dtype)), flush=True)
            continue
        wall, processor = time.perf_counter(), time.process_time()
        run()
        seconds, processor_seconds = time.perf_counter() - wall, time.process_time() - processor
        answer = {"seconds": seconds, "processor_seconds": processor_seconds, "peak_gib": peak_gib()}
        print(json.dumps(answer), flush=True)


def _start(contender: str, threads: int) -> subprocess.Popen:
    environment = {**os.environ, **KEEP_FREED_MEMORY, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, *sys.argv, "--worker", contender]
    worker = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    _answer(worker)  # warm before the next one starts: two pools of spinning threads would hinder each other
    return worker


def _turn(worker: subprocess.Popen, ask: str = "go") -> dict[str, float]:
    worker.stdin.write(f"{ask}\n")
    worker.stdin.flush()
    return _answer(worker)


def _answer(worker: subprocess.Popen) -> dict[str, float]:
    for line in worker.stdout:
        if line.startswith("{"):
            return json.loads(line)
    raise SystemExit("a contender ended early; its own message is above")


def compare(rounds: int, threads: int, products: bool = False) -> dict[str, dict[str, float]]:
    """Medians of each contender's runs, taken in turn, and ours over the original's."""
    workers = {name: _start(name, threads) for name in CONTENDERS}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    for _ in range(rounds):
        for name in CONTENDERS:
            runs[name].append(_turn(workers[name]))
    alone = {"products_alone": _turn(workers["original"], "floor")} if products else {}
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    medians = {
        name: {key: round(statistics.median(run[key] for run in taken), 3) for key in taken[0]}
        for name, taken in runs.items()
    }
    ratios = {key: round(medians["ours"][key] / medians["original"][key], 3) for key in medians["ours"]}
    return {**medians, "ours_over_original": ratios, **alone}


def main(
    name: str, description: str, ours: Contenders, originals: Contenders, products: bool = False
) -> None:
    """Measure, or be one of the two that are measured; `ours` and `originals` by family, given dtype (and checkout)."""
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
        result = compare(arguments.rounds, arguments.threads, products)
        record(name, f"{family}-{arguments.dtype}", result, arguments)


def record(name: str, key: str, result: dict, arguments: argparse.Namespace) -> None:
    """Put a result under `key` into results/NAME.json, with date, device, commit and command, and print it."""
    path = RESULTS / f"{name}.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    known[key] = {
        **result,
        "rounds": arguments.rounds,
        "date": arguments.date or time.strftime("%Y-%m-%d"),
        "device": f"{_processor()}, {arguments.threads} threads of {os.cpu_count()}, PyTorch {torch.__version__}",
        "load_average": round(os.getloadavg()[0], 1),
        "commit": commit,
        "command": f"python benchmarks/speed/{name}.py --family {arguments.family} --dtype {arguments.dtype} "
        f"--{arguments.family} PATH --rounds {arguments.rounds} --threads {arguments.threads}",
    }
    path.parent.mkdir(exist_ok=True)
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    os.replace(draft, path)
    path.with_suffix(".md").write_text(table(name, known))
    print(json.dumps({key: known[key]}, indent=1))


def table(name: str, known: dict[str, dict]) -> str:
    """The results of `name` as Markdown: seconds and GiB of both, what was asked, and what the products alone take."""
    lines = [
        f"Ours beside the original's, `{name}.py`, medians; times of the processor, threads added up. "
        "What the products alone would take is at the rate of the library's large square product.",
        "",
        "| | s | original | share of its time (asked) | GiB | original | share (asked) | products alone, share |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for key, found in sorted(known.items()):
        asked = next(asked for part, asked in ASKED[name].items() if part in key)
        cells = [key]
        for quantity, limit in zip(("processor_seconds", "peak_gib"), asked, strict=True):
            share = found["ours_over_original"][quantity]
            said = f" ({limit:g}{'' if share <= limit else ', missed'})" if limit else ""
            values = (found[side][quantity] for side in CONTENDERS)
            cells += [*(f"{value:.1f}" for value in values), f"{share:.2f}{said}"]
        alone = found.get("products_alone")
        cells.append(f"{alone['seconds'] / found['original']['seconds']:.2f}" if alone else "")
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    lines += [
        f"- {key}: {found['date']}, {found['device']}, {found['rounds']} rounds, commit {found['commit']}, "
        f"`{found['command']}`"
        for key, found in sorted(known.items())
    ]
    return "\n".join(lines) + "\n"


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", information.read_text()) if information.exists() else None
    return found[1] if found else platform.processor()
