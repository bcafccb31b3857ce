"""Time and peak memory of the sequence log-likelihood beside its alternatives.

    python benchmarks/speed/sequence_logp.py                                 # the CPU's table, into benchmarks/results
    python benchmarks/speed/sequence_logp.py --device cuda     # on a GPU, with Liger's and Apple's where installed
    python benchmarks/speed/sequence_logp.py --shapes llamagen-b --dtypes bf16 --repeats 5

Runs are interleaved (every variant once per round). Results are medians of wall time and, on one CPU thread, of that
thread's processor time, which a loaded machine disturbs less. Peak memory is measured in a process per variant: the
growth of the resident set (CPU) or of the allocator's peak (GPU) over the inputs.
"""

import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
import sequence_logp_targets as targets
import sequence_logp_variants as variants
from provenance import RESULTS, origin, processor, today

SHAPES = {  # sequences, tokens, vocabulary, width, bias
    "tiny": (2, 16, 64, 32, False),  # for a rehearsal
    "llamagen-b": (2, 576, 16384, 768, False),
    "llamagen-3b": (32, 576, 16384, 3200, False),
    "var-d16": (32, 680, 4096, 1024, True),
    "var-d30": (32, 680, 4096, 1920, True),
}
CPU_SEQUENCES = {"tiny": 2, "llamagen-b": 2, "llamagen-3b": 1, "var-d16": 2, "var-d30": 2}
AT_ONCE = {"cpu": 1, "cuda": 6}  # processes that measure memory; a GPU's allocator counts its own only
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def inputs_of(shape: str, dtype: str, device: str, entry: str) -> dict:
    """Seeded random inputs of one case."""
    sequences, tokens, vocabulary, width, bias = SHAPES[shape]
    if device == "cpu":
        sequences = CPU_SEQUENCES[shape]
    torch.manual_seed(0)
    options = {"device": device, "dtype": DTYPES[dtype]}
    case = {"targets": torch.randint(vocabulary, (sequences, tokens), device=device)}
    if entry == "logits":
        return {**case, "logits": torch.randn(sequences, tokens, vocabulary, **options).requires_grad_()}
    case["hidden"] = torch.randn(sequences, tokens, width, **options).requires_grad_()
    case["weight"] = (torch.randn(vocabulary, width, **options) / width**0.5).requires_grad_()
    case["bias"] = torch.randn(vocabulary, **options).requires_grad_() if bias else None
    return case


def synchronize(device: str) -> None:
    """Wait for the GPU's queue; nothing on a CPU."""
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
    """Samples the resident set from a thread, 2,000 times a second."""

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


def measure_memory(shape: str, dtype: str, device: str, entry: str, name: str) -> float:
    """Peak MiB of one forward and backward beyond the inputs, after warm-up, with the gradients freed."""
    case = inputs_of(shape, dtype, device, entry)
    run = variants.make(entry, name, case)
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


def memory_in_own_process(arguments: argparse.Namespace, shape: str, dtype: str, entry: str, name: str) -> float | None:
    """`measure_memory` in a fresh process; None where it fails."""
    case = [shape, dtype, arguments.device, entry, name]
    command = [sys.executable, __file__, "--threads", str(arguments.threads), "--memory-of", *case]
    done = subprocess.run(command, capture_output=True, text=True)
    return float(done.stdout.split()[-1]) if done.returncode == 0 else None


def measure_case(arguments: argparse.Namespace, shape: str, dtype: str, entry: str) -> dict:
    """All variants of one shape, dtype and entry point."""
    torch.compiler.reset()  # torch.compile falls back to eager after eight shapes
    case = inputs_of(shape, dtype, arguments.device, entry)
    runs, left_out = {}, {}
    for name in variants.names(entry, arguments.device):
        try:
            run = variants.make(entry, name, case)
            run()
            runs[name] = run
        except Exception as error:  # the table lists what is missing or cannot run here
            left_out[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    variants.free_gradients(case)
    result = measure_times(runs, arguments.device, arguments.repeats)
    del runs
    measured = [name for name in result if name not in variants.WITHOUT_MEMORY]
    if shape == "tiny":
        measured = measured[:2]  # a rehearsal need not start, for every variant, a process that imports PyTorch
    with ThreadPoolExecutor(AT_ONCE[arguments.device]) as pool:
        found = pool.map(lambda name: memory_in_own_process(arguments, shape, dtype, entry, name), measured)
        for name, memory in zip(measured, found, strict=True):
            result[name]["memory_mib"] = memory
    tokens = list(case["targets"].shape)
    return {"shape": shape, "dtype": dtype, "entry": entry, "tokens": tokens, "variants": result, "left_out": left_out}


def table(report: dict) -> str:
    """The report as Markdown."""
    head = report["command"], report["date"], report["device"], report["commit"]
    lines = ["`{}`, {}, {}, commit {}".format(*head), ""]
    lines += [
        "| shape | dtype | entry | variant | ms (wall) | ms (thread) | MiB over inputs |",
        "|---|---|---|---|--:|--:|--:|",
    ]
    for case in report["cases"]:
        for name, found in case["variants"].items():
            memory = found.get("memory_mib")
            memory = "" if memory is None else f"{memory:.0f}"
            cells = case["shape"], case["dtype"], case["entry"], name
            numbers = f"{found['wall_ms']:.2f} | {found['thread_ms']:.2f} | {memory}"
            lines.append(f"| {' | '.join(cells)} | {numbers} |")
    for case in report["cases"]:
        for name, reason in case["left_out"].items():
            lines.append(f"\nLeft out: {case['shape']} {case['dtype']} {case['entry']} {name}: {reason}")
    return "\n".join([*lines, *targets.section(report)]) + "\n"


def describe_device(device: str) -> str:
    """The device's name; of a CPU with its vector instructions and threads."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    capability = torch.backends.cpu.get_cpu_capability()
    flags = Path("/proc/cpuinfo")
    amx = ", AMX" if flags.exists() and "amx_bf16" in flags.read_text() else ""
    return f"{processor()} ({capability}{amx}), {torch.get_num_threads()} thread(s)"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=[name for name in SHAPES if name != "tiny"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=None)
    parser.add_argument("--entries", nargs="+", choices=["logits", "linear"], default=["logits", "linear"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--report", type=Path, help="write the table of this JSON of an earlier run; measure nothing")
    parser.add_argument("--memory-of", nargs=5, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure; write the JSON and the table, and print the table."""
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
    command = "python benchmarks/speed/sequence_logp.py " + " ".join(sys.argv[1:])
    report = {
        **origin(command, describe_device(arguments.device)),
        "device_type": arguments.device,
        "torch": torch.__version__,
        "backend": backend(),
        "cases": [],
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    stem = arguments.output / f"sequence_logp-{arguments.device}-{today()}"
    for shape, dtype, entry in itertools.product(arguments.shapes, dtypes, arguments.entries):
        report["cases"].append(measure_case(arguments, shape, dtype, entry))
        print(f"{shape} {dtype} {entry} done", file=sys.stderr, flush=True)
        stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")  # kept if the rest is cut off
        stem.with_suffix(".md").write_text(table(report))
    print(table(report))


if __name__ == "__main__":
    main()
