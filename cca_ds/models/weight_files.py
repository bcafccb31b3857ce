"""Files of weights: reading any published one safely, replacing one whole or not at all, and hashing what they hold.

A file's format is read from its first bytes, never from its name. Pickles are read with `weights_only=True`, which
runs no code of theirs.
"""

import hashlib
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cca_ds.config.variants import Registry
from cca_ds.files import atomic_path
from cca_ds.untrusted import parse_json

# where the programs keep the model's own state, the outermost first
_WRAPPERS = ("model", "module", "state_dict", "trainer", "var_wo_ddp")


class WeightsError(ValueError):
    """A file of weights that cannot be read, written, or does not fit the model; one line, with the remedy."""


@dataclass(frozen=True)
class WeightsKind:
    """What the weights files of one family or tokenizer hold, and how to recognise them.

    Attributes:
        name: for messages, with its article: "a LlamaGen transformer".
        marker: name of a tensor that no other kind has.
        computed: tensors that are computed, not learned: a file may hold them or not, and they are not loaded.
        counted: statistics of the original's training: a file may hold them or not.
        sizes: tensor -> (dimension, what its length counts), to explain why shapes differ, in order of preference.
        sequence_length: (tensors of a file) -> codes an image, None where they do not show it.
    """

    name: str
    marker: str
    computed: frozenset[str] = frozenset()
    counted: frozenset[str] = frozenset()
    sizes: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    sequence_length: Callable[[Mapping[str, Tensor]], int | None] = lambda state: None


KINDS: Registry[WeightsKind] = Registry("weights")


def state_hash(state: Mapping[str, Tensor]) -> str:
    """sha256, in hexadecimal, over the names, shapes and float32 values of tensors, in the order of their names.

    The same for a module's parameters (`dict(module.named_parameters())`) in any dtype that holds the same values.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name}{list(tensor.shape)}".encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def is_safetensors(path: Path) -> bool:
    """Whether the file begins as safetensors does: the header's length, then its JSON."""
    with open(path, "rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") < 2**27


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a safetensors file; of any other file, nothing."""
    path = existing_file(path)
    if not is_safetensors(path):
        return {}
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            found = parse_json(file.read(length)).get("__metadata__", {})
            return {str(name): str(value) for name, value in found.items()}
        except (ValueError, AttributeError):
            raise _damaged(path) from None


def existing_file(path: str | Path) -> Path:
    """The path, once it is known to be a file with something in it."""
    path = Path(path)
    if not path.exists():
        raise WeightsError(f"weights file {path} does not exist: check the path")
    if path.is_dir():
        raise WeightsError(f"weights file {path} is a folder: name the file in it")
    if not path.is_file():
        raise WeightsError(f"weights file {path} is a pipe or a device: name a file")
    if path.stat().st_size == 0:
        raise WeightsError(f"weights file {path} is empty: copy it again")
    return path


def _damaged(path: Path) -> WeightsError:
    size = path.stat().st_size
    return WeightsError(f"weights file {path} is truncated or damaged ({size:,} bytes): copy it again")


def _load_pickle(path: Path) -> Any:
    with open(path, "rb") as file:
        is_zip = file.read(2) == b"PK"
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        what = re.search(r"GLOBAL ([\w.]+)", str(error))
        if what is None:
            raise _damaged(path) from None
        raise WeightsError(
            f"weights file {path} holds pickled code ({what[1]}), not tensors alone, and was not loaded: "
            "save its state_dict on the machine it comes from"
        ) from None
    except Exception:  # of a damaged file torch's reader may raise anything
        raise _damaged(path) from None


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, ValueError):
        raise _damaged(path) from None


def _unwrap(path: Path, state: Any) -> dict[str, Tensor]:
    for _ in range(len(_WRAPPERS) + 1):  # a file may refer to itself
        if not isinstance(state, dict):
            break
        if any(isinstance(value, Tensor) for value in state.values()):
            return {key: value for key, value in state.items() if isinstance(value, Tensor)}
        inner = [state[key] for key in _WRAPPERS if isinstance(state.get(key), dict)]
        if not inner:
            break
        state = inner[0]
    raise WeightsError(f"weights file {path} holds no tensors under any of the published layouts")


def _plain_key(key: str) -> str:
    key = key.replace("_orig_mod.", "")
    while key.startswith("module."):
        key = key.removeprefix("module.")
    return key


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Every tensor of a weights file by its plain name, on the CPU, mapped into memory where the file allows
    it.

    Reads safetensors and torch files: flat, or under "model", "module", "state_dict", "trainer" or the
    trainer's "var_wo_ddp"; prefixes `_orig_mod.` (torch.compile) and `module.` (DDP) are taken off. Raises
    WeightsError.
    """
    path = existing_file(path)
    state = _load_safetensors(path) if is_safetensors(path) else _unwrap(path, _load_pickle(path))
    if wrong := next((key for key in state if not isinstance(key, str)), None):
        raise WeightsError(f"weights file {path} names a tensor {wrong!r}, which is no text: save its state_dict again")
    if plain := next((problem for key, value in state.items() if (problem := _not_plain(key, value))), None):
        raise WeightsError(f"weights file {path}: {plain}; save its state_dict as plain tensors again")
    return {_plain_key(key): value for key, value in state.items()}


def _not_plain(name: str, tensor: Tensor) -> str | None:
    """Why a tensor holds no numbers that a model takes; None where it does. Its values are not read."""
    if tensor.is_meta:
        return f"{name} has a shape and no values"
    if tensor.layout != torch.strided:
        return f"{name} is sparse"
    if tensor.is_quantized:
        return f"{name} is quantized"
    return None


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write` with a sibling name, flush to disk and rename: `path` is there whole or not at all.

    Raises WeightsError where it cannot be written, and leaves nothing behind.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as partial:
            write(partial)
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch and safetensors wrap the system's errors in their own
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise WeightsError(f"cannot write weights to {path}: {reason}") from None
