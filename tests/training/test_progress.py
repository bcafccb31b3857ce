"""Steps done, their values in the log, and what a process that resumes finds of the last one."""

import json

import pytest
import torch

from cca_ds.alignment.losses import LOSSES
from cca_ds.alignment.objective import SUMS
from cca_ds.training.accuracy_band import AccuracyBand
from cca_ds.training.progress import Progress, last_logged_values
from cca_ds.training.run_log import RunLog
from cca_ds.training.utilization import Utilization


def sums_of(pairs: float, loss: float) -> torch.Tensor:
    values = dict.fromkeys(SUMS, 0.0) | {"pairs": pairs, "loss": loss, "nll": 3.0 * pairs}
    return torch.tensor([values[name] for name in SUMS], dtype=torch.float64)


def started(folder, first_step=0, log_every=1, steps=4, band=None, state=()) -> Progress:
    folder.mkdir(exist_ok=True)
    watched = AccuracyBand(band)
    watched.restore(dict(state))
    log = RunLog(folder, True, steps, first_step, tensorboard=False, bar=False)
    last = last_logged_values(folder / "metrics.jsonl", first_step)
    return Progress(first_step, steps, log, last, 8, Utilization(0.0, ["cpu"]), torch.device("cpu"), log_every, watched)


def test_a_recorded_step_is_averaged_counted_and_logged(tmp_path):
    progress = started(tmp_path)
    assert progress.record(sums_of(8, 4.0), {"lr": 0.1}, spec=LOSSES["mle"]) == 1
    progress.log.close()
    (line,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert line["step"] == progress.step == 1 and line["loss"] == 0.5 and line["nll_per_code"] == 3.0
    assert line["lr"] == 0.1 and line["throughput/images_per_second"] > 0 and line["memory/peak_gib"] > 0
    assert {"step", "time", *progress.last_values} == set(line)


def test_every_second_step_and_the_last_are_written(tmp_path):
    progress = started(tmp_path, log_every=2, steps=3)
    for _ in range(3):
        progress.record(sums_of(8, 4.0), {}, spec=LOSSES["mle"])
    progress.log.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [2, 3]


def test_a_process_that_resumes_finds_the_values_of_its_step(tmp_path):
    progress = started(tmp_path)
    for loss in (8.0, 4.0, 2.0):
        progress.record(sums_of(8, loss), {}, spec=LOSSES["mle"])
    progress.log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # cut off by a kill
    assert last_logged_values(tmp_path / "metrics.jsonl", 2)["loss"] == 0.5
    assert last_logged_values(tmp_path / "metrics.jsonl", 9)["loss"] == 0.25
    assert last_logged_values(tmp_path / "none.jsonl", 2) == {}
    resumed = started(tmp_path, first_step=2)
    assert resumed.last_values["loss"] == 0.5 and resumed.step == 2
    resumed.log.close()


def compared(accuracy: float, margin: float = 0.1) -> torch.Tensor:
    """`SUMS` of eight pairs, of which this share prefers the first sequence."""
    values = dict.fromkeys(SUMS, 0.0) | {"pairs": 8.0, "contrasted": 8.0, "accurate": 8.0 * accuracy}
    values["chosen"] = 8.0 * margin
    return torch.tensor([values[name] for name in SUMS], dtype=torch.float64)


def averages(progress: Progress, steps: list[torch.Tensor]) -> list[float]:
    """The average accuracy after each step, up to the run's last."""
    found = []
    for sums in steps:
        progress.record(sums, {}, spec=LOSSES["ddo"])
        found.append(progress.last_values["rewards/accuracies_average"])
        if progress.step == progress.end:
            break
    progress.log.close()
    return found


def test_a_run_ends_where_the_average_accuracy_leaves_its_band(tmp_path, capsys):
    """The average begins at 0.5; steps of 0.7 bring it to 0.7 - 0.2 * 0.98^n, then steps of 1 beyond the band."""
    progress = started(tmp_path, steps=200, band=(0.6, 0.75))
    found = averages(progress, [compared(0.0, margin=0.0)] + [compared(0.7)] * 60 + [compared(1.0)] * 100)
    assert found[0] == 0.5  # the policy is still the reference
    assert found[60] == pytest.approx(0.7 - 0.2 * 0.98**60)
    assert progress.step == progress.end < 100 and found[-1] > 0.75 >= found[-2]
    assert f"the run ends after step {progress.end}" in capsys.readouterr().err
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["step"] == progress.end


@pytest.mark.parametrize("band", [(0.6, 0.75), (0.55, 0.8)])
def test_a_healthy_run_is_not_ended(tmp_path, band):
    """It begins below its band, since the policy is the reference and then hardly another model."""
    progress = started(tmp_path, steps=400, band=band)
    averages(progress, [compared(0.0, margin=0.0)] + [compared(0.5)] * 100 + [compared(0.65)] * 298)
    assert progress.step == 399 and progress.end == 400


def test_where_a_run_ends_does_not_depend_on_when_it_was_killed_or_what_it_logs(tmp_path):
    steps = [compared(0.7)] * 60 + [compared(1.0)] * 100
    whole = started(tmp_path / "whole", steps=160, band=(0.6, 0.75))
    averages(whole, steps)
    for killed in (1, 50, whole.end - 1, whole.end):
        first = started(tmp_path / str(killed), steps=160, band=(0.6, 0.75), log_every=7)
        averages(first, steps[:killed])
        second = started(tmp_path / str(killed), killed, 7, 160, (0.6, 0.75), first.accuracy_band.state())
        averages(second, steps[second.step : second.end])
        assert second.step == second.end == whole.end


def test_a_band_that_was_changed_is_to_be_entered_anew(tmp_path):
    first = AccuracyBand((0.45, 0.9))
    first.update({"rewards/margins": 0.1, "rewards/accuracies": 0.9})
    second, same = AccuracyBand((0.6, 0.75)), AccuracyBand((0.45, 0.9))
    for band in (second, same):
        band.restore(json.loads(json.dumps(first.state())))
        assert band.average == first.average and not band.left
    with pytest.raises(ValueError, match="an average accuracy of nan"):
        AccuracyBand((0.6, 0.75)).restore({"average": float("nan")})
    for _ in range(200):
        second.update({"rewards/margins": -0.1, "rewards/accuracies": 0.0})
        same.update({"rewards/margins": -0.1, "rewards/accuracies": 0.0})
    assert same.left and not second.left


@pytest.mark.parametrize(
    ("step", "line"), [(0, "before the first step was done"), (2, "after step 2: checkpoint saved")]
)
def test_the_last_line_of_a_stopped_run(tmp_path, capsys, step, line):
    progress = started(tmp_path, first_step=step)
    progress.say_stopped()
    progress.log.close()
    assert line in capsys.readouterr().err
