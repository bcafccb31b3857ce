"""Learning rate and weight decay, against arithmetic by hand and VAR's rule."""

import math

import pytest

from cca_ds.config.schema import Optimizer, Schedule
from cca_ds.training.schedule import learning_rate, weight_decay

ADAMW = Optimizer(learning_rate=2e-4, weight_decay=0.05)


def rates(steps, per_epoch, **settings):
    schedule = Schedule(**settings)
    return [learning_rate(step, steps, per_epoch, ADAMW, schedule) for step in range(steps)]


def test_constant_is_the_peak_throughout():
    assert rates(5, 5, name="constant") == [2e-4] * 5


def test_warm_up_rises_linearly_to_the_peak():
    found = rates(8, 4, name="constant", warmup_epochs=1, warmup_start=0.2)
    assert found == pytest.approx([2e-4 * share for share in (0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1)])


def test_linear_goes_from_the_peak_to_its_final_fraction_at_the_last_step():
    found = rates(5, 5, name="linear", final_fraction=0.2)
    assert found == pytest.approx([2e-4 * share for share in (1.0, 0.8, 0.6, 0.4, 0.2)])


def test_hold_keeps_the_peak_then_falls_to_the_same_end():
    found = rates(11, 11, name="linear", hold=0.5, final_fraction=0.0)
    assert found == pytest.approx([2e-4] * 6 + [2e-4 * share for share in (0.8, 0.6, 0.4, 0.2, 0.0)], abs=1e-12)


def test_cosine_is_half_way_down_in_the_middle():
    found = rates(9, 9, name="cosine", final_fraction=0.1)
    assert found[0] == pytest.approx(2e-4) and found[-1] == pytest.approx(2e-5)
    assert found[4] == pytest.approx(2e-4 * 0.55)
    assert found[2] == pytest.approx(2e-4 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))))


def test_vars_linear_with_hold():
    """VAR's "lin0": after warm-up, 5% of what is left at the peak, then straight down."""
    steps, per_epoch = 1000, 100
    found = rates(steps, per_epoch, name="linear", warmup_epochs=2, warmup_start=0.005, hold=0.05, final_fraction=0.01)
    for step in (0, 77, 199, 200, 239, 300, 777, 999):
        if step < 200:
            expected = 0.005 + 0.995 * step / 200
        else:
            passed = (step - 200) / 799
            rest = 1 if passed < 0.05 else (1 - passed) / 0.95
            expected = 1 if passed < 0.05 else 0.01 + 0.99 * rest
        assert found[step] == pytest.approx(2e-4 * expected), step


def test_a_run_of_one_step_and_one_shorter_than_its_warm_up():
    assert rates(1, 1, name="cosine") == [2e-4]
    found = rates(2, 10, name="cosine", warmup_epochs=1, warmup_start=0.0)
    assert found == pytest.approx([0.0, 2e-5])


def test_weight_decay_stays_or_follows_half_a_cosine():
    assert [weight_decay(step, 3, ADAMW) for step in range(3)] == [0.05] * 3
    falling = ADAMW.model_copy(update={"final_weight_decay": 0.01})
    assert [weight_decay(step, 5, falling) for step in range(5)] == pytest.approx(
        [0.05, 0.01 + 0.04 * (0.5 + 0.5 * math.sqrt(0.5)), 0.03, 0.01 + 0.04 * (0.5 - 0.5 * math.sqrt(0.5)), 0.01]
    )
