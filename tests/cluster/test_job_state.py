"""What an attempt of a job leaves for the next: the first rank's word, and the nodes to avoid."""

from cca_ds import plan
from cca_ds.cluster.flight_recorder import dump_nccl_trace
from cca_ds.cluster.job_state import VARIABLE, note_end, note_faulty
from cca_ds.cluster.launch import find_ranks
from tests.support.refusals import called


def test_the_first_word_counts(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    note_end(1, "rank 3 on n1: out of\nmemory")
    note_end(75, "rank 0 on n0 ends the run")
    assert (tmp_path / "ended").read_text() == "1 rank 3 on n1: out of memory\n"
    note_faulty(["n2"])
    note_faulty(["n1", "n2"])
    assert (tmp_path / "exclude").read_text() == "n1\nn2\n"


def test_without_a_job_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    note_end(1, "x")
    note_faulty(["n1"])
    monkeypatch.setenv(VARIABLE, str(tmp_path / "gone"))
    note_end(1, "x")
    note_faulty(["n1"])
    assert list(tmp_path.iterdir()) == []


def test_a_commands_refusal_is_written_down(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    assert called(plan.main, ["--nodes", "1xh100:0"])[0] == 2
    assert (tmp_path / "ended").read_text().startswith("2 plan: --nodes 1xh100:0")


def test_the_recorders_trace_is_kept_beside_the_logs(tmp_path, monkeypatch):
    ranks = find_ranks({}, 0)
    assert dump_nccl_trace(ranks) is None  # no GPU
    monkeypatch.setattr("cca_ds.cluster.flight_recorder.log_folder", lambda: tmp_path)
    path = dump_nccl_trace(ranks, lambda: b"trace")
    assert path == tmp_path / "nccl_trace_rank_0" and path.read_bytes() == b"trace"
