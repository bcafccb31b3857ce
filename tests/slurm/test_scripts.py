"""The job scripts without a cluster: whole golden texts of what they ask of Slurm and run, and shellcheck.

Rewrite the golden texts after an intended change with: python -m tests.slurm.test_scripts
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.dist.ranks import REPOSITORY

OTHERS = ("common.sh", "ddo.sh", "pipeline.sh")
SCRIPTS = sorted(path.name for path in (REPOSITORY / "slurm").glob("*.sh") if path.name not in OTHERS)
GOLDEN = Path(__file__).parent / "golden"
ALWAYS = {"PATH": os.environ["PATH"], "CCA_HOME": ".", "CCA_PYTHON": "python", "CCA_DRY_RUN": "1"}
JOB = {"SLURM_JOB_ID": "42", "SLURM_CPUS_PER_TASK": "8"}
USED = {
    "CCA_DATA": "data folder",
    "CCA_OUTPUT": "runs/out",
    "CCA_SET": "loss.lambda=30 batch.epochs=2",
    "CCA_WEIGHTS": "runs/trained",
    "CCA_REFERENCE": "reference.npz",
    "CCA_RESIZE": "256",
    "CCA_RECIPE": "mine.yaml",
    "CCA_SRUN": "--mpi=pmix",
    "NCCL_DEBUG": "INFO",
    "WORLD_SIZE": "1",  # of the shell that called sbatch
}


def directives(script: str) -> str:
    lines = (REPOSITORY / "slurm" / script).read_text().splitlines()
    return "".join(f"{line}\n" for line in lines if line.startswith("#SBATCH"))


def dry_run(script: str, environment: dict[str, str], *arguments: str, check: bool = True) -> str:
    name = next((line.split("=")[1].split()[0] for line in directives(script).splitlines() if "job-name" in line), "")
    components = {"SLURM_HET_SIZE": "3"} if script == "mixed.sh" else {}
    done = subprocess.run(
        ["bash", f"slurm/{script}", *arguments],
        cwd=REPOSITORY,
        env={**ALWAYS, **JOB, **components, "SLURM_JOB_NAME": name, **environment},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert not check or done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def golden_text(script: str) -> str:
    least = {"sample_and_evaluate.sh": {"CCA_WEIGHTS": "runs/trained"}, "choose.sh": {"CCA_OUTPUT": "runs/round1"}}
    return (
        directives(script)
        + "\n# by default\n"
        + dry_run(script, least.get(script, {}))
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
    command = ["shellcheck", "-x", "-P", ".", *(f"slurm/{script}" for script in [*SCRIPTS, *OTHERS])]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_can_be_requeued_and_is_warned_of_the_time_limit(script):
    components = directives(script).split("#SBATCH hetjob\n")
    assert all(" --requeue" in component for component in components)
    assert " --signal=B:USR1@300" in components[0]
    assert " --open-mode=append" in components[0]  # a requeue keeps the log


def test_an_administrator_can_read_them_all():
    texts = [(REPOSITORY / "slurm" / name).read_text() for name in (*OTHERS, *SCRIPTS)]
    assert sum(len(text.splitlines()) for text in texts) < 620
    assert max(len(line) for text in texts for line in text.splitlines()) <= 120


def test_array_tasks_take_their_word_and_a_folder_of_their_own():
    sweep = {"CCA_SWEEP": "loss.lambda=10 loss.lambda=100", "SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": "1"}
    printed = dry_run("cca_3b.sh", {**sweep, "CCA_SET": "loss.beta=0.1"})
    assert " --output runs/cca-3b-40/loss.lambda=100 " in printed
    assert printed.endswith(" --set loss.lambda=100 loss.beta=0.1 \n")
    printed = dry_run("cca_3b.sh", {**sweep, "SLURM_ARRAY_TASK_ID": "2"}, check=False)
    assert "array task 2, but CCA_SWEEP has 2: use --array=0-1" in printed
    printed = dry_run("cca_3b.sh", {**sweep, "CCA_SWEEP": ""}, check=False)
    assert "a job array without CCA_SWEEP" in printed and "srun" not in printed


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


def test_values_may_hold_spaces_and_newlines():
    value = "model.overrides={dim: 64,\n  n_layer: 2}"
    printed = dry_run("cca_3b.sh", {"CCA_SET": f"loss.beta=0.1  {value}\n batch.epochs=2"})
    assert printed.endswith(" --set loss.beta=0.1 $'model.overrides={dim: 64,\\n  n_layer: 2}' batch.epochs=2 \n")
    printed = dry_run("cca_3b.sh", {"CCA_SET": "loss.beta 0.1 seed=1"}, check=False)
    assert "CCA_SET: loss.beta 0.1 is not KEY.PATH=VALUE" in printed and "srun" not in printed


def test_a_script_outside_the_repository_says_what_to_do():
    printed = dry_run("cca_3b.sh", {"CCA_HOME": "tests"}, check=False)
    assert printed.splitlines()[-1] == "call sbatch in the repository's root, or set CCA_HOME"
    printed = subprocess.run(
        ["bash", "-c", ". slurm/common.sh; CCA_HOME=tests; begin a b"],
        cwd=REPOSITORY,
        env=ALWAYS,
        capture_output=True,
        text=True,
    )
    assert (printed.returncode, "call sbatch in the repository's root, or set CCA_HOME" in printed.stderr) == (2, True)


def test_one_component_only():
    printed = dry_run("cca_3b.sh", {"SLURM_HET_SIZE": "2"}, check=False)
    assert "runs on one component, the job has 2: submit it without ':', or slurm/mixed.sh" in printed
    assert "srun" not in printed
    assert "not a heterogeneous job" in dry_run("mixed.sh", {"SLURM_HET_SIZE": "1"}, check=False)


def test_ranks_get_what_they_need_and_nothing_of_the_submitting_shell():
    leaked = {"SLURM_EXPORT_ENV": "CCA_DATA", "MASTER_ADDR": "login", "MASTER_PORT": "1", "RANK": "0"}
    printed = subprocess.run(
        ["bash", "-c", ". slurm/common.sh; begin a b; env"],
        cwd=REPOSITORY, env=ALWAYS | JOB | leaked | {"SLURM_GPUS_PER_NODE": "8"}, capture_output=True, text=True,
    ).stdout.splitlines()  # fmt: skip
    names = {line.partition("=")[0] for line in printed}
    assert "SLURM_EXPORT_ENV=ALL" in printed and "NCCL_IB_TIMEOUT=22" in printed
    assert not names & {"MASTER_ADDR", "MASTER_PORT", "RANK", "SLURM_GPUS_PER_NODE"}


def test_a_sites_file_keeps_its_options_to_itself(tmp_path):
    (tmp_path / "site").write_text('set -e\nset -o pipefail\n: "$not_set"\nexport SITE=here\n')
    code = '. slurm/common.sh; before=$(set +o); begin a b; [ "$before" = "$(set +o)" ] && echo "same $SITE"'
    done = subprocess.run(
        ["bash", "-c", code], cwd=REPOSITORY, env=ALWAYS | JOB | {"CCA_SETUP": str(tmp_path / "site")},
        capture_output=True, text=True,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("same here\n", "")
    (tmp_path / "site").write_text("module load nothing-of-that-name\n")
    printed = dry_run("cca_3b.sh", {"CCA_SETUP": str(tmp_path / "site")}, check=False)
    assert f"CCA_SETUP={tmp_path / 'site'} failed" in printed and "srun" not in printed


def test_a_missing_interpreter_is_said_before_anything_starts(tmp_path):
    printed = dry_run("cca_3b.sh", {"CCA_PYTHON": "no-such-python", "CCA_DRY_RUN": ""}, check=False)
    assert "no interpreter no-such-python here: run make install" in printed


def test_the_pipeline_submits_a_chain(tmp_path):
    """By a stand-in that notes what it was called with."""
    record = 'n=$(cat "$COUNT" 2>/dev/null || echo 40); echo $((n + 1)) > "$COUNT"; echo "$n;cluster"\n'
    (tmp_path / "sbatch").write_text(f'#!/bin/bash\necho "$CCA_DATA|$CCA_OUTPUT|$CCA_WEIGHTS|$*" >> "$CALLS"\n{record}')
    (tmp_path / "sbatch").chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls"), "COUNT": str(tmp_path / "n"),
        "CCA_DATA": "my images", "CCA_OUTPUT": str(tmp_path / "out"),
    }  # fmt: skip
    command = ["bash", str(REPOSITORY / "slurm/pipeline.sh"), "--partition=gpu"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    scripts = REPOSITORY / "slurm"
    after = f"--parsable --dependency=afterok:{{}} --kill-on-invalid-dep=yes --partition=gpu {scripts}/{{}}"
    assert (tmp_path / "calls").read_text().splitlines() == [
        f"my images|{out}/codes||--parsable --partition=gpu {scripts}/encode.sh",
        f"{out}/codes|{out}/run||{after.format(40, 'cca_3b.sh')}",
        f"my images|{out}/scores|{out}/run|{after.format(41, 'sample_and_evaluate.sh')}",
    ]
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["40", "41", "42", "scancel"]
    (tmp_path / "calls").unlink()
    (tmp_path / "sbatch").write_text('#!/bin/bash\necho "$*" >> "$CALLS"\necho "no such partition" >&2\nexit 1\n')
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "no such partition" in done.stderr and done.stdout == ""
    assert len((tmp_path / "calls").read_text().splitlines()) == 1  # those behind it would start at once
    done = subprocess.run(command, cwd=tmp_path, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True)
    assert done.returncode != 0 and "CCA_DATA: name the folder of images" in done.stderr


def test_the_rounds_of_ddo_submit_a_chain(tmp_path):
    """Each round draws from what the one before chose, trains against that, and chooses."""
    record = 'n=$(cat "$COUNT" 2>/dev/null || echo 40); echo $((n + 1)) > "$COUNT"; echo "$n"\n'
    noted = 'echo "$CCA_OUTPUT|$CCA_WEIGHTS|$CCA_SET|$*" >> "$CALLS"\n'
    (tmp_path / "sbatch").write_text(f"#!/bin/bash\n{noted}{record}")
    (tmp_path / "sbatch").chmod(0o755)
    out, scripts = tmp_path / "out", REPOSITORY / "slurm"
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls"), "COUNT": str(tmp_path / "n"),
        "CCA_RECIPE": "var-d16-ddo", "CCA_WEIGHTS": "base.pth", "CCA_OUTPUT": str(out), "CCA_SET": "seed=3",
    }  # fmt: skip
    command = ["bash", str(scripts / "ddo.sh"), "--partition=gpu"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected, weights, job = [], "base.pth", 40
    for seed, folder in ((1001, out / "round1"), (1002, out / "round2")):
        for script, output, settings in (
            (
                "draw_codes.sh",
                folder / "generated",
                f"data.generated={folder}/generated sampling.images_per_class=1300 sampling.seed={seed} seed=3",
            ),
            ("cca_var_d30.sh", folder / "run", f"model.weights={weights} data.generated={folder}/generated seed=3"),
            ("choose.sh", folder, "sampling.images_per_class=5 seed=3"),
        ):
            of_script = weights if script == "draw_codes.sh" else "base.pth"  # only drawing reads CCA_WEIGHTS
            after = f"--dependency=afterok:{job - 1} --kill-on-invalid-dep=yes " if job > 40 else ""
            flags = f"--parsable {after}--partition=gpu {scripts}/{script}"
            expected.append(f"{output}|{of_script}|{settings}|{flags}")
            job += 1
        weights = f"{folder}/best.safetensors"
    assert (tmp_path / "calls").read_text().splitlines() == expected
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["40", "41", "42", "43", "44", "45", "scancel"]
    for missing in ("CCA_RECIPE", "CCA_WEIGHTS", "CCA_OUTPUT"):
        left = {name: value for name, value in environment.items() if name != missing}
        done = subprocess.run(command, cwd=tmp_path, env=left, capture_output=True, text=True)
        assert done.returncode != 0 and f"{missing}: name the" in done.stderr
    wrong = subprocess.run(
        command, cwd=tmp_path, env=environment | {"CCA_TRAIN": "x.sh"}, capture_output=True, text=True
    )
    assert wrong.returncode == 2 and "CCA_TRAIN=x.sh: no such script in slurm/" in wrong.stderr
    wrong = subprocess.run(
        command, cwd=tmp_path, env=environment | {"CCA_ROUNDS": "two"}, capture_output=True, text=True
    )
    assert (wrong.returncode, wrong.stderr) == (2, "CCA_ROUNDS=two: give a number from 1 to 99\n")
    assert len((tmp_path / "calls").read_text().splitlines()) == len(expected)
    (tmp_path / "sbatch").write_text('#!/bin/bash\necho "$*" >> "$CALLS"\necho "no such partition" >&2\nexit 1\n')
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "no such partition" in done.stderr
    assert len((tmp_path / "calls").read_text().splitlines()) == len(expected) + 1  # those behind it are not submitted


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name in SCRIPTS:
        (GOLDEN / f"{name}.txt").write_text(golden_text(name))
