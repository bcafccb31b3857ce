"""A run that a job script makes, watched from outside."""

import json
import os
import signal
from pathlib import Path

from tests.slurm.cluster import ENDED, Cluster

STEPS, EVERY = 8, 3
SETTINGS = (
    f"batch.max_steps={STEPS} checkpoint.every_steps={EVERY} data.workers=0 logging.sample_every_steps=null "
    "logging.tensorboard=false logging.progress=false"
)
ONE_RANK = ["--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1", "--mem=1000", "--time=60"]
START = 300.0  # seconds for a run to get going, on a machine with other things to do


class Run:
    """One run's folder, and the job that fills it."""

    def __init__(self, cluster: Cluster, folder: Path):
        folder.mkdir(exist_ok=True)
        self.cluster, self.folder, self.log = cluster, folder / "run", folder / "job.log"

    def submit(self, *flags: str, script: str = "slurm/cca_3b.sh", **environment: str) -> int:
        environment = {"CCA_RECIPE": "digits", "CCA_SET": SETTINGS, "CCA_OUTPUT": str(self.folder), **environment}
        self.job = self.cluster.submit(script, f"--output={self.log}", *flags, environment=environment)
        return self.job

    def steps(self) -> list[int]:
        lines = (self.folder / "metrics.jsonl").read_text().splitlines() if self.folder.exists() else []
        return [json.loads(line)["step"] for line in lines if line.endswith("}")]

    def reach(self, step: int) -> None:
        """Until the run has logged this step; its ranks are stopped then."""
        metrics = self.folder / "metrics.jsonl"
        self.until(lambda: metrics.exists() and max(self.steps(), default=0) >= step, f"step {step}")
        self.frozen = self.cluster.freeze(self.job)
        assert self.frozen

    def until(self, condition, what: str) -> None:
        def over() -> bool:
            return self.cluster.job_states(self.job) <= ENDED

        try:
            self.cluster.wait_for(lambda: condition() or over(), START, what, self.job)
            assert condition(), f"the job ended before {what}"
        except AssertionError as error:
            raise AssertionError(f"{self.output()}\n{error}") from None

    def go_on(self) -> None:
        for rank in self.frozen:
            os.kill(rank, signal.SIGCONT)

    def end(self) -> set[str]:
        try:
            return self.cluster.wait(self.job, START)
        except AssertionError as error:
            raise AssertionError(f"{self.output()}\n{error}") from None

    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else "no log"

    def final_loss(self) -> float:
        assert (self.folder / "COMPLETED").exists(), self.output()
        return json.loads((self.folder / "summary.json").read_text())["final"]["loss"]


def program(folder: Path, text: str) -> str:
    """A program in Python's place, which does nothing but end in a certain way."""
    path = folder / "python"
    path.parent.mkdir()
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)
