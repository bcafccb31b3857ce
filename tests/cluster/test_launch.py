"""Ranks from each launcher's variables, and the errors of wrong ones."""

import pytest

from cca_ds.cluster.launch import LaunchError, expand_counts, expand_hosts, find_ranks, slurm_master
from tests.support.launcher_environments import DEEPSPEED, HETEROGENEOUS, HYDRA, OPEN_MPI, SRUN, TORCH, TORCHRUN


def place(environ, cuda_devices=0):
    ranks = find_ranks(environ, cuda_devices)
    return (ranks.launcher, ranks.rank, ranks.world_size, ranks.local_rank, ranks.local_world_size, ranks.node_rank)


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
    assert find_ranks(OPEN_MPI, 0).master_address is None  # rank 0 broadcasts it through MPI


def test_master_of_a_heterogeneous_job_is_not_the_first_name_of_the_list():
    assert expand_hosts(HETEROGENEOUS["SLURM_STEP_NODELIST"])[0] == "a100"
    assert slurm_master(HETEROGENEOUS) == "h100"
    # a step of the third component alone has its master there
    assert slurm_master({**HETEROGENEOUS, "SLURM_STEP_NODELIST": "a40"}) == "a40"
    # a step on a part of the first component's nodes
    part = {**HETEROGENEOUS, "SLURM_JOB_NODELIST_HET_GROUP_0": "h[100-103]", "SLURM_STEP_NODELIST": "a40,h[102-103]"}
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
        ({**TORCHRUN, "MASTER_PORT": "0"}, "MASTER_PORT=0 is no port"),
        ({**TORCHRUN, "MASTER_PORT": "70000"}, "MASTER_PORT=70000 is no port"),
        ({**TORCHRUN, "MASTER_PORT": "abc"}, "MASTER_PORT='abc' is not a whole number"),
        ({**TORCHRUN, "RANK": "4"}, "rank 4 is not in 0 to 3"),
        ({**TORCHRUN, "LOCAL_RANK": "2"}, "local rank 2 of 2"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "5"}, "local rank 1 of 5"),
        # RANK=0 WORLD_SIZE=1 exported by a batch script: ten worlds of one
        (
            {**SRUN, **TORCH, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"},
            "RANK=0 and WORLD_SIZE=1 contradict SLURM_PROCID=9 and SLURM_NTASKS=10",
        ),
        ({**OPEN_MPI, **TORCH, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}, "contradict OMPI_COMM_WORLD_RANK"),
        ({"SLURM_JOB_ID": "77", "SLURM_PROCID": "0", "SLURM_NTASKS": "16"}, "not started by srun: put `srun`"),
        ({"SLURM_JOB_ID": "77"}, "not started by srun"),
        ({**SRUN, "SLURM_STEP_ID": str(0xFFFFFFFA)}, "not started by srun"),  # an interactive step's shell
        ({**SRUN, "SLURM_NTASKS": ""}, "SLURM_NTASKS missing"),
        ({**SRUN, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, "SLURM_STEP_NUM_TASKS=10 contradicts"),
        ({**SRUN, "PMIX_RANK": "0"}, "PMIX_RANK=0 contradicts srun's SLURM_PROCID=9"),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}, "has no node SLURM_NODEID=2"),
        ({**SRUN, "SLURM_STEP_NODELIST": "gpu[08-"}, "is not a Slurm node list"),
        ({**HETEROGENEOUS, "SLURM_GTIDS": "0,1"}, "not among this node's SLURM_GTIDS=0,1"),
        ({**SRUN, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURMD_NODENAME": "gpu10"}, "rank 0 runs on gpu10"),
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
    optional = {"TORCHELASTIC_RUN_ID", "CROSS_SIZE", "SLURM_STEP_NUM_TASKS", "SLURMD_NODENAME", "SLURM_HET_SIZE"}
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
