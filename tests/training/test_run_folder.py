"""Which run a folder belongs to, and when the run is complete."""

import json
import shutil

import pytest

from cca_ds.checkpoints import store
from cca_ds.config.recipes import ConfigError, load_recipe
from cca_ds.training import run_folder


@pytest.fixture
def run():
    return load_recipe("digits")


def problem(folder, run, resume="auto"):
    with pytest.raises(ConfigError) as caught:
        run_folder.check_output(folder, run, resume)
    (line,) = caught.value.problems
    return line


def checkpoint(folder, step):
    partial = store.begin(folder / "checkpoints", step)
    (partial / "weights.pt").write_bytes(b"1" * step)
    return store.publish(partial, [partial / "weights.pt"])


def opened(folder, run):
    """Whether the folder was fresh; its lock is given up again."""
    own = run_folder.own(folder, run)
    own.lock.release()
    return own.fresh


def test_a_new_folder_is_made_with_its_recipe_and_may_be_discarded(tmp_path, run):
    folder = tmp_path / "a/b"
    run_folder.check_output(folder, run, "auto")
    assert not folder.exists()  # looking makes nothing
    assert opened(folder, run) is True
    assert opened(folder, run) is False
    assert load_recipe(str(folder / "config.yaml")) == run
    run_folder.check_output(folder, run, "auto")
    run_folder.discard(folder)
    assert not folder.exists()


def test_discarding_follows_a_link_and_leaves_it(tmp_path, run):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "scratch")
    opened(tmp_path / "run", run)
    (tmp_path / "run" / "data").mkdir()
    run_folder.discard(tmp_path / "run")
    assert (tmp_path / "run").is_symlink() and not any((tmp_path / "scratch").iterdir())


def test_habits_of_logging_may_change_what_shapes_the_trajectory_not(tmp_path, run):
    opened(tmp_path, run)
    for override in ("logging.every_steps=7", "checkpoint.keep_last=9", "data.workers=5", "balance.mode=measured"):
        run_folder.check_output(tmp_path, load_recipe("digits", [override]), "auto")
    for override in ("seed=1", "loss.beta=0.1", "batch.global_size=64", "batch.max_steps=3"):
        line = problem(tmp_path, load_recipe("digits", [override]))
        assert "already holds another run (" in line and f"{override.partition('=')[0]}=" in line


def test_completion_is_marked_last(tmp_path, run, monkeypatch):
    opened(tmp_path, run)
    assert not run_folder.is_completed(tmp_path)
    written = []
    usual = run_folder.write_atomic
    monkeypatch.setattr(run_folder, "write_atomic", lambda path, text: (written.append(path.name), usual(path, text)))
    run_folder.finish(tmp_path, {"steps": 56, "loss": 0.5})
    assert written == ["summary.json", "COMPLETED"]
    assert run_folder.is_completed(tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text()) == {"steps": 56, "loss": 0.5}


def test_a_file_to_resume_from(tmp_path, run):
    (tmp_path / "weights.pt").write_text("x")
    for name, what in (("weights.pt", "a file"), ("none", "no such file")):
        line = problem(tmp_path / "run", run, str(tmp_path / name))
        assert f"--resume {tmp_path / name}: {what}; give auto, never or a checkpoint's folder" in line


def test_a_path_to_resume_from(tmp_path, run):
    folder = tmp_path / "run"
    opened(folder, run)
    older, newer = checkpoint(folder, 2), checkpoint(folder, 4)
    run_folder.check_output(folder, run, str(newer))
    run_folder.check_output(tmp_path / "branch", run, str(older))
    assert "step_00000004 is newer in --output" in problem(folder, run, str(older))
    (tmp_path / "nothing").mkdir()
    assert "COMPLETE.json is missing" in problem(folder, run, str(tmp_path / "nothing"))
    shutil.copytree(newer, tmp_path / "elsewhere/step_00000004")
    run_folder.check_output(tmp_path / "branch", run, str(tmp_path / "elsewhere/step_00000004"))
    (newer / "COMPLETE.json").write_text("{")
    assert "COMPLETE.json is corrupt" in problem(tmp_path / "branch", run, str(newer))
    assert "already holds this run" in problem(folder, run, "never")
