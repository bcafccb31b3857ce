"""Runs of cca_ds/train.py on a small model, through its command line, and what they leave.

with start_training(2, folder, "batch.max_steps=5") as ranks:
    ranks.wait_for("...")
outputs = train(2, folder, "batch.max_steps=5", flags=["--resume", "never"])
assert metrics(folder)[-1]["step"] == 5
"""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from cca_ds.data.generated import PLAIN
from cca_ds.models import create_model, load_weights
from cca_ds.models.weight_files import state_hash
from cca_ds.sampling.code_table import draw_code_table
from tests.dist.fork_server import ForkedRanks
from tests.dist.ranks import REPOSITORY, RankGroup, RankOutput, RanksFailed, python_command

SHAPE = {"n_layer": 2, "n_head": 2, "dim": 32, "multiple_of": 16}
QUIET = ("logging.sample_every_steps=null", "logging.tensorboard=false", "logging.progress=false", "data.workers=0",
         "baseline.check=false", "precision=fp32")  # fmt: skip
PATIENCE = 240.0  # seconds a run may take on a busy machine


@functools.cache
def scratch() -> Path:
    """A folder of this test session."""
    folder = Path(tempfile.mkdtemp(prefix="cca_runs_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def tiny_weights() -> Path:
    """A checkpoint of a small LlamaGen for the digits, drawn so that its codes are not equally likely."""
    torch.manual_seed(3)
    module = create_model("digits", **SHAPE)
    for parameter in module.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    path = scratch() / "tiny.safetensors"
    save_file({name: p.detach().clone() for name, p in module.named_parameters()}, path)
    return path


@functools.cache
def generated_table() -> Path:
    """Twenty images of each class, drawn by the model of `tiny_weights`."""
    module = create_model("digits", **SHAPE)
    load_weights(module, tiny_weights())
    drawn = {"weights_sha256": state_hash(dict(module.named_parameters())), "tokenizer_hash": "", **PLAIN}
    draw_code_table(scratch() / "generated", module.eval(), "digits", range(200), {"seed": 5}, 100, drawn)
    return scratch() / "generated"


def of_loss(name: str) -> tuple[str, ...]:
    """Settings of a run with this loss; "ddo" reads its images from a table, "ddo online" draws them."""
    loss, _, online = name.partition(" ")
    drawn = (f"data.generated={online or generated_table()}",) if loss == "ddo" else ()
    return (f"loss.name={loss}", *drawn)


@functools.cache
def sharded_zero3() -> Path:
    """zero3.json with every parameter cut over the ranks, however small: those of a small model would be kept whole."""
    ds = json.loads((REPOSITORY / "ds_configs/zero3.json").read_text())
    ds["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    path = scratch() / "zero3_sharded.json"
    path.write_text(json.dumps(ds))
    return path


@functools.cache
def plain_ddp() -> Path:
    """ZeRO stage 0: DeepSpeed averages gradients and shards nothing."""
    ds = json.loads((REPOSITORY / "ds_configs/zero2.json").read_text())
    ds["zero_optimization"] = {"stage": 0}
    path = scratch() / "zero0.json"
    path.write_text(json.dumps(ds))
    return path


@functools.cache
def fused_adamw() -> Path:
    """zero3_sharded with PyTorch's fused AdamW, as on a GPU."""
    ds = json.loads(sharded_zero3().read_text())
    ds["optimizer"]["params"]["fused"] = True
    path = scratch() / "zero3_fused.json"
    path.write_text(json.dumps(ds))
    return path


def command(folder: Path | None, *settings: str, ds: Path | str | None = None, flags: Sequence[str] = ()) -> list[str]:
    """The command line of a run of the small model."""
    shape = ", ".join(f"{name}: {value}" for name, value in SHAPE.items())
    usual = (f"model.weights={tiny_weights()}", f"model.overrides={{{shape}}}", *QUIET)
    output = ["--output", str(folder)] if folder is not None else []
    arguments = ["--ds_config", str(ds or sharded_zero3()), *output, *flags, "--set", *usual, *settings]
    return python_command("cca_ds/train.py", arguments)


def start_training(
    ranks: int,
    folder: Path | None,
    *settings: str,
    ds: Path | str | None = None,
    flags: Sequence[str] = (),
    env: dict[str, str] | None = None,
) -> RankGroup:
    """Running ranks; use it in a `with` block."""
    return ForkedRanks(command(folder, *settings, ds=ds, flags=flags), ranks, env, None)


def train(
    ranks: int,
    folder: Path | None,
    *settings: str,
    ds: Path | str | None = None,
    flags: Sequence[str] = (),
    env: dict[str, str] | None = None,
    check: bool = True,
) -> list[RankOutput]:
    """A run to its end. Raises RanksFailed where `check` and a rank failed."""
    with start_training(ranks, folder, *settings, ds=ds, flags=flags, env=env) as running:
        outputs = running.wait(PATIENCE)
        if check and any(output.returncode for output in outputs):
            raise RanksFailed(f"a rank failed\n{running.tails()}")
    return outputs


def metrics(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl."""
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def losses(folder: Path) -> list[float]:
    """The loss of every step, which must be there once and in order."""
    lines = metrics(folder)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def assert_same_trajectory(found: list[float], expected: list[float], relative: float = 1e-5) -> None:
    """Equal losses, step by step."""
    assert len(found) == len(expected)
    for step, (one, other) in enumerate(zip(found, expected, strict=True), start=1):
        assert abs(one - other) <= relative * abs(other), f"step {step}: {one} is not {other}"


def wait_until(condition: Callable[[], bool], running: ForkedRanks) -> None:
    """Wait for the condition while the ranks run; fails with the ends of their output where they end first."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, running.tails()
        assert all(process.poll() is None for process in running.processes), running.tails()
        time.sleep(0.002)
