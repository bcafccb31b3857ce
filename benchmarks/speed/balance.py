"""python benchmarks/speed/balance.py --date 2026-11-20

Two ranks, one slowed 3:1 on purpose: images per second of two equal ranks (T), of the slowed pair under an even
partition, and under a partition by measured speeds, whose ideal is T (1 + 1/3) / 2.

All three are whole runs of `cca_ds/train.py` under ZeRO-3, started by `tests/support/slowed_train.py`, that differ in
`balance.mode` and in how long a rank sleeps. So that the numbers depend on the partition and not on other load of the
machine, a pair's time is mostly sleep of a known length and the model is small: one such sleep a pair on a rank of full
speed, three on the slowed one. The model's own computing, the collectives and the optimizer come on top. Runs are
interleaved, and the median step counts.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from provenance import REPOSITORY, RESULTS, cpu, origin

SECONDS_PER_PAIR = 0.3  # slept on a rank of full speed; maximum likelihood has one row a pair
PAIRS, MICRO_SIZE, STEPS = 16, 6, 6
SETTINGS = [
    f"batch.max_steps={STEPS}", f"batch.global_size={PAIRS}", f"batch.micro_size={MICRO_SIZE}", "loss.name=mle",
    "model.weights=null", "model.from_scratch=true", "model.overrides={n_layer: 1, dim: 32}",
    "precision=fp32", "baseline.check=false", "logging.sample_every_steps=null", "logging.tensorboard=false",
    "data.workers=0", "checkpoint.every_steps=1000000",
]  # fmt: skip
EQUAL_RANKS, UNEQUAL_RANKS = (1, 1), (1, 3)  # sleeps a pair, by rank
RUNS = {
    "equal ranks, even partition": ("even", EQUAL_RANKS),
    "one slowed 3:1, even partition": ("even", UNEQUAL_RANKS),
    "one slowed 3:1, measured partition": ("measured", UNEQUAL_RANKS),
}
EQUAL, EVEN, BALANCED = RUNS


def train(mode: str, sleeps: tuple[int, int], folder: Path) -> tuple[list[float], str]:
    """Seconds of every step but the first, and the assignment that the run logged.

    Args:
        mode: `balance.mode`.
        sleeps: of SECONDS_PER_PAIR, for every pair of each rank.
        folder: of the run.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["tests/support/slowed_train.py", "--ds_config", "ds_configs/zero3.json", "--output", str(folder)]
    slept = ",".join(str(SECONDS_PER_PAIR * sleep) for sleep in sleeps)
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "SLOWED_ROW_SECONDS": slept}
    done = subprocess.run(
        [*command, "--set", *SETTINGS, f"balance.mode={mode}"],
        cwd=REPOSITORY,
        env=environ,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assignment = re.search(r"forwards \d+; pairs of [^;\n]*", done.stderr)
    assert assignment and len(lines) == STEPS
    return [PAIRS / line["throughput/images_per_second"] for line in lines[1:]], assignment[0]


def measure(rounds: int) -> dict[str, dict]:
    """Every run's steps over all rounds, interleaved."""
    found = {name: {"step_seconds": [], "assignment": ""} for name in RUNS}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            for index, (name, (mode, sleeps)) in enumerate(RUNS.items()):
                seconds, assignment = train(mode, sleeps, Path(folder) / f"{number}_{index}")
                found[name]["step_seconds"] += [round(second, 4) for second in seconds]
                found[name]["assignment"] = assignment
                print(f"round {number + 1}, {name}: {PAIRS / statistics.median(seconds):.2f} images/s, {assignment}")
    for entry in found.values():
        entry["images_per_second"] = round(PAIRS / statistics.median(entry["step_seconds"]), 3)
    return found


def compare(runs: dict[str, dict]) -> dict[str, float]:
    """T, the ideal of unequal ranks, and how near to it both partitions come."""
    full, even, balanced = (runs[name]["images_per_second"] for name in (EQUAL, EVEN, BALANCED))
    ideal = full * (1 + 1 / 3) / 2
    return {
        "T": full,
        "ideal": round(ideal, 3),
        "balanced_over_ideal": round(balanced / ideal, 3),
        "even_over_T": round(even / full, 3),
    }


def table(report: dict) -> str:
    """The report as Markdown."""
    found = report["result"]
    parts = {
        EQUAL: "T",
        EVEN: f"{found['even_over_T']:.2f} T",
        BALANCED: f"{found['balanced_over_ideal']:.2f} of the ideal",
    }
    rows = [
        f"| {name} | {entry['assignment']} | {entry['images_per_second']:.2f} | {parts[name]} |"
        for name, entry in report["runs"].items()
    ]
    head = ["| two ranks | assignment | images/s | |", "| --- | --- | --- | --- |"]
    ideal = f"| ideal of 1 + 1/3 ranks | | {found['ideal']:.2f} | T (1 + 1/3) / 2 |"
    summary = (
        f"{report['date']}, {report['device']}, load {report['load']}, commit {report['commit']}, "
        f"`{report['command']}`. {report['note']}"
    )
    return "\n".join([*head, *rows, ideal, "", summary, ""])


def main() -> None:
    """Measure, and write results/balance.json and .md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--date", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    runs = measure(arguments.rounds)
    command = f"python benchmarks/speed/balance.py --date {arguments.date} --rounds {arguments.rounds}"
    report = {
        **origin(command, f"CPU: {cpu()}", arguments.date),
        "load": round(os.getloadavg()[0], 1),
        "note": (
            f"Most of a pair's time is sleep: {SECONDS_PER_PAIR:g} s on a rank of full speed, "
            f"{3 * SECONDS_PER_PAIR:g} s on the slowed one. The small model's computing and the collectives, the same "
            "in all runs, come on top, on a shared machine; they bring the slowed runs nearer to T than sleep alone "
            f"would. Median of {len(runs[EQUAL]['step_seconds'])} steps each, runs interleaved."
        ),
        "runs": runs,
        "result": compare(runs),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "balance.json").write_text(json.dumps(report, indent=1) + "\n")
    (RESULTS / "balance.md").write_text(table(report))
    print(table(report))


if __name__ == "__main__":
    main()
