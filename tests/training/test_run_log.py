"""What a run tells: whole files, a log without a step twice, TensorBoard under the same tags."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from cca_ds.console import progress
from cca_ds.files import write_atomic
from cca_ds.training import run_log
from cca_ds.training.run_log import RunLog, truncate_metrics


def steps(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def values(loss):
    return {"loss": loss, "throughput/images_per_second": 10.0}


def log(folder, first_step=0, **settings):
    return RunLog(folder, True, 10, first_step, bar=False, **{"tensorboard": False, **settings})


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_atomic(path, "old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        write_atomic(path, b"new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_resumed_run_logs_no_step_twice(tmp_path):
    first = log(tmp_path)
    for step in range(1, 6):
        first.step(step, values(1.0 / step))
    first.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # torn by a kill
    second = log(tmp_path, first_step=3)
    second.step(4, values(9.0))
    second.close()
    assert steps(tmp_path) == [1, 2, 3, 4]
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["loss"] == 9.0 and last["time"] > 0


def test_truncation_of_what_is_not_there_and_of_everything(tmp_path):
    truncate_metrics(tmp_path / "metrics.jsonl", 3)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    truncate_metrics(tmp_path / "metrics.jsonl", 0)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_lines_are_on_the_disk_while_the_run_goes_on(tmp_path):
    running = log(tmp_path)
    running.step(1, values(1.0))
    running.step(2, values(2.0), write=False)
    assert steps(tmp_path) == [1]
    running.close()
    running.close()


def test_other_ranks_are_silent(tmp_path, capsys):
    silent = RunLog(tmp_path, False, 10)
    silent.step(1, values(1.0))
    silent.say("hello")
    silent.image("samples", 1, np.zeros((4, 4, 1), np.uint8), "a.png")
    silent.text("config", "a: 1")
    silent.hparams({"beta": 1.0})
    silent.finished()
    silent.close()
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr() == ("", "")


def test_tensorboard_has_the_values_the_picture_and_no_undone_step(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    grid = np.arange(16, dtype=np.uint8).reshape(4, 4, 1)
    first = log(tmp_path, tensorboard=True)
    first.text("config", "a: 1")
    first.hparams({"beta": 0.5})
    for step in (1, 2, 3):
        first.step(step, values(float(step)))
    first.close()
    second = log(tmp_path, first_step=2, tensorboard=True)
    second.step(3, values(30.0))
    second.image("samples", 3, grid, "step_3.png")
    second.text("config", "a: 1")
    second.hparams({"beta": 0.5})
    second.finished()
    second.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert "samples" in events.Tags()["images"]
    assert [event.step for event in events.Tensors("config/text_summary")] == [0, 2]  # of both processes
    assert set(events.PluginTagToContent("hparams")) == {"_hparams_/session_start_info", "_hparams_/session_end_info"}
    assert (np.asarray(Image.open(tmp_path / "samples/step_3.png")) == grid[..., 0]).all()


def test_what_was_logged_before_the_first_checkpoint_is_shown_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for loss in (1.0, 2.0):  # killed without a checkpoint, and started again
        begun = log(tmp_path, tensorboard=True)
        for step in (1, 2):
            begun.step(step, values(loss))
        begun.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 2.0), (2, 2.0)]


def test_a_run_with_a_folder_of_events_continues_there(tmp_path):
    (tmp_path / "tensorboard").mkdir()
    resumed = log(tmp_path, first_step=2, tensorboard=True)
    resumed.step(3, values(1.0))
    resumed.close()
    assert len(list((tmp_path / "tensorboard").glob("events.*"))) == 1 and not list(tmp_path.glob("events.*"))


def test_the_bar_shows_rate_and_passes_items_through(capsys):
    assert list(progress(range(3), "counting")) == [0, 1, 2]
    message = capsys.readouterr()
    assert message.out == "" and "counting" in message.err and "3/3" in message.err
    assert list(progress(range(3), "counting", show=False)) == [0, 1, 2]
    run_log.say("one line")
    assert capsys.readouterr().err == "one line\n"
