"""Ranks that differ or do not answer are refused before the first step, with rank and host named."""

import json
import socket

import pytest

from cca_ds.cluster.launch import LaunchError, find_ranks
from cca_ds.cluster.preflight import NodeFault, compare, describe
from tests.dist.fork_server import ForkedRanks
from tests.dist.ranks import run_ranks

HOST = socket.gethostname()
HOSTS = ["h100-1", "h100-1", "a40-7"]


def reports(**changes):
    """Three ranks on two hosts that agree, but for `changes`: name -> (rank, value)."""
    made = []
    for rank, host in enumerate(HOSTS):
        same = {"the version of torch": "2.13.0", "the configuration": "3f1c"}
        host_same = {"devices of the host": "H100, H100" if rank < 2 else "A40"}
        made.append(
            {
                "rank": rank,
                "host": host,
                "commit": "abc",
                "device_id": f"GPU-{rank}",
                "same": same,
                "host_same": host_same,
            }
        )
    for name, (rank, value) in changes.items():
        if name == "device_id":
            made[rank]["device_id"] = value
        else:
            part = "host_same" if name in made[rank]["host_same"] else "same"
            made[rank][part][name] = value
    return made


def test_equal_ranks_pass_whatever_their_hosts_devices():
    compare(reports())


@pytest.mark.parametrize(
    ("name", "rank", "value", "line"),
    [
        ("the version of torch", 2, "2.11.0", "differs: rank 2 on a40-7 has 2.11.0; the others have 2.13.0"),
        ("the configuration", 0, "77aa", "differs: rank 0 on h100-1 has 77aa; the others have 3f1c"),
        # with no majority, the others are compared with rank 0
        ("devices of the host", 1, "H100", "differs: rank 1 on h100-1 has H100; the others have H100, H100"),
        ("the data manifest", 1, "9b2e", "differs: rank 1 on h100-1 has 9b2e; the others have nothing"),
    ],
)
def test_the_rank_that_differs_is_named(name, rank, value, line):
    with pytest.raises(LaunchError) as caught:
        compare(reports(**{name: (rank, value)}))
    assert str(caught.value) == f"{name} {line}"


def test_two_ranks_on_one_device_are_refused():
    with pytest.raises(LaunchError, match=r"^ranks 0 and 1 on h100-1 share one device \(GPU-0\): start one rank"):
        compare(reports(device_id=(1, "GPU-0")))


def test_contents_of_a_report():
    report = json.loads(json.dumps(describe(find_ranks({}, 0), {"the configuration": "3f1c"})))
    assert report["same"]["the configuration"] == "3f1c"
    assert report["same"]["kind of device"] == "cpu"
    assert {"the version of torch", "the version of deepspeed", "the source code"} <= set(report["same"])
    assert report["host"] == HOST and report["matmul"] > 1e8 and report["node"]["faults"] == ""


def test_a_few_nodes_that_differ_are_left_out_of_the_next_attempt(tmp_path, monkeypatch):
    monkeypatch.setenv("CCA_JOB_STATE", str(tmp_path))
    with pytest.raises(LaunchError) as caught:  # half of the nodes: nobody knows which are right
        compare(reports(**{"the version of torch": (2, "2.11.0")}))
    assert not isinstance(caught.value, NodeFault) and not (tmp_path / "exclude").exists()
    three = reports(**{"the version of torch": (2, "2.11.0")})
    three[1]["host"] = "h100-2"
    with pytest.raises(NodeFault, match=r"rank 2 on a40-7 has 2\.11\.0"):
        compare(three)
    assert (tmp_path / "exclude").read_text() == "a40-7\n"


@pytest.mark.dist
def test_ranks_that_agree():
    outputs = run_ranks("tests/dist/checked.py", 2, arguments=["20", "nothing"], timeout=60, group=ForkedRanks)
    assert all(o.stdout.endswith("2 ranks agree\n") for o in outputs)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("trouble", "line"),
    [
        (
            "another configuration",
            f"refused: the configuration differs: rank 1 on {HOST} has 77aa; the others have 3f1c",
        ),
        ("no report", f"refused: rank 1 did not report within 2 s; heard from: rank 0 on {HOST}"),
        (
            "no collective",
            f"refused: all-reduce did not answer within 2 s on rank 0 on {HOST}; not done either: rank 1 on {HOST}",
        ),
    ],
)
def test_ranks_that_do_not_agree(trouble, line):
    outputs = run_ranks(
        "tests/dist/checked.py", 2, arguments=["2", trouble], timeout=60, grace=1.5, check=False, group=ForkedRanks
    )
    assert outputs[0].returncode == 3
    assert line in outputs[0].stdout
