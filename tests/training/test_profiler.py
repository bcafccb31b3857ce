"""What a run is looked into by, beside the trace (`tests/dist/test_whole_blocks.py`)."""

import pickle

import pytest
import torch

from cca_ds.training.profiler import compute_deterministically, memory_history, profiled


def run_out_of_memory(folder):
    with memory_history(True, folder, 3):
        raise MemoryError


@pytest.mark.skipif(not torch.cuda.is_available(), reason="records a GPU's memory")
def test_a_snapshot_when_memory_runs_out_and_after_the_traced_steps(tmp_path):
    with pytest.raises(MemoryError):
        run_out_of_memory(tmp_path)
    (path,) = (tmp_path / "profile").iterdir()
    assert path.name == "memory_rank_00003.pickle"
    with memory_history(True, tmp_path, 0):
        for _ in profiled([(0, None), (1, None)], (1, 2), tmp_path, 0, memory=True):
            torch.zeros(1 << 20, device="cuda")
    snapshot = pickle.loads((tmp_path / "profile" / "memory_rank_00000.pickle").read_bytes())
    assert any(event["size"] >= 4 << 20 for event in snapshot["device_traces"][0])


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's memory is recorded")
def test_without_a_gpu_there_is_no_snapshot(tmp_path):
    with pytest.raises(MemoryError):
        run_out_of_memory(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_deterministic_arithmetic():
    try:
        compute_deterministically()
        assert torch.are_deterministic_algorithms_enabled()
        counts = torch.zeros(4, dtype=torch.int64).index_add(0, torch.tensor([1, 1]), torch.tensor([1, 1]))
        assert counts.tolist() == [0, 2, 0, 0]
        if torch.cuda.is_available():
            with pytest.raises(RuntimeError, match="deterministic"):
                torch.histc(torch.rand(8, device="cuda"))
    finally:
        torch.use_deterministic_algorithms(False)
