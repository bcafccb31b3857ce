"""Weights in and out: every published layout of the families and their tokenizers, and safetensors.

LlamaGen B, L, XL    {"model": state}                    VAR             state
LlamaGen XXL, 3B     state                               VAR's trainer   {"trainer": {"var_wo_ddp": state}}
LlamaGen, DeepSpeed  {"module": state}                   CCA's VAR       {"trainer": state}
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from cca_ds.files import save_safetensors
from cca_ds.models.base import Family, shape_of
from cca_ds.models.conditioning import CONDITIONINGS, LAMBDA
from cca_ds.models.registry import FAMILIES, family_of_model
from cca_ds.models.weight_files import KINDS, WeightsError, WeightsKind, read_metadata, read_weights, replace_file

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # as recipes name them
SAFETENSORS = "safetensors"  # the layout that every module can be saved in
_NAMED_KEYS = 5  # of each kind of problem in an error's one line


def layouts() -> list[str]:
    """Layouts that `save_weights` knows: the families' published ones, and safetensors."""
    return [*(layout for family in FAMILIES.values() for layout in family.layouts), SAFETENSORS]


def expected_shapes(module: nn.Module) -> dict[str, torch.Size]:
    """Key -> shape of everything a weights file must hold for `module`; the full shape under ZeRO-3, too."""
    state, computed = module.state_dict(keep_vars=True), _computed()
    return {key: getattr(value, "ds_shape", value.shape) for key, value in state.items() if key not in computed}


def _computed() -> set[str]:
    return {key for kind in KINDS.values() for key in kind.computed}


def _kind(keys: Iterable[str]) -> WeightsKind | None:
    keys = set(keys)
    return next((kind for kind in KINDS.values() if kind.marker in keys), None)


def _named(what: str, items: list[str]) -> list[str]:
    """ "385 missing: a, b, c, d, e and 380 more"."""
    more = f" and {len(items) - _NAMED_KEYS:,} more" if len(items) > _NAMED_KEYS else ""
    return [f"{len(items):,} {what}: {', '.join(items[:_NAMED_KEYS])}{more}"] if items else []


def check_weights(expected: Mapping[str, torch.Size], state: Mapping[str, Tensor], path: str | Path) -> None:
    """Raise WeightsError unless `state`, read from `path`, has the tensors of `expected`, in their shapes.

    Its one line counts the missing, unexpected and mis-shaped keys and names the first few of each.
    Computed tensors (rotary table, masks, counts) may be there or not. A conditioned model takes a base model's
    weights: its embedding of the number then stays as it starts, without effect.
    """
    kind, own_kind = _kind(state), _kind(expected)
    if kind and own_kind and kind is not own_kind:
        raise WeightsError(f"weights file {path} holds {kind.name}, but {own_kind.name} is needed: name the other file")
    absent: tuple[str, ...] = ()  # embeddings that a base model's file lacks
    for number in CONDITIONINGS:
        expects, holds = (any(key.startswith(number.prefix) for key in keys) for keys in (expected, state))
        if holds and not expects:
            raise WeightsError(
                f"weights file {path} holds a model conditioned on {number.title}: set {number.switch}=true to load it"
            )
        absent += (number.prefix,) if expects and not holds else ()
    counted = {key for kind in KINDS.values() for key in kind.counted}
    optional = counted | {key for key in expected if key.startswith(absent)}
    missing = [key for key in expected if key not in state and key not in optional]
    unexpected = [key for key in state if key not in expected and key not in _computed() | counted]
    shapes = {
        key: (list(state[key].shape), list(shape))
        for key, shape in expected.items()
        if key in state and state[key].shape != shape
    }
    misshaped = [f"{key} is {found} in the file and {wanted} in the model" for key, (found, wanted) in shapes.items()]
    fitting = {key: state[key] for key in expected if key in state and key not in shapes}
    mistyped = [f"{key} is {str(value.dtype).removeprefix('torch.')}" for key, value in fitting.items()
                if not value.is_floating_point()]  # fmt: skip
    problems = _named("missing", missing) + _named("unexpected", unexpected) + _named("mis-shaped", misshaped)
    problems += _named("not of floating point", mistyped)
    if not problems:
        problems = _named("with values that are no numbers", [k for k, v in fitting.items() if not v.isfinite().all()])
    if problems:
        hint = _size_hint(own_kind, shapes)
        raise WeightsError(f"weights file {path} does not fit the model{hint}: {'; '.join(problems)}")


def _size_hint(kind: WeightsKind | None, shapes: Mapping[str, tuple[list[int], list[int]]]) -> str:
    """Why shapes differ, where one tensor shows it: the image size, the vocabulary or the number of classes."""
    for key, (dimension, what) in kind.sizes.items() if kind else ():
        if key in shapes and shapes[key][0][dimension] != shapes[key][1][dimension]:
            return f", which has {shapes[key][1][dimension]} {what}, the file {shapes[key][0][dimension]}"
    return ""


def _check_sequence_length(module: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> None:
    """Raise WeightsError for a file of another image size, which the learned tensors' shapes need not show."""
    length = getattr(module, "sequence_length", None)
    if not isinstance(length, int):
        return
    found, kind = read_metadata(path).get("sequence_length"), _kind(state)
    if found is None and kind is not None:
        found = kind.sequence_length(state)
    if found is not None and int(found) != length:
        raise WeightsError(
            f"weights file {path} is for {found} codes an image, the model has {length}: "
            "take the checkpoint of the other image size, or set sequence_length"
        )


def with_own_classes(state: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """A model's weights with the module's own rows for its classes, and the state's for the null class, the last.

    Everything else is the state's. Where it has no class embedding, nothing is changed.
    """
    name = family_of_model(module).class_embedding
    if name not in state or state[name].ndim != 2 or not len(state[name]):
        return dict(state)
    own = module.state_dict()[name]
    rows = torch.zeros(own.shape) if own.is_meta else own
    return {**state, name: torch.cat([rows[:-1].to(state[name].dtype), state[name][-1:]])}


def load_weights(module: nn.Module, path: str | Path, reset_classes: bool = False) -> None:
    """Load a file in any published layout into a model or tokenizer, in place, cast to the module's dtype.

    With `reset_classes` the class embedding keeps the module's own rows, in any number, but for the null class's.

    Raises WeightsError, before anything is changed, for a file that is missing, damaged or holds code, and
    for one that does not fit, counting and naming missing, unexpected and mis-shaped keys. Parameters on the
    meta device take the file's tensors as they are.
    """
    state = read_weights(path)
    if reset_classes:
        state = with_own_classes(state, module)
    check_weights(expected_shapes(module), state, path)
    _check_sequence_length(module, state, path)
    own = module.state_dict()
    empty = any(value.is_meta for value in own.values())
    fitting = {key: value for key, value in state.items() if key in own and value.shape == own[key].shape}
    module.load_state_dict(fitting, strict=False, assign=empty)


def save_weights(
    module: nn.Module,
    path: str | Path,
    layout: str = "safetensors",
    *,
    state: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    beside: Mapping[str, str] | None = None,
) -> None:
    """Write a module's weights to a file, whole or not at all.

    Args:
        layout: "safetensors", with the config and `metadata` in its header, or a published layout of the model's
            family: "llamagen" (`.pt`, under "model" for B, L and XL, flat for XXL and 3B, as the program expects them)
            or "var" (flat `.pth`, with the masks that its strict loading requires).
        state: the full tensors, where the module's own are sharded or on the meta device.
        dtype: to cast floating-point tensors to; None keeps theirs.
        metadata: further entries of the safetensors header.
        beside: name -> text of files to write beside a safetensors file, such as its model card.

    Raises:
        WeightsError: an unknown layout, another family's, or a place that cannot be written.
    """
    path, family = Path(path), _family(module)
    if layout not in layouts():
        raise WeightsError(f"layout {layout!r} is unknown: choose one of {', '.join(layouts())}")
    if layout != SAFETENSORS and (family is None or layout not in family.layouts):
        owner = next(other.name for other in FAMILIES.values() if layout in other.layouts)
        own = family.name if family else type(module).__name__
        raise WeightsError(f"layout {layout!r} is for {owner} models, this one is {own}: choose another layout")
    tensors = _detached(module.state_dict() if state is None else state, dtype)
    if layout == SAFETENSORS:
        header = {"format": "pt", **_described(module), **(metadata or {})}
        replace_file(path, lambda draft: save_safetensors(tensors, draft, metadata=header))
        for name, text in (beside or {}).items():
            replace_file(path.with_name(name), lambda draft, text=text: draft.write_text(text) and None)
        return
    content = family.layouts[layout](module.config, tensors)
    replace_file(path, lambda draft: torch.save(content, draft))


def _family(module: nn.Module) -> Family | None:
    return family_of_model(module) if hasattr(module, "family") else None


def fix_lambda(state: Mapping[str, Tensor], lambda_: float) -> dict[str, Tensor]:
    """An ordinary model's weights out of a lambda-conditioned one's: the embedding of one lambda, added to every class.

    Args:
        state: the model's full tensors by name, float32.
        lambda_: above 0.
    """
    plain = {key: value for key, value in state.items() if not key.startswith(LAMBDA.prefix)}
    classes = next(family.class_embedding for family in FAMILIES.values() if family.class_embedding in plain)
    embedding = LAMBDA.embedding(plain[classes].shape[1])
    embedding.load_state_dict({key.removeprefix(LAMBDA.prefix): state[key] for key in state.keys() - plain.keys()})
    with torch.no_grad():
        plain[classes] = plain[classes] + embedding(torch.tensor([lambda_]).log())
    return plain


def _detached(state: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Contiguous copies where needed, so that a file holds each tensor's own values and nothing else."""
    tensors = {}
    for key, value in state.items():
        value = value.detach().to("cpu", dtype if dtype is not None and value.is_floating_point() else value.dtype)
        if value.untyped_storage().nbytes() != value.nbytes:  # a view: torch.save would write all behind it
            value = value.clone()
        tensors[key] = value.contiguous()
    return tensors


def _described(module: nn.Module) -> dict[str, str]:
    """Header entries that describe the weights: family, codes an image, and the config's shape."""
    if _family(module) is None:
        return {}
    entries = {key: str(value) for key, value in shape_of(module).items()}
    return {**entries, "family": module.family, "sequence_length": str(module.sequence_length)}
