"""Runs of a small VAR on two ranks, each made once: pictures, their codes, a policy and its moving average."""

import functools
from pathlib import Path

import numpy as np
from PIL import Image

from cca_ds import encode, sample
from tests.dist.fork_server import ForkedRanks
from tests.dist.ranks import RanksFailed, python_command
from tests.dist.runs import PATIENCE, QUIET, scratch, sharded_zero3
from tests.support.golden_tokenizers import GOLDEN, VQVAE_OPTIONS, VQVAE_WEIGHTS

BASE = GOLDEN / "var_depth2.pth"
SHAPE = {"depth": 2, "num_classes": 10, "vocab_size": 64, "scales": [1, 2, 3, 4]}
DECAY = 0.75
TOKENIZER = (f"tokenizer.weights={VQVAE_WEIGHTS}", f"tokenizer.options={VQVAE_OPTIONS}")
SETTINGS = (
    *TOKENIZER, *QUIET, f"model.overrides={SHAPE}", f"model.weights={BASE}", "model.activation_checkpointing=true",
    f"model.ema_decay={DECAY}", "batch.global_size=8", "batch.micro_size=2", "batch.max_steps=2",
    "optimizer.learning_rate=1e-3", "schedule.warmup_epochs=0", "checkpoint.every_steps=1", "checkpoint.keep_last=2",
    "logging.every_steps=1", "sampling.top_k=20", "baseline.check=true", "baseline.nll_band=null",
)  # fmt: skip


@functools.cache
def pictures() -> Path:
    """Sixteen smooth pictures of 80 pixels in four classes, as a folder of ImageNet's layout."""
    folder, draw = scratch() / "pictures", np.random.default_rng(0)
    for number in range(16):
        coarse = Image.fromarray(draw.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        path = folder / f"n0{number % 4}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse.resize((80, 80), Image.Resampling.BICUBIC).save(path)
    return folder


@functools.cache
def codes() -> Path:
    """The table of codes of two random crops of each picture."""
    table = scratch() / "var_codes"
    crops = ("data.image_size=64", "data.crops_per_image=2")
    arguments = ["--recipe", "var-d16", "--source", pictures(), "--output", table, "--precision", "fp32"]
    assert encode.main([*map(str, arguments), "--device", "cpu", "--set", *TOKENIZER, *crops]) == 0
    return table


@functools.cache
def drawn() -> Path:
    """Forty images of the base model as a table of codes."""
    table = scratch() / "var_generated"
    settings = (*TOKENIZER, f"model.overrides={SHAPE}", "sampling.top_k=0", "sampling.top_p=1")
    arguments = ["--recipe", "var-d16", "--weights", BASE, "--output", table, "--codes"]
    assert sample.main([*map(str, arguments), "--set", *settings, "sampling.images_per_class=4"]) == 0
    return table


@functools.cache
def var_run(conditioned: bool = False, loss: str = "cca", generated: str | None = None) -> Path:
    """The folder of a run of two steps in float32, with a checkpoint after each; of a model conditioned on lambda.

    `generated` is "table" or "online" for DDO.
    """
    folder = scratch() / f"var_run_{loss}{generated or ''}{'_conditioned' if conditioned else ''}"
    arguments = ["--ds_config", sharded_zero3(), "--recipe", "var-d16", "--output", folder]
    arguments += ["--set", *SETTINGS, f"data.codes={codes()}", f"model.lambda_conditioning={conditioned}"]
    images = drawn() if generated == "table" else generated or "null"
    arguments += [f"loss.name={loss}", f"data.generated={images}"]
    with ForkedRanks(python_command("cca_ds/train.py", list(map(str, arguments))), 2, None, None) as ranks:
        if any(output.returncode for output in ranks.wait(PATIENCE)):
            raise RanksFailed(f"a rank failed\n{ranks.tails()}")
    return folder
