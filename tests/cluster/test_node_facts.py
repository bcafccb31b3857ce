"""The table before the first step: fabrics, speeds, faults, and who stands out."""

import os

import pytest

from cca_ds.cluster import node_facts


def ranks(**speeds):
    """Two ranks on each of three hosts; `speeds` are a rank's TFLOP/s."""
    return [
        {"rank": rank, "host": f"n{rank // 2}", "device": "H100" if rank < 4 else "A40", "commit": "abc",
         "matmul": speeds.get(f"r{rank}", 600 if rank < 4 else 100) * 1e12, "all_reduce": 40e9,
         "node": {"driver": "570.1", "fabric": "4 x InfiniBand 400 Gb/s", "faults": ""}}
        for rank in range(6)
    ]  # fmt: skip


def test_equal_devices_are_compared_with_one_another():
    assert node_facts.slow_ranks(ranks(), node_facts.LAGGING) == [] == node_facts.warnings(ranks())
    lagging = ranks(r1=450, r5=40)
    assert [report["rank"] for report in node_facts.slow_ranks(lagging, node_facts.LAGGING)] == [1, 5]
    assert [report["rank"] for report in node_facts.slow_ranks(lagging, node_facts.FAR_BEHIND)] == [5]
    assert "rank 5 on n2 computes 40 TFLOP/s, below 80% of what equal devices do" in node_facts.warnings(lagging)


def test_cpus_are_not_compared():
    reports = [report | {"device": "cpu"} for report in ranks(r0=1)]
    assert node_facts.slow_ranks(reports, node_facts.LAGGING) == []


def test_the_table_has_a_line_for_every_node():
    reports = ranks(r1=450)
    reports[4]["node"] = {"driver": "", "fabric": "Ethernet", "faults": "2 uncorrected memory errors"}
    head, *lines = node_facts.table(reports)
    assert head.split("  ")[0] == "node" and [line.split()[0] for line in lines] == ["n0", "n1", "n2"]
    assert "0-1" in lines[0] and "2 x H100" in lines[0] and "450 to 600" in lines[0] and "rank 1 lags" in lines[0]
    assert "Ethernet" in lines[2] and lines[2].endswith("2 uncorrected memory errors")
    assert any("different fabrics" in line and "n2: Ethernet" in line for line in node_facts.warnings(reports))


def test_other_commits_of_equal_sources_are_a_warning():
    reports = ranks()
    reports[3]["commit"] = "none"
    (line,) = node_facts.warnings(reports)
    assert "(abc, none)" in line and "some node has no git" in line


def test_active_ports_are_counted(tmp_path):
    assert node_facts.fabric(tmp_path) == "Ethernet"
    for name, state, layer in (("mlx5_0", "4: ACTIVE", "InfiniBand"), ("mlx5_1", "4: ACTIVE", "InfiniBand"),
                               ("mlx5_2", "1: DOWN", "InfiniBand"), ("mlx5_3", "4: ACTIVE", "Ethernet")):  # fmt: skip
        port = tmp_path / name / "ports" / "1"
        port.mkdir(parents=True)
        for file, text in (("state", state), ("rate", "400 Gb/sec (4X NDR)"), ("link_layer", layer)):
            (port / file).write_text(f"{text}\n")
    assert node_facts.fabric(tmp_path) == "2 x InfiniBand 400 Gb/s; 1 x Ethernet 400 Gb/s"


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """A folder of programs that come before the machine's own."""
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    def add(name, text):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)

    return add


def test_what_the_driver_says(programs):
    programs("nvidia-smi", "echo '570.86.15, 3'")
    programs("dmesg", "echo '[1] NVRM: Xid (PCI:0000:1b:00): 79, pid=1, GPU has fallen off the bus.'")
    found = node_facts.describe_node("cuda:0", "1234", first_on_node=True)
    assert found["driver"] == "570.86.15"
    assert found["faults"] == "3 uncorrected memory errors; Xid 79 in the kernel's log"
    programs("nvidia-smi", "echo 'Unable to determine the device handle' >&2; exit 15")
    programs("dmesg", "echo 'dmesg: read kernel buffer failed: Operation not permitted' >&2; exit 1")
    found = node_facts.describe_node("cuda:0", "1234", first_on_node=True)
    assert (found["driver"], found["faults"]) == ("", "")
