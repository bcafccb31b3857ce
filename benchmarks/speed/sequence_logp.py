"""Times and weighs the sequence log-likelihood against what else could be used.

    python benchmarks/speed/sequence_logp.py                                 # the CPU's table, results beside this file
    python benchmarks/speed/sequence_logp.py --device cuda     # on a GPU, with Liger's and Apple's where they import
    python benchmarks/speed/sequence_logp.py --shapes llamagen-b --dtypes bf16 --repeats 5

Runs are interleaved (every variant once, again and again) and medians are given, of wall time and, on one CPU thread,
of that thread's own time, which other programs on the machine disturb less. Peak memory is measured by a process of its
own for each variant: the growth of the resident set (CPU) or of the allocator's peak (GPU) over the inputs.
"""

import argparse
import itertools
import json
import platform
import resource
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import sequence_logp_targets as targets
import sequence_logp_variants as variants

SHAPES = {  # sequences, tokens, vocabulary, width, bias
    "llamagen-b": (2, 576, 16384, 768, False),
    "llamagen-3b": (32, 576, 16384, 3200, False),
    "var-d16": (32, 680, 4096, 1024, True),
    "var-d30": (32, 680, 4096, 1920, True),
}
CPU_SEQUENCES = {"llamagen-b": 2, "llamagen-3b": 1, "var-d16": 2, "var-d30": 2}
AT_ONCE = {"cpu": 1, "cuda": 6}  # processes that measure memory; a GPU's allocator counts its own only
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def inputs_of(shape: str, dtype: str, device: str, face: str) -> dict:
    """The tensors of one case, seeded."""
    sequences, tokens, vocabulary, width, bias = SHAPES[shape]
    if device == "cpu":
        sequences = CPU_SEQUENCES[shape]
    torch.manual_seed(0)
    options = {"device": device, "dtype": DTYPES[dtype]}
    case = {"targets": torch.randint(vocabulary, (sequences, tokens), device=device)}
    if face == "logits":
        return {**case, "logits": torch.randn(sequences, tokens, vocabulary, **options).requires_grad_()}
    case["hidden"] = torch.randn(sequences, tokens, width, **options).requires_grad_()
    case["weight"] = (torch.randn(vocabulary, width, **options) / width**0.5).requires_grad_()
    case["bias"] = torch.randn(vocabulary, **options).requires_grad_() if bias else None
    return case


def synchronize(device: str) -> None:
    """Waits for the GPU, where there is one."""
    if device == "cuda":
        torch.cuda.synchronize()


def measure_times(runs: dict, device: str, repeats: int) -> dict:
    """Median milliseconds of each run, interleaved."""
    wall, own = {n: [] for n in runs}, {n: [] for n in runs}
    for run in runs.values():
        for _ in range(2):
            run()
        synchronize(device)
    for _ in range(repeats):
        for name, run in runs.items():
            synchronize(device)
            begin, begin_own = time.perf_counter(), time.thread_time()
            run()
            synchronize(device)
            wall[name].append(1e3 * (time.perf_counter() - begin))
            own[name].append(1e3 * (time.thread_time() - begin_own))
    return {n: {"wall_ms": statistics.median(wall[n]), "thread_ms": statistics.median(own[n])} for n in runs}


class ResidentPeak(threading.Thread):
    """Watches the resident set from a thread, a thousand times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.done, self.start_bytes = threading.Event(), self.resident()
        self.peak_bytes = self.start_bytes

    @staticmethod
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    def run(self) -> None:
        while not self.done.wait(0.0005):
            self.peak_bytes = max(self.peak_bytes, self.resident())


def measure_memory(shape: str, dtype: str, device: str, face: str, name: str) -> float:
    """MiB that one forward and backward take over their inputs; warmed up, gradients freed before."""
    case = inputs_of(shape, dtype, device, face)
    run = variants.make(face, name, case)
    for _ in range(2):
        run()
    variants.free_gradients(case)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    peaks = []
    for _ in range(3):
        watch = ResidentPeak()
        watch.start()
        run()
        watch.done.set()
        watch.join()
        variants.free_gradients(case)
        peaks.append((watch.peak_bytes - watch.start_bytes) / 2**20)
    return max(peaks)


def memory_in_own_process(
    arguments: argparse.Namespace, shape: str, dtype: str, face: str, name: str
) -> float | None:
    """`measure_memory` in a fresh process; None where it fails."""
    case = [shape, dtype, arguments.device, face, name]
    command = [sys.executable, __file__, "--threads", str(arguments.threads), "--memory-of", *case]
    done = subprocess.run(command, capture_output=True, text=True)
    return float(done.stdout.split()[-1]) if done.returncode == 0 else None


def measure_case(arguments: argparse.Namespace, shape: str, dtype: str, face: str) -> dict:
    """All variants of one shape, dtype and face."""
    torch.compiler.reset()  # or it gives up compiling after eight shapes, and runs the rest as they are
    case = inputs_of(shape, dtype, arguments.device, face)
    runs, left_out = {}, {}
    for name in variants.names(face, arguments.device):
        try:
            run = variants.make(face, name, case)
            run()
            runs[name] = run
        except Exception as error:  # what is missing or cannot run here is said in the table, not hidden
            left_out[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    variants.free_gradients(case)
    result = measure_times(runs, arguments.device, arguments.repeats)
    del runs
    weighed = [name for name in result if name not in variants.WITHOUT_MEMORY]
    with ThreadPoolExecutor(AT_ONCE[arguments.device]) as pool:
        found = pool.map(lambda name: memory_in_own_process(arguments, shape, dtype, face, name), weighed)
        for name, memory in zip(weighed, found, strict=True):
            result[name]["memory_mib"] = memory
    tokens = list(case["targets"].shape)
    return {
        "shape": shape,
        "dtype": dtype,
        "face": face,
        "tokens": tokens,
        "variants": result,
        "left_out": left_out,
    }


def table(report: dict) -> str:
    """The report as Markdown."""
    head = report["command"], report["date"], report["device"], report["commit"]
    lines = ["`{}`, {}, {}, commit {}".format(*head), ""]
    lines += [
        "| shape | dtype | face | variant | ms (wall) | ms (thread) | MiB over inputs |",
        "|---|---|---|---|--:|--:|--:|",
    ]
    for case in report["cases"]:
        for name, found in case["variants"].items():
            memory = found.get("memory_mib")
            memory = "" if memory is None else f"{memory:.0f}"
            cells = case["shape"], case["dtype"], case["face"], name
            numbers = f"{found['wall_ms']:.2f} | {found['thread_ms']:.2f} | {memory}"
            lines.append(f"| {' | '.join(cells)} | {numbers} |")
    for case in report["cases"]:
        for name, reason in case["left_out"].items():
            lines.append(f"\nLeft out: {case['shape']} {case['dtype']} {case['face']} {name}: {reason}")
    return "\n".join([*lines, *targets.section(report)]) + "\n"


def describe_device(device: str) -> str:
    """The device's own name."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = (
        [x.split(":")[1].strip() for x in info.read_text().splitlines() if "model name" in x]
        if info.exists()
        else []
    )
    capability = torch.backends.cpu.get_cpu_capability()
    amx = ", AMX" if info.exists() and "amx_bf16" in info.read_text() else ""
    return f"{(names or [platform.machine()])[0]} ({capability}{amx}), {torch.get_num_threads()} thread(s)"


def commit() -> str:
    """The commit of the tree, with a star where files differ from it."""
    root = Path(__file__).parents[2]

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True)
        return done.stdout.strip()

    changed = git(
        "status", "--porcelain", "--", "csrc", "cca_ds/likelihood", "benchmarks/speed/sequence_logp.py"
    )
    return git("rev-parse", "--short", "HEAD") + ("*" if changed else "")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=None)
    parser.add_argument("--faces", nargs="+", choices=["logits", "linear"], default=["logits", "linear"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "results")
    parser.add_argument(
        "--report", type=Path, help="measure nothing: write the table of this JSON, one of a run before"
    )
    parser.add_argument("--memory-of", nargs=5, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measures, prints the table, writes the JSON and the table."""
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        print(measure_memory(*arguments.memory_of))
        return
    if arguments.report:
        arguments.report.with_suffix(".md").write_text(table(json.loads(arguments.report.read_text())))
        return
    from cca_ds.likelihood import backend

    dtypes = arguments.dtypes or (["bf16"] if arguments.device == "cuda" else list(DTYPES))
    today = date.today().isoformat()
    report = {
        "command": "python benchmarks/speed/sequence_logp.py " + " ".join(sys.argv[1:]),
        "date": today,
        "device": describe_device(arguments.device),
        "device_type": arguments.device,
        "commit": commit(),
        "torch": torch.__version__,
        "backend": backend(),
        "cases": [],
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    stem = arguments.output / f"sequence_logp-{arguments.device}-{today}"
    for shape, dtype, face in itertools.product(arguments.shapes, dtypes, arguments.faces):
        report["cases"].append(measure_case(arguments, shape, dtype, face))
        print(f"{shape} {dtype} {face} done", file=sys.stderr, flush=True)
        stem.with_suffix(".json").write_text(
            json.dumps(report, indent=1) + "\n"
        )  # kept if the rest is cut off
        stem.with_suffix(".md").write_text(table(report))
    print(table(report))


if __name__ == "__main__":
    main()
