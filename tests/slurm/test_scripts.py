"""The job scripts without a cluster: whole golden texts of what they ask of Slurm and run, and shellcheck.

Rewrite the golden texts after an intended change with: python -m tests.slurm.test_scripts
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.dist.ranks import REPOSITORY

SCRIPTS = sorted(path.name for path in (REPOSITORY / "slurm").glob("*.sh") if path.name != "common.sh")
GOLDEN = Path(__file__).parent / "golden"
ALWAYS = {"PATH": os.environ["PATH"], "CCA_HOME": ".", "CCA_PYTHON": "python", "CCA_DRY_RUN": "1"}
JOB = {"SLURM_JOB_ID": "42", "SLURM_CPUS_PER_TASK": "8", "SLURM_HET_SIZE": "3"}
USED = {
    "CCA_DATA": "data folder",
    "CCA_OUTPUT": "runs/out",
    "CCA_SET": "loss.lambda=30 batch.epochs=2",
    "CCA_WEIGHTS": "runs/trained",
    "CCA_REFERENCE": "reference.npz",
    "CCA_RECIPE": "mine.yaml",
    "CCA_SRUN": "--mpi=pmix",
    "NCCL_DEBUG": "INFO",
    "WORLD_SIZE": "1",  # of the shell that called sbatch
}


def directives(script: str) -> str:
    lines = (REPOSITORY / "slurm" / script).read_text().splitlines()
    return "".join(f"{line}\n" for line in lines if line.startswith("#SBATCH"))


def dry_run(script: str, environment: dict[str, str], *arguments: str, check: bool = True) -> str:
    name = next((line.split("=")[1] for line in directives(script).splitlines() if "job-name" in line), "")
    done = subprocess.run(
        ["bash", f"slurm/{script}", *arguments],
        cwd=REPOSITORY,
        env={**ALWAYS, **JOB, "SLURM_JOB_NAME": name, **environment},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert not check or done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def golden_text(script: str) -> str:
    least = {"CCA_WEIGHTS": "runs/trained"} if script == "sample_and_evaluate.sh" else {}
    return (
        directives(script)
        + "\n# by default\n"
        + dry_run(script, least)
        + "\n# with everything set, and two arguments\n"
        + dry_run(script, USED, "--further", "two words")
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_golden_text(script):
    assert golden_text(script) == (GOLDEN / f"{script}.txt").read_text()


def test_no_golden_text_without_script():
    assert sorted(path.name for path in GOLDEN.glob("*.txt")) == [f"{script}.txt" for script in SCRIPTS]


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck():
    command = ["shellcheck", "-x", "-P", ".", *(f"slurm/{script}" for script in [*SCRIPTS, "common.sh"])]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_can_be_requeued_and_is_warned_of_the_time_limit(script):
    components = directives(script).split("#SBATCH hetjob\n")
    assert all("#SBATCH --requeue\n" in component for component in components)
    assert "#SBATCH --signal=B:USR1@300\n" in components[0]
    assert "#SBATCH --open-mode=append\n" in components[0]  # a requeue keeps the log


def test_array_tasks_take_their_word_and_a_folder_of_their_own():
    sweep = {"CCA_SWEEP": "loss.lambda=10 loss.lambda=100", "SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": "1"}
    printed = dry_run("cca_3b.sh", {**sweep, "CCA_SET": "loss.beta=0.1"})
    assert " --output runs/cca-3b-40/loss.lambda=100 " in printed
    assert printed.endswith(" --set loss.lambda=100 loss.beta=0.1 \n")
    printed = dry_run("cca_3b.sh", {**sweep, "SLURM_ARRAY_TASK_ID": "2"}, check=False)
    assert "array task 2, but CCA_SWEEP has 2 words: use --array=0-1" in printed


def test_words_of_all_lines_are_taken():
    printed = dry_run(
        "cca_3b.sh", {"CCA_SET": "loss.beta=0.1\nbatch.epochs=2\n  seed=3\n", "CCA_SRUN": "--mpi=pmix\n-l"}
    )
    assert printed.endswith(" --set loss.beta=0.1 batch.epochs=2 seed=3 \n") and " --mpi=pmix -l " in printed
    sweep = {"CCA_SWEEP": "loss.lambda=1\nloss.lambda=2", "SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": "1"}
    assert " --output runs/cca-3b-40/loss.lambda=2 " in dry_run("cca_3b.sh", sweep)


@pytest.mark.parametrize("word", ["..", ".", "../x=1", "/x=1", "=1", "loss.lambda"])
def test_a_sweep_stays_in_its_folder(word):
    sweep = {"CCA_SWEEP": word, "SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": "0"}
    printed = dry_run("cca_3b.sh", sweep, check=False)
    assert f"CCA_SWEEP: {word} is not KEY.PATH=VALUE" in printed and "srun" not in printed


@pytest.mark.parametrize(
    ("content", "count"),
    [("2 nothing", 3), ("08 nothing", 9), ("PPID[$(touch touched)] nothing", 1), ("x nothing", 1), ("", 1),
     ("-5 nothing", 1), ("9999999 nothing", 1), ("2 step_1", 1)],
)  # fmt: skip
def test_the_counter_of_failures_is_read_as_a_number(tmp_path, content, count):
    (tmp_path / ".failures").write_text(f"{content}\n")
    code = (
        f". {REPOSITORY}/slurm/common.sh; state_folder=.; CCA_OUTPUT=.; progress_before=nothing; "
        'count_failures; echo "$attempts_without_progress"'
    )
    done = subprocess.run(["bash", "-c", code], cwd=tmp_path, env=ALWAYS, capture_output=True, text=True)
    assert done.stdout == f"{count}\n", done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [".failures"]


def test_a_script_outside_the_repository_says_what_to_do():
    printed = dry_run("cca_3b.sh", {"CCA_HOME": "tests"}, check=False)
    assert "tests/slurm/common.sh: No such file" in printed
    printed = subprocess.run(
        ["bash", "-c", ". slurm/common.sh; CCA_HOME=tests; begin a b"],
        cwd=REPOSITORY,
        env=ALWAYS,
        capture_output=True,
        text=True,
    )
    assert (printed.returncode, "call sbatch in the repository's root, or set CCA_HOME" in printed.stderr) == (2, True)


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name in SCRIPTS:
        (GOLDEN / f"{name}.txt").write_text(golden_text(name))
