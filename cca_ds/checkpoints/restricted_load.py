"""DeepSpeed's checkpoint files read without running code from them.

They are pickles, which may name any function to call, and DeepSpeed loads them as such. Within `restricted_load` every
`torch.load` of the process, DeepSpeed's included, builds tensors, plain containers and the few classes of DeepSpeed
that its state holds, and refuses all else.

    python -m cca_ds.checkpoints.restricted_load FROM TO     # DeepSpeed's conversion to its universal form, under it
"""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from cca_ds.checkpoints.errors import CheckpointError

_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def _allowed() -> dict[str, Any]:
    """Name in a pickle -> what it stands for: classes of DeepSpeed that run no code of their own."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    def stage_of_name(kind: Any, name: Any) -> ZeroStageEnum:
        """What Python 3.11.0 to 3.11.3 wrote a stage as: getattr(ZeroStageEnum, "weights"), and nothing else."""
        if kind is not ZeroStageEnum or name not in ZeroStageEnum.__members__:
            raise pickle.UnpicklingError(f"getattr of {name!r}")
        return ZeroStageEnum[name]

    kinds = (DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address)
    return {f"{kind.__module__}.{kind.__qualname__}": kind for kind in kinds} | {"builtins.getattr": stage_of_name}


@contextlib.contextmanager
def restricted_load(checkpoint: Path, files: Iterable[Path]) -> Iterator[None]:
    """Check files of a checkpoint, then let `torch.load` within the block build nothing but tensors and plain state.

    Args:
        checkpoint: its folder, for messages.
        files: those that will be loaded.

    Raises:
        CheckpointError: a file that imports anything else, or that is no file of `torch.save`.
    """
    allowed = _allowed()
    for path in files:
        try:
            imported = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        except (OSError, RuntimeError, ValueError, KeyError, EOFError, zipfile.BadZipFile, pickle.UnpicklingError):
            raise CheckpointError(
                f"checkpoint {checkpoint}: {path.name} is not a file that this program wrote; use an older checkpoint"
            ) from None
        if foreign := sorted(set(imported) - allowed.keys()):
            raise CheckpointError(
                f"checkpoint {checkpoint}: {path.name} would run code when loaded ({', '.join(foreign)}) and was not "
                "opened; a checkpoint of this program has none, so do not trust this one"
            )
    before = os.environ.get(_FORCE)
    os.environ[_FORCE] = "1"
    try:
        with torch.serialization.safe_globals([(kind, name) for name, kind in allowed.items()]):
            yield
    except pickle.UnpicklingError as error:
        cause = " ".join(str(error).split())[:200]
        raise CheckpointError(f"checkpoint {checkpoint}: would run code when loaded ({cause})") from None
    finally:
        os.environ.pop(_FORCE)
        if before is not None:
            os.environ[_FORCE] = before


def main(source: str, target: str) -> None:
    """Convert DeepSpeed's files of one number of ranks to the form that any number reads."""
    from deepspeed.checkpoint import ds_to_universal

    flags = ["--input_folder", source, "--output_folder", target, "--inject_missing_state"]
    sys.argv = ["ds_to_universal", *flags]
    with restricted_load(Path(source).parent, sorted(Path(source).glob("*.pt"))):
        ds_to_universal.main(ds_to_universal.parse_arguments())


if __name__ == "__main__":
    main(*sys.argv[1:])
