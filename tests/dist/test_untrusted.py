"""An untrusted checkpoint: no command runs code from it, even where its manifest agrees with its files."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.zero.config import ZeroStageEnum

from cca_ds import export, sample
from cca_ds.checkpoints import store
from cca_ds.checkpoints.deepspeed_state import consolidated_weights
from cca_ds.checkpoints.errors import CheckpointError
from cca_ds.checkpoints.store import complete_checkpoints
from tests.dist.runs import plain_ddp, scratch, train
from tests.support.hostile import Calls, payloads, plant, vouch

pytestmark = pytest.mark.dist

SETTINGS = ("batch.max_steps=4", "checkpoint.every_steps=2", "model.ema_decay=0.5", "checkpoint.keep_last=9")
PAYLOADS = list(payloads(Path()))


def run_of(ranks: int, ds=None) -> Path:
    folder = scratch() / f"untrusted_{ranks}_{ds is None}"
    if not folder.is_dir():
        train(ranks, folder, *SETTINGS, ds=ds)
    return folder


def copy_of(tmp_path: Path, ranks: int = 2, ds=None) -> Path:
    """A run to continue from step 2."""
    folder = tmp_path / "run"
    shutil.copytree(run_of(ranks, ds), folder)
    for name in ("COMPLETED", "checkpoints/latest"):
        (folder / name).unlink()
    shutil.rmtree(folder / "checkpoints/step_00000004")
    return folder


def spoilt(tmp_path: Path, payload: str, pattern: str = "*_optim_states.pt", legacy: bool = False, **run) -> Path:
    folder = copy_of(tmp_path, **run)
    (checkpoint,) = complete_checkpoints(folder / "checkpoints")
    victim = sorted(checkpoint.rglob(pattern))[0]
    plant(victim, payloads(tmp_path / "touched")[payload], legacy)
    vouch(checkpoint)
    return folder


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("pattern", ["*_optim_states.pt", "*_model_states.pt"])
def test_weights_are_not_taken_from_it(tmp_path, payload, pattern, legacy):
    folder = spoilt(tmp_path, payload, pattern, legacy)
    with pytest.raises(CheckpointError) as caught:
        consolidated_weights(complete_checkpoints(folder / "checkpoints")[0])
    said = str(caught.value)
    assert "\n" not in said and "step_00000002" in said and ("would run code" in said or "did not" in said or legacy)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("command", ["export", "sample"])
def test_commands_say_it_in_a_line(tmp_path, capsys, command):
    folder, output = str(spoilt(tmp_path, "os.system")), tmp_path / "new"
    if command == "export":
        code = export.main(["--run", folder, "--output", str(output / "p.safetensors")])
    else:
        code = sample.main(["--weights", folder, "--output", str(output), "--set", "sampling.images_per_class=1"])
    said = capsys.readouterr().err
    assert code == 2 and said.count("\n") == 1 and "system" in said and "would run code when loaded" in said
    assert not (tmp_path / "touched").exists() and not output.exists()


@pytest.mark.parametrize(
    ("ranks", "stage", "pattern"),
    [(2, 3, "*_optim_states.pt"), (2, 3, "*_model_states.pt"), (1, 3, "*_optim_states.pt"),
     (1, 3, "*_model_states.pt"), (2, 0, "mp_rank_00_model_states.pt")],
)  # fmt: skip
@pytest.mark.parametrize("payload", ["os.system", "exec among tensors"])
def test_training_does_not_continue_from_it(tmp_path, ranks, stage, pattern, payload):
    """On the ranks that wrote it, and on others, for which DeepSpeed converts it in a process of its own."""
    ds = None if stage == 3 else plain_ddp()
    folder = spoilt(tmp_path, payload, pattern, ds=ds)
    outputs = train(ranks, folder, *SETTINGS, ds=ds, check=False)
    assert [output.returncode for output in outputs] != [0] * ranks
    said = "".join(output.stderr for output in outputs)
    assert "would run code when loaded" in said and "Traceback" not in said
    assert not (tmp_path / "touched").exists()


def test_an_earlier_conversion_is_not_trusted(tmp_path):
    folder = copy_of(tmp_path)
    planted = folder / "checkpoints/step_00000002.universal/zero/norm.weight"
    planted.mkdir(parents=True)
    plant(planted / "fp32.pt", payloads(tmp_path / "touched")["os.system"])
    train(1, folder, *SETTINGS)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("name", ["random_rank_00000", "average_rank_00000"])
def test_own_state_of_an_older_version_is_read_without_code(tmp_path, name):
    """Older checkpoints have .pt files there."""
    folder = copy_of(tmp_path)
    (checkpoint,) = complete_checkpoints(folder / "checkpoints")
    plant(checkpoint / f"{name}.pt", payloads(tmp_path / "touched")["os.system"])
    body = json.loads((checkpoint / store.COMPLETE).read_text())
    body["files"][f"{name}.pt"] = body["files"].pop(f"{name}.safetensors")
    (checkpoint / store.COMPLETE).write_text(json.dumps(body))
    vouch(checkpoint)
    outputs = train(2, folder, *SETTINGS, check=False)
    assert any(f"{checkpoint}: {name}.pt would run code when loaded" in output.stderr for output in outputs), outputs
    assert 0 not in [output.returncode for output in outputs]
    assert not (tmp_path / "touched").exists()


def test_a_stage_as_pythons_3_11_0_to_3_11_3_wrote_it_is_read(tmp_path):
    """They pickled an enum as getattr(ZeroStageEnum, "weights")."""
    folder = copy_of(tmp_path)
    (checkpoint,) = complete_checkpoints(folder / "checkpoints")
    for path in checkpoint.rglob("*_optim_states.pt"):
        state = torch.load(path, weights_only=False)
        assert type(state["optimizer_state_dict"]["zero_stage"]) is int  # as it is written now
        state["optimizer_state_dict"]["zero_stage"] = Calls(getattr, ZeroStageEnum, "weights")
        torch.save(state, path)
        assert "builtins.getattr" in torch.serialization.get_unsafe_globals_in_checkpoint(path)
    vouch(checkpoint)
    assert consolidated_weights(checkpoint)
    train(2, folder, *SETTINGS)
