"""A short run on two ranks under ZeRO-3, made once and used by the tests of what comes after training."""

import functools
import tempfile
from pathlib import Path

from tests.support.two_ranks import torchrun

DECAY = 0.75
SETTINGS = [
    f"model.ema_decay={DECAY}", "batch.max_steps=2", "optimizer.learning_rate=1e-3", "baseline.check=false",
    "checkpoint.every_steps=1", "checkpoint.keep_last=3", "logging.sample_every_steps=null",
    "logging.tensorboard=false", "data.workers=0",
]  # fmt: skip


@functools.cache
def trained_run() -> Path:
    """The folder of a run of two steps on the digits with a checkpoint after each and a moving average.

    Its weights start at the shipped base model, in float32, whatever the device.
    """
    folder = Path(tempfile.mkdtemp(prefix="trained_run_")) / "run"
    torchrun("cca_ds/train.py", "--ds_config", "ds_configs/zero3.json", "--output", folder, "--set", *SETTINGS)
    return folder
