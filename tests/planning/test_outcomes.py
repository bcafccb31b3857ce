"""Which micro-batches and placements fit an allocation."""

from cca_ds.balance.memory import Sharding
from cca_ds.planning.nodes import parse_nodes
from cca_ds.planning.outcomes import outcome
from cca_ds.planning.report import best_of
from cca_ds.planning.step_time import micro_caps
from cca_ds.reference.placements import PLACEMENTS
from tests.support.planning import job_of


def test_a_run_that_does_not_fit_has_no_step():
    job, groups = job_of(sharding=Sharding.of({"zero_optimization": {"stage": 0}})), parse_nodes("1xa40:8")
    found = outcome(job, groups, PLACEMENTS["inference"], True)
    assert found.balanced is None and found.even is None and found.caps == [0]
    assert best_of([found]) is None


def test_micro_batches_fill_the_memory_and_no_more():
    job, groups = job_of("llamagen-xxl", pairs=4096), parse_nodes("1xh100:8,1xa40:8")
    memory = job.memory(PLACEMENTS["inference"], 16, False)
    for group, cap in zip(groups, micro_caps(groups, [memory, memory], job.pairs), strict=True):
        usable = 0.94 * group.device.memory_bytes
        assert memory.fixed + cap * memory.activations_per_pair <= usable
        assert memory.fixed + (cap + 1) * memory.activations_per_pair > usable
