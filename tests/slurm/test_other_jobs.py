"""Heterogeneous jobs, the scripts that do not train, what counts as an end, and ranks under srun."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from safetensors.torch import save_file

from cca_ds.data.manifest import read_manifest
from cca_ds.models import read_weights
from tests.dist.hellos import hellos
from tests.dist.ranks import REPOSITORY
from tests.slurm.runs import ONE_RANK, SETTINGS, STEPS, Run, program
from tests.support.digits_table import digits_table

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def three_components() -> list[str]:
    """sbatch's flags: trainers on h100 and a100, a producer on a40, one rank each."""
    kinds = ("h100", "a100", "a40")
    components = [["--nodes=1", f"--gpus-per-node={kind}:1", f"--constraint={kind}"] for kind in kinds]
    one_rank = [flag for flag in ONE_RANK if not flag.startswith("--gpus")]
    return [flag for component in components for flag in (*component, *one_rank, ":")][:-1]


def test_heterogeneous_job_with_streamed_reference(run, undisturbed):
    job = run.submit(*three_components(), script="slurm/mixed.sh")
    run.until(lambda: run.cluster.ranks_of(job, "--produce_reference"), "the producer")
    for producer in run.cluster.ranks_of(job, "--produce_reference"):
        os.kill(producer, signal.SIGKILL)  # before it wrote anything: another takes its place
    assert run.end() == {"COMPLETED"}, run.output()
    assert "the producers ended with status 137; starting them again" in run.output()
    assert run.steps() == list(range(1, STEPS + 1))
    assert json.loads((run.folder / "summary.json").read_text())["ranks"] == 2
    assert run.final_loss() == pytest.approx(undisturbed.final_loss(), abs=1e-5)


def test_producers_draw_the_images_of_an_online_round(run):
    """DDO on a mixed cluster: the a40 draws the generated images, h100 and a100 train against them."""
    settings = f"{SETTINGS} loss.name=ddo data.generated=online model.dropout=false reference.ahead_steps=16"
    run.submit(*three_components(), script="slurm/mixed.sh", CCA_SET=settings)
    assert run.end() == {"COMPLETED"}, run.output()
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert all(line["reference/wait_seconds"] < 600 and line["reference/age_seconds"] < 600 for line in lines)
    assert all(line["reference/steps_ahead"] <= 16 + 1 for line in lines)  # a file of one step beyond the bound
    shards = [pyarrow.ipc.open_file(path).read_all() for path in sorted((run.folder / "reference").glob("*.arrow"))]
    assert len(shards) == STEPS and all(shard.num_rows == 32 for shard in shards)
    codes = np.concatenate([shard["generated"].combine_chunks().flatten().to_numpy() for shard in shards])
    assert len(np.unique(codes)) > 8  # drawn, not filled in


def test_cache_of_the_reference_encoding_and_evaluation(run, cluster, tmp_path, undisturbed):
    """The scripts that do not train: each to its mark, on two ranks."""
    two = ["--nodes=1", *ONE_RANK, "--ntasks-per-node=2", "--mem=2000"]
    cache = Run(cluster, tmp_path / "cache")
    cache.submit(*two, script="slurm/cache_reference.sh")
    sampled = Run(cluster, tmp_path / "sampled")
    sampled.submit(
        *two,
        script="slurm/sample_and_evaluate.sh",
        CCA_RECIPE=str(undisturbed.folder / "config.yaml"),
        CCA_WEIGHTS=str(undisturbed.folder),
        CCA_SET="sampling.images_per_class=8",
    )
    encoded = Run(cluster, tmp_path / "encoded")
    encoded.submit(*two, script="slurm/encode.sh", CCA_DATA=str(digits_as_images(tmp_path / "images")), CCA_SET="")
    for job in (cache, sampled, encoded):
        assert job.end() == {"COMPLETED"}, job.output()
        assert "done: " in job.output()
    assert json.loads((cache.folder / "COMPLETED").read_text()) == {"steps": STEPS}
    assert json.loads((sampled.folder / "scores.json").read_text())
    assert json.loads((encoded.folder / "manifest.json").read_text())["images"] == 40


def test_codes_staged_on_each_nodes_own_disk(run, tmp_path, undisturbed):
    """By a site's file, which may call srun and set variables; /dev/shm is each node's own."""
    codes = digits_table(tmp_path / "shared").folder
    setup = tmp_path / "site.sh"
    setup.write_text(f"srun --ntasks-per-node=1 cp -r {codes} /dev/shm/codes\nCCA_DATA=/dev/shm/codes\n")
    run.submit("--nodes=2", *ONE_RANK, CCA_SETUP=str(setup))
    assert run.end() == {"COMPLETED"}, run.output()
    assert "codes: /dev/shm/codes" in (run.folder / "config.yaml").read_text() and not Path("/dev/shm/codes").exists()
    assert run.final_loss() == pytest.approx(undisturbed.final_loss(), abs=1e-5)


def test_the_pipeline_to_its_scores(cluster, tmp_path):
    """From images to scores by one command, on two ranks."""
    two = ["--nodes=1", *ONE_RANK, "--ntasks-per-node=2", "--mem=2000", f"--output={tmp_path}/%x.log"]
    settings = "batch.max_steps=1 sampling.images_per_class=2 data.workers=0 logging.progress=false"
    environment = {
        "CCA_RECIPE": "digits", "CCA_DATA": str(digits_as_images(tmp_path / "images")), "CCA_SET": settings,
        "CCA_OUTPUT": str(tmp_path / "out"),
    }  # fmt: skip
    printed = cluster.run(["bash", "slurm/pipeline.sh", *two], environment)
    jobs = [int(line.split()[0]) for line in printed.splitlines()[:3]]
    state = cluster.wait(jobs[-1], 300)
    assert state == {"COMPLETED"}, "".join(path.read_text() for path in tmp_path.glob("*.log"))
    assert json.loads((tmp_path / "out/codes/manifest.json").read_text())["images"] == 40
    assert json.loads((tmp_path / "out/scores/scores.json").read_text())


def test_two_rounds_of_ddo_to_their_table(cluster, tmp_path):
    """Drawn, trained, scored and chosen twice by one command, on two ranks; then again, with one choice left.

    From weights with so much noise in them that two steps lower FID.
    """
    base = read_weights(REPOSITORY / "cca_ds/assets/digits_base.safetensors")
    draw = torch.Generator().manual_seed(0)
    noisy = {
        name: value.float() + value.float().std() * torch.randn(value.shape, generator=draw) * (value.ndim > 1)
        for name, value in base.items()
    }
    save_file(noisy, tmp_path / "noisy.safetensors")
    two = ["--nodes=1", *ONE_RANK, "--ntasks-per-node=2", "--mem=2000", f"--output={tmp_path}/%x-%j.log"]
    settings = (
        "loss.name=ddo model.dropout=false batch.max_steps=2 checkpoint.every_steps=1 checkpoint.keep_every=1 "
        "optimizer.learning_rate=1e-4 loss.lambda=1 data.workers=0 logging.progress=false"
    )
    environment = {
        "CCA_RECIPE": "digits", "CCA_WEIGHTS": str(tmp_path / "noisy.safetensors"),
        "CCA_OUTPUT": str(tmp_path / "out"), "CCA_SET": settings, "CCA_DRAWN": "4", "CCA_SCORED": "3",
    }  # fmt: skip
    printed = cluster.run(["bash", "slurm/ddo.sh", *two], environment)
    jobs = [int(line.split()[0]) for line in printed.splitlines()[:6]]
    state = cluster.wait(jobs[-1], 400)
    assert state == {"COMPLETED"}, "".join(path.read_text() for path in tmp_path.glob("*.log"))
    table = (tmp_path / "out/rounds.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert [row[:2] for row in rows] == [[f"round{number}", str(step)] for number in (1, 2) for step in (0, 1, 2)]
    assert [row[5] for row in rows].count("chosen") == 2 and not rows[0][5] and not rows[3][5]
    (chosen,) = (row for row in rows[:3] if row[5])
    assert chosen[2:4] == rows[3][2:4]  # the second round starts from it
    first, second = (read_manifest(tmp_path / f"out/round{number}/generated") for number in (1, 2))
    assert (first.images, first.drawn["seed"], second.drawn["seed"]) == (40, 1001, 1002)
    assert first.drawn["weights_sha256"] != second.drawn["weights_sha256"]
    scores = sorted((tmp_path / "out/round2/scores").glob("*/scores.json"))
    made = [path.stat().st_mtime_ns for path in scores]
    (tmp_path / "out/round2/chosen.json").unlink()  # as if killed just before the end: only the choice is made again
    again = cluster.run(["bash", "slurm/ddo.sh", *two], environment)
    assert cluster.wait(int(again.splitlines()[5].split()[0]), 200) == {"COMPLETED"}
    assert (tmp_path / "out/rounds.md").read_text() == table
    assert [path.stat().st_mtime_ns for path in scores] == made and len(made) == 3


def test_only_the_mark_is_an_end(cluster, tmp_path):
    """A job is requeued though srun says 0, a heterogeneous one as a whole; a fault that always returns ends it."""
    faulty, unmarked, mixed = (Run(cluster, tmp_path / name) for name in ("faulty", "unmarked", "mixed"))
    always_7 = program(tmp_path / "a", "exit 7")
    faulty.submit("--nodes=1", *ONE_RANK, CCA_PYTHON=always_7, CCA_ATTEMPTS="2")
    for run, flags, script in (
        (unmarked, ["--nodes=1", *ONE_RANK], "slurm/cca_3b.sh"),
        (mixed, three_components(), "slurm/mixed.sh"),
    ):
        done = f"{{ mkdir -p {run.folder}; touch {run.folder}/COMPLETED; }}"
        at_second = f'[ "$SLURM_RESTART_COUNT" != 1 ] || {done}'
        run.submit(*flags, script=script, CCA_PYTHON=program(tmp_path / script.replace("/", "-"), at_second))
    for run in (unmarked, mixed):
        assert run.end() == {"COMPLETED"}, run.output()
        assert cluster.job(run.job)["Restarts"] == "1"
        assert "ended with status 0 but without" in run.output()
    assert faulty.end() == {"FAILED"}, faulty.output()
    assert cluster.job(faulty.job)["Restarts"] == "1"
    assert "ended with status 7 but without" in faulty.output()
    assert "giving up: 2 attempts without a new checkpoint, the last with status 7" in faulty.output()


STEPS_OF_ALL_COMPONENTS = """#!/bin/bash
srun --het-group=0,1,2 {python} tests/dist/hello.py
echo PMIX
srun --mpi=pmix --het-group=0,1,2 {python} tests/dist/hello.py
"""


def test_ranks_of_a_heterogeneous_step(run, tmp_path):
    """Plain srun, and srun --mpi=pmix. The master is on the first component's node, not on the list's first."""
    script = tmp_path / "step.sh"
    script.write_text(STEPS_OF_ALL_COMPONENTS.format(python=run.cluster.python))
    tasks = {"h100": 1, "a100": 2, "a40": 1}
    components = [["--nodes=1", f"--ntasks={n}", "--mem=1000", "-w", node, ":"] for node, n in tasks.items()]
    run.submit(*[flag for component in components for flag in component][:-1], script=str(script))
    run.end()
    plain, _, pmix = run.output().partition("PMIX\n")
    for text in (plain, pmix):
        if "can not load PMIx" in text:
            pytest.skip("plain srun works, but Slurm cannot load PMIx: apt-get install libpmix-dev")
        printed = hellos(text)
        assert [(h["host"], h["rank"], h["local_rank"], h["local_world_size"]) for h in printed] == [
            ("h100", 0, 0, 1),
            ("a100", 1, 0, 2),
            ("a100", 2, 1, 2),
            ("a40", 3, 0, 1),
        ], run.output()
        assert {(h["launcher"], h["master_address"], h["total"]) for h in printed} == {("slurm", "h100", 15.0)}


def digits_as_images(folder: Path) -> Path:
    """Forty digits as an image folder of ImageNet's layout."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for i in range(40):
        path = folder / str(digits.target[i]) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digits.images[i] * 255 / 16).round().astype("uint8")).save(path)
    return folder
