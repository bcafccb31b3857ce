"""What one process contributes to what the ranks agree on; with several ranks see tests/dist."""

import torch

from cca_ds.cluster.coordination import Coordinator
from cca_ds.cluster.launch import Ranks

ALONE = Ranks(0, 0, 1, 1, 0, "node1", "cpu", "alone")


class Stop:
    requested = False


class Watched:
    def __init__(self):
        self.beats = []

    def beat(self, step, doing):
        self.beats.append((step, doing))


def test_sums_come_back_with_the_request_to_stop():
    stop = Stop()
    coordinator = Coordinator(ALONE, stop)
    values = torch.tensor([1.0, 2.5], dtype=torch.float64)
    sums, stopping, overdue = coordinator.sum_over_ranks(values)
    assert torch.equal(sums, values) and not stopping and not overdue
    assert coordinator.sum_over_ranks(values, overdue=True)[1:] == (False, True)
    stop.requested = True
    assert coordinator.sum_over_ranks(values)[1] and coordinator.stop_requested


def test_without_a_signal_handler_or_watchdog_it_is_silent():
    coordinator = Coordinator(ALONE)
    coordinator.beat(3)
    coordinator.close()
    assert not coordinator.stop_requested


def test_heartbeats_reach_the_watchdog():
    watched = Watched()
    Coordinator(ALONE, watchdog=watched).beat(3, "measuring the ranks")
    assert watched.beats == [(3, "measuring the ranks")]
