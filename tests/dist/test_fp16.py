"""fp16: what DeepSpeed's loss scaler skips is part of a run, on any rank and after it is resumed.

The run ends where the loss itself is not finite or no lower scale is left. Engine and scaler are real; see
`train_fp16.py`.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cca_ds.checkpoints.deepspeed_state import consolidated_weights, load_own
from cca_ds.checkpoints.store import complete_checkpoints, read_manifest
from cca_ds.config.recipes import load_recipe
from cca_ds.training.schedule import learning_rate
from tests.dist.fork_server import ForkedRanks
from tests.dist.ranks import REPOSITORY, RankOutput, RanksFailed
from tests.dist.runs import PATIENCE, command, losses, metrics, scratch, sharded_zero3, tiny_weights
from tests.dist.test_checkpoints import cut_short

pytestmark = pytest.mark.dist

STEPS = 12
SCHEDULE = ("optimizer.learning_rate=1e-3", "schedule.name=cosine")
# two forwards a step on two ranks; a checkpoint after each
SETTINGS = (f"batch.max_steps={STEPS}", "batch.micro_size=8", *SCHEDULE, "checkpoint.every_steps=1",
            "checkpoint.keep_last=99", "model.ema_decay=0.75", "logging.tensorboard=true",
            "loss.lambda=10")  # fmt: skip
SCALING = {"initial_scale_power": 15, "loss_scale_window": 3}  # too high for this model by a few halvings


def train_fp16(
    ranks: int, folder: Path, *settings: str, stage: int = 3, scaling: dict = SCALING, check: bool = True
) -> list[RankOutput]:
    source = sharded_zero3() if stage == 3 else REPOSITORY / "ds_configs/zero2.json"
    ds = scratch() / f"fp16_stage_{stage}_{'_'.join(map(str, scaling.values()))}.json"
    ds.write_text(json.dumps(json.loads(source.read_text()) | {"fp16": scaling}))
    python, _, *arguments = command(folder, "precision=fp16", *settings, ds=ds)
    program = [python, str(REPOSITORY / "tests/dist/train_fp16.py"), *arguments]
    with ForkedRanks(program, ranks, None, None) as running:
        outputs = running.wait(PATIENCE)
        if check and any(output.returncode for output in outputs):
            raise RanksFailed(f"a rank failed\n{running.tails()}")
    return outputs


def whole_run(stage: int = 3) -> Path:
    """Two ranks to the end, made once; rank 0's console is kept beside."""
    folder = scratch() / f"fp16_{stage}"
    if not folder.is_dir():
        outputs = train_fp16(2, folder, *SETTINGS, stage=stage)
        (folder / "console").write_text(outputs[0].stderr)
    return folder


def same_weights(one: dict, other: dict) -> bool:
    return all(torch.equal(one[name].flatten(), other[name].float().flatten()) for name in other)


@pytest.mark.parametrize("stage", [3, 2])
def test_a_skipped_step_is_logged_and_changes_nothing_but_the_scale(stage):
    folder = whole_run(stage)
    lines, console = metrics(folder), (folder / "console").read_text()
    losses(folder)  # every step once and in order
    skipped = [line["step"] for line in lines if "grad_norm" not in line]
    assert [step for step in skipped if step <= 8] == [1, 2, 3, 4]
    assert [line["skipped_steps"] for line in lines] == [
        sum(step <= line["step"] for step in skipped) for line in lines
    ]
    # DeepSpeed's hysteresis is 2: the scale goes down from the second overflow on, and up after three good steps
    assert [line["loss_scale"] for line in lines[:8]] == [2.0**n for n in (15, 14, 13, 12, 12, 12, 12, 13)]
    warned = [line for line in console.splitlines() if line.startswith("WARNING: step ")]
    assert len(warned) == len(skipped)
    assert warned[1] == (
        "WARNING: step 2 was skipped: its gradient overflowed in fp16 at loss scale 32768; "
        "loss scale now 16384, 2 step(s) skipped so far"
    )
    recipe = load_recipe("digits", [*SCHEDULE])
    rates = [learning_rate(n, STEPS, 10**9, recipe.optimizer, recipe.schedule) for n in range(STEPS)]
    assert [line["lr"] for line in lines] == [
        rates[line["step"] - 1 - sum(step < line["step"] for step in skipped)] for line in lines
    ]
    checkpoints, start = folder / "checkpoints", load_file(tiny_weights())
    assert same_weights(consolidated_weights(checkpoints / "step_00000004"), start)
    assert not same_weights(consolidated_weights(checkpoints / "step_00000005"), start)
    average = load_own(checkpoints / "step_00000004/average_rank_00000")
    assert all(torch.equal(average[name], start[name].flatten()[: average[name].numel()]) for name in start)
    for step in (4, STEPS):  # DeepSpeed counts as the log does
        name = ("zero_pp_rank_0_" if stage == 3 else "") + "mp_rank_00_model_states.pt"
        counts = torch.load(checkpoints / f"step_{step:08d}/deepspeed/{name}", weights_only=False)
        assert counts["global_steps"] == step and counts["skipped_steps"] == lines[step - 1]["skipped_steps"]
    events = EventAccumulator(str(folder)).Reload()
    for tag in ("loss_scale", "skipped_steps"):
        assert [event.value for event in events.Scalars(tag)] == [line[tag] for line in lines]


def test_the_logged_gradient_norm_is_that_of_its_step_where_the_scale_grows():
    """DeepSpeed's stage 3 divides by the next step's scale, its stage 2 by this one's."""
    three, two = metrics(whole_run(3)), metrics(whole_run(2))
    assert three[7]["loss_scale"] == 2 * three[6]["loss_scale"]
    assert three[7]["grad_norm"] == pytest.approx(two[7]["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("step", [2, 7], ids=lambda step: f"after step {step}")
def test_the_same_ranks_continue_bit_for_bit(step, tmp_path):
    whole, folder = whole_run(), cut_short(whole_run(), tmp_path / "run", step)
    train_fp16(2, folder, *SETTINGS)
    tags = ("loss", "lr", "loss_scale", "skipped_steps", "grad_norm")
    assert [[line.get(tag) for tag in tags] for line in metrics(folder)] == [
        [line.get(tag) for tag in tags] for line in metrics(whole)
    ]


@pytest.mark.parametrize("stage", [3, 2])
def test_another_number_of_ranks_continues_scale_count_and_schedule(stage, tmp_path):
    """From step 6, so that the scale's growth after step 8 comes out of the old run's good steps and its own."""
    whole, folder = metrics(whole_run(stage)), cut_short(whole_run(stage), tmp_path / "run", 6)
    train_fp16(1, folder, *SETTINGS, stage=stage)
    found = metrics(folder)
    for tag in ("lr", "loss_scale", "skipped_steps"):
        assert [line[tag] for line in found[:8]] == [line[tag] for line in whole[:8]]
    for tag in ("loss", "grad_norm"):  # sums in fp16 are rounded anew
        assert [line[tag] for line in found[6:8]] == pytest.approx([line[tag] for line in whole[6:8]], 1e-2)
    newest = complete_checkpoints(folder / "checkpoints")[0]
    (states,) = {*newest.glob("deepspeed/zero_pp_rank_0_mp_rank_00_model_states.pt"),
                 *newest.glob("deepspeed/mp_rank_00_model_states.pt")}  # fmt: skip
    counts = torch.load(states, weights_only=False)
    assert counts["global_steps"] == read_manifest(newest).step == STEPS
    assert counts["skipped_steps"] == found[-1]["skipped_steps"]
    assert steps_of_adamw(newest) == STEPS - found[-1]["skipped_steps"]


def steps_of_adamw(checkpoint: Path) -> float:
    """The optimizer's own count, which its bias correction follows."""
    (path,) = checkpoint.glob("deepspeed/*zero_pp_rank_0_mp_rank_00_optim_states.pt")
    state = torch.load(path, weights_only=False)["optimizer_state_dict"]
    state = state.get("base_optimizer_state") or state["optimizer_state_dict"]
    return float(next(iter(state["state"].values()))["step"])


@pytest.mark.parametrize(
    ("scaling", "done", "message"),
    [
        (SCALING | {"min_loss_scale": 2**14}, 2, "at the lowest loss scale, 16384 (fp16.min_loss_scale)"),
        ({"loss_scale": 2**15}, 0, "at the fixed loss scale 32768 (fp16.loss_scale)"),
    ],
    ids=["lowest", "fixed"],
)
def test_where_there_is_no_lower_scale_the_run_ends_before_the_optimizer_step(scaling, done, message, tmp_path):
    (output,) = train_fp16(1, tmp_path / "run", *SETTINGS, scaling=scaling, check=False)
    assert output.returncode == 1 and "Traceback" not in output.stderr
    line = output.stderr.strip().splitlines()[-1]
    assert f"NonFinite: step {done + 1}: the gradient is not finite {message}; the optimizer has not stepped" in line
    assert len(losses(tmp_path / "run")) == done
    assert len(complete_checkpoints(tmp_path / "run/checkpoints")) == done


def test_a_loss_that_is_not_finite_in_fp16_ends_the_run_as_ever(tmp_path):
    state = load_file(tiny_weights())
    state["tok_embeddings.weight"][3] = 1e6  # beyond what fp16 holds
    save_file(state, tmp_path / "large.safetensors")
    weights = f"model.weights={tmp_path / 'large.safetensors'}"
    (output,) = train_fp16(1, tmp_path / "run", *SETTINGS, weights, check=False)
    assert output.returncode == 1
    assert "step 1: the loss is not finite (rank 0" in output.stderr and "was skipped" not in output.stderr
    assert metrics(tmp_path / "run") == []
