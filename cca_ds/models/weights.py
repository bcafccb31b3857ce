"""Weights in and out: every published layout of both families and their tokenizers, and safetensors.

LlamaGen B, L, XL    {"model": state}                    VAR             state
LlamaGen XXL, 3B     state                               VAR's trainer   {"trainer": {"var_wo_ddp": state}}
LlamaGen, DeepSpeed  {"module": state}                   CCA's VAR       {"trainer": state}
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cca_ds.models.layers import LambdaEmbedding
from cca_ds.models.weight_files import WeightsError, read_metadata, read_weights, replace_file

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # as recipes name them
LAYOUTS = ("llamagen", "var", "safetensors")
_NAMED_KEYS = 5  # of each kind of problem in an error's one line

# tensors that are computed or counted, not learned: their absence is no error, nor their presence
_COMPUTED = frozenset({"freqs_cis", "lvl_1L", "attn_bias_for_masking"})
_COUNTED = frozenset({"quantize.codebook_used", "quantize.ema_vocab_hit_SV"})
_LAMBDA = "lambda_embedding."
_CLASSES = ("cls_embedding.embedding_table.weight", "class_emb.weight")

# a name that only one kind of file has
_KINDS = {
    "tok_embeddings.weight": "a LlamaGen transformer",
    "word_embed.weight": "a VAR transformer",
    "quantize.quant_resi.qresi_ls.0.weight": "VAR's tokenizer",
    "encoder.conv_blocks.0.res.0.conv1.weight": "LlamaGen's tokenizer",
}


def expected_shapes(module: nn.Module) -> dict[str, torch.Size]:
    """Key -> shape of everything a weights file must hold for `module`; the full shape under ZeRO-3, too."""
    state = module.state_dict(keep_vars=True)
    return {
        key: getattr(value, "ds_shape", value.shape) for key, value in state.items() if key not in _COMPUTED
    }


def _kind(keys: Iterable[str]) -> str | None:
    keys = set(keys)
    return next((name for key, name in _KINDS.items() if key in keys), None)


def _named(what: str, items: list[str]) -> list[str]:
    """ "385 missing: a, b, c, d, e and 380 more"."""
    more = f" and {len(items) - _NAMED_KEYS:,} more" if len(items) > _NAMED_KEYS else ""
    return [f"{len(items):,} {what}: {', '.join(items[:_NAMED_KEYS])}{more}"] if items else []


def check_weights(expected: Mapping[str, torch.Size], state: Mapping[str, Tensor], path: str | Path) -> None:
    """Raise WeightsError unless `state`, read from `path`, has the tensors of `expected`, in their shapes.

    Its one line counts the missing, unexpected and mis-shaped keys and names the first few of each.
    Computed tensors (rotary table, masks, counts) may be there or not. A model conditioned on lambda takes a
    base model's weights: its lambda embedding then stays as it starts, without effect.
    """
    found, wanted = _kind(state), _kind(expected)
    if found != wanted and found and wanted:
        raise WeightsError(
            f"weights file {path} holds {found}, but {wanted} is asked for: name the other file"
        )
    conditioned = any(key.startswith(_LAMBDA) for key in expected)
    if not conditioned and any(key.startswith(_LAMBDA) for key in state):
        raise WeightsError(
            f"weights file {path} holds a model conditioned on lambda: set lambda_conditioning=true to load it"
        )
    base_model = conditioned and not any(key.startswith(_LAMBDA) for key in state)
    optional = _COUNTED | {key for key in expected if base_model and key.startswith(_LAMBDA)}
    missing = [key for key in expected if key not in state and key not in optional]
    unexpected = [key for key in state if key not in expected and key not in _COMPUTED | _COUNTED]
    shapes = {
        key: (list(state[key].shape), list(shape))
        for key, shape in expected.items()
        if key in state and state[key].shape != shape
    }
    misshaped = [
        f"{key} is {found} in the file and {wanted} in the model" for key, (found, wanted) in shapes.items()
    ]
    problems = _named("missing", missing) + _named("unexpected", unexpected) + _named("mis-shaped", misshaped)
    if problems:
        hint = _size_hint(shapes)
        raise WeightsError(f"weights file {path} does not fit the model{hint}: {'; '.join(problems)}")


def _size_hint(shapes: Mapping[str, tuple[list[int], list[int]]]) -> str:
    """Why shapes differ, where one tensor tells: the image size, the vocabulary or the number of classes."""
    reasons = {
        "pos_1LC": (1, "codes an image"),
        "tok_embeddings.weight": (0, "codes in the vocabulary"),
        "head.weight": (0, "codes in the vocabulary"),
        "quantize.embedding.weight": (0, "codes in the codebook"),
        "cls_embedding.embedding_table.weight": (0, "classes, the null class among them"),
        "class_emb.weight": (0, "classes, the null class among them"),
    }
    for key, (dimension, what) in reasons.items():
        if key in shapes and shapes[key][0][dimension] != shapes[key][1][dimension]:
            return f", which has {shapes[key][1][dimension]} {what}, the file {shapes[key][0][dimension]}"
    return ""


def _check_sequence_length(module: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> None:
    """LlamaGen's learned tensors are alike at every image size; its rotary table and our metadata are not."""
    length = getattr(module, "sequence_length", None)
    if not isinstance(length, int):
        return
    found = read_metadata(path).get("sequence_length")
    if found is None and "freqs_cis" in state:
        found = state["freqs_cis"].shape[0] - 1
    if found is not None and int(found) != length:
        raise WeightsError(
            f"weights file {path} is for {found} codes an image, the model has {length}: "
            "take the checkpoint of the other image size, or set sequence_length"
        )


def load_weights(module: nn.Module, path: str | Path) -> None:
    """Load a file in any published layout into a model or tokenizer, in place, cast to the module's dtype.

    Raises WeightsError, before anything is changed, for a file that is missing, damaged or holds code, and
    for one that does not fit, counting and naming missing, unexpected and mis-shaped keys. Parameters on the
    meta device take the file's tensors as they are.
    """
    state = read_weights(path)
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
    model_card: str | None = None,
) -> None:
    """Write a model's weights in a published layout, whole or not at all.

    "llamagen" is LlamaGen's `.pt` (under "model" for B, L and XL, flat for XXL and 3B, as the program expects
    them), "var" is VAR's flat `.pth` with the masks that its strict loading asks for, "safetensors" has the
    config and `metadata` in its header and, with `model_card`, a README.md beside it. `state` are the full
    tensors where the module's own are sharded; `dtype` casts the floating-point ones. Raises WeightsError.
    """
    path = Path(path)
    if layout not in LAYOUTS:
        raise WeightsError(f"layout {layout!r} is unknown: choose one of {', '.join(LAYOUTS)}")
    family = getattr(module, "family", None)
    if layout != "safetensors" and layout != family:
        raise WeightsError(
            f"layout {layout!r} is for {layout} models, this one is {family}: choose another layout"
        )
    tensors = _detached(module.state_dict() if state is None else state, dtype)
    if layout == "safetensors":
        header = {"format": "pt", **_described(module), **(metadata or {})}
        replace_file(path, lambda draft: save_file(tensors, draft, metadata=header))
        if model_card is not None:
            replace_file(path.with_name("README.md"), lambda draft: draft.write_text(model_card) and None)
        return
    if family == "var":
        tensors |= _var_masks(module.config.scales)
    flat = family == "var" or _published_flat(module)
    replace_file(path, lambda draft: torch.save(tensors if flat else {"model": tensors}, draft))


def fix_lambda(state: Mapping[str, Tensor], lambda_: float) -> dict[str, Tensor]:
    """An ordinary model's weights out of a lambda-conditioned one's: that lambda's embedding is in every class's.

    `state` are the full tensors, in float32.
    """
    plain = {key: value for key, value in state.items() if not key.startswith(_LAMBDA)}
    classes = next(key for key in _CLASSES if key in plain)
    embedding = LambdaEmbedding(plain[classes].shape[1])
    embedding.load_state_dict({key.removeprefix(_LAMBDA): state[key] for key in state.keys() - plain.keys()})
    with torch.no_grad():
        plain[classes] = plain[classes] + embedding(torch.tensor([lambda_]).log())
    return plain


def _detached(state: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Contiguous copies where needed, so that a file holds each tensor's own values and nothing else."""
    tensors = {}
    for key, value in state.items():
        value = value.detach().to(
            "cpu", dtype if dtype is not None and value.is_floating_point() else value.dtype
        )
        if value.untyped_storage().nbytes() != value.nbytes:  # a view: torch.save would write all behind it
            value = value.clone()
        tensors[key] = value.contiguous()
    return tensors


def _described(module: nn.Module) -> dict[str, str]:
    """Header entries that say what the weights are: family, codes an image, and the config's shape."""
    config = getattr(module, "config", None)
    if config is None or not hasattr(module, "family"):
        return {}
    entries = {
        key: str(value) for key, value in asdict(config).items() if not key.endswith(("dropout", "drop_path"))
    }
    return {**entries, "family": module.family, "sequence_length": str(module.sequence_length)}


def _published_flat(module: nn.Module) -> bool:
    """Whether LlamaGen of this shape is published without a wrapper: XXL and 3B are."""
    return (module.config.n_layer, module.config.dim) in {(48, 1536), (24, 3200)}


def _var_masks(scales: Iterable[int]) -> dict[str, Tensor]:
    """VAR's two computed tensors: the scale of each position, [1, L], and the block-causal bias, [1, 1, L,
    L].
    """
    level_L = torch.cat([torch.full((side * side,), level) for level, side in enumerate(scales)])
    hidden_LL = level_L[:, None] < level_L[None, :]
    bias_LL = torch.zeros(hidden_LL.shape).masked_fill(hidden_LL, -torch.inf)
    return {"lvl_1L": level_L[None], "attn_bias_for_masking": bias_LL[None, None]}
