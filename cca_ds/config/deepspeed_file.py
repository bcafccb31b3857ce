"""DeepSpeed's JSON beside the recipe: "auto" is filled from the recipe, a contradiction of it is refused.

Global batch, micro-batch, accumulation, precision, clipping and the optimizer are set by the recipe only.
"""

from __future__ import annotations

import argparse
import copy
import difflib
from pathlib import Path
from typing import Any

from cca_ds.config.deepspeed_keys import KNOWN
from cca_ds.config.recipes import PACKAGE, ConfigError
from cca_ds.config.schema import RunConfig
from cca_ds.files import expand
from cca_ds.untrusted import parse_json, regular_file

_MISSING = object()
LARGEST_FILE = 2**20  # bytes
# the shipped files: inside an installed package, or beside the package in its repository
SHIPPED = PACKAGE / "ds_configs" if (PACKAGE / "ds_configs").is_dir() else PACKAGE.parent / "ds_configs"


def add_ds_config_argument(parser: argparse.ArgumentParser) -> None:
    """`--ds_config`, and the name that Hugging Face's scripts give it."""
    parser.add_argument(
        "--ds_config", "--deepspeed_config", default="zero3", metavar="FILE",
        help="DeepSpeed's JSON, or the name of a shipped one (default: zero3)",
    )  # fmt: skip


def find_ds_config(name: str | Path) -> Path:
    """The file of that path, else the shipped one of that name, with or without ".json".

    Raises:
        ConfigError: neither is there; names the shipped ones.
    """
    path = expand(name)
    shipped = {p.stem: p for p in sorted(SHIPPED.glob("*.json"))}
    if path.is_file():
        return path
    if path.parent == Path() and path.name.removesuffix(".json") in shipped:
        return shipped[path.name.removesuffix(".json")]
    raise ConfigError([f"--ds_config {path}: no such file; the shipped ones are {', '.join(shipped)}"])


def read_ds_config(path: str | Path) -> dict[str, Any]:
    """Raises ConfigError: no such file, not JSON, not an object."""
    path = find_ds_config(path)
    try:
        tree = parse_json(regular_file(path, largest=LARGEST_FILE).read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ConfigError([f"--ds_config {path}: not JSON ({' '.join(str(error).split())})"]) from None
    if not isinstance(tree, dict):
        raise ConfigError([f"--ds_config {path}: holds a {type(tree).__name__}, not an object"])
    return tree


def _unknown_keys(ds: dict[str, Any], source: str) -> list[str]:
    found = []
    for section, known in KNOWN.items():
        tree = ds.get(section, {}) if section else ds
        if not isinstance(tree, dict):
            found.append(f"{source}: {section}={tree!r} is no section of keys")
            continue
        for key in tree.keys() - known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else "; DeepSpeed would ignore it, so remove it"
            found.append(f"{source}: {section}{'.' if section else ''}{key}: unknown key{hint}")
    return sorted(found)


def conflicts(ds: dict[str, Any], run: RunConfig, source: str = "ds_config") -> list[str]:
    """Keys of the DeepSpeed file that there are not, and where it contradicts the recipe: one line each."""
    found = _unknown_keys(ds, source)
    for key, recipe_key, value in _shared_values(run):
        given = _look_up(ds, key)
        if given is not _MISSING and given != "auto" and value is not _MISSING and not _same(given, value):
            found.append(f'{source}: {key}={given!r} but the recipe has {recipe_key}={value!r}; write "auto"')
    stage = zero_stage(ds)
    if stage not in (0, 1, 2, 3):
        found.append(f"{source}: zero_optimization.stage={stage!r} is none of 0, 1, 2, 3")
    if stage == 0 and "fp16" in (run.precision, _precision_of_file(ds) if run.precision == "auto" else None):
        # seen with DeepSpeed 0.19.8: the loss is not multiplied by the scale, the gradients are divided by it
        found.append(
            f"{source}: zero_optimization.stage=0 with precision=fp16 loses DeepSpeed's loss scaling; use stage 1, "
            "2 or 3, or precision=bf16"
        )
    if _look_up(ds, "zero_optimization.round_robin_gradients") is True:
        # seen with DeepSpeed 0.19.8 on two ranks: zero_to_fp32 puts the weights together in another order
        found.append(
            f"{source}: zero_optimization.round_robin_gradients=true makes checkpoints whose weights come out "
            "of their shards in the wrong order; set it to false"
        )
    if "scheduler" in ds:
        found.append(f"{source}: has a scheduler, but the recipe's schedule section sets the learning rate; drop it")
    kind = str(_look_up(ds, "optimizer.type"))
    if "optimizer" in ds and kind.lower() not in ("adamw", "auto"):
        found.append(f"{source}: optimizer.type={kind} but the recipe has optimizer.name=adamw")
    steps = _look_up(ds, "gradient_accumulation_steps")
    if steps not in (_MISSING, "auto"):
        found.append(
            f"{source}: gradient_accumulation_steps={steps!r} but it follows from the recipe's "
            f"batch.global_size={run.batch.global_size}, batch.micro_size={run.batch.micro_size} and the "
            'number of ranks; write "auto"'
        )
    for precision in ("bf16", "fp16"):
        enabled = _look_up(ds, f"{precision}.enabled")
        if enabled is True and run.precision not in ("auto", precision):
            found.append(f"{source}: {precision}.enabled=true but the recipe has precision={run.precision}")
        if enabled is False and run.precision == precision:
            found.append(f"{source}: {precision}.enabled=false but the recipe has precision={run.precision}")
    if _look_up(ds, "bf16.enabled") is True and _look_up(ds, "fp16.enabled") is True:
        found.append(f"{source}: bf16.enabled and fp16.enabled are both true; choose one")
    return found


def zero_stage(ds: dict[str, Any]) -> Any:
    """The file's ZeRO stage; DeepSpeed's own default is 0."""
    stage = _look_up(ds, "zero_optimization.stage")
    return 0 if stage is _MISSING else stage


def resolve_precision(ds: dict[str, Any], run: RunConfig, has_gpu: bool) -> str:
    """ "bf16", "fp16" or "fp32": the recipe's, else what the file switches on, else what suits the device.

    Raises:
        ConfigError: fp16 without a GPU.
    """
    precision = run.precision
    if precision == "auto":
        precision = _precision_of_file(ds)
    if precision == "auto":
        precision = "bf16" if has_gpu and _look_up(ds, "bf16.enabled") is not False else "fp32"
    if precision == "fp16" and not has_gpu:
        raise ConfigError(["precision=fp16 needs a GPU; on a CPU use precision=fp32 or bf16"])
    return precision


def _precision_of_file(ds: dict[str, Any]) -> str:
    """What the file switches on; "auto" where that is nothing."""
    return next((name for name in ("bf16", "fp16") if _look_up(ds, f"{name}.enabled") is True), "auto")


def fill_ds_config(
    ds: dict[str, Any],
    run: RunConfig,
    *,
    world_size: int,
    forwards: int,
    micro_size: int,
    precision: str,
    fused: bool = False,
) -> dict[str, Any]:
    """The file with every "auto" filled; `fused` takes PyTorch's fused AdamW where the weights' update is on a GPU.

    DeepSpeed requires batch = micro-batch x forwards x ranks. Where the ranks' shares differ, its micro-batch is
    the largest share's; the loss carries each share's true weight (see `training/policy.py`).
    """
    filled = copy.deepcopy(ds)
    filled["train_micro_batch_size_per_gpu"] = micro_size
    filled["gradient_accumulation_steps"] = forwards
    filled["train_batch_size"] = micro_size * forwards * world_size
    filled["gradient_clipping"] = run.optimizer.grad_clip
    for name in ("bf16", "fp16"):
        section = filled.setdefault(name, {})
        section["enabled"] = precision == name
    if precision == "fp32":
        filled.pop("data_types", None)
    optimizer = filled.setdefault("optimizer", {"params": {"torch_adam": True}})
    optimizer["type"] = "AdamW"
    optimizer.setdefault("params", {}).update(
        lr=run.optimizer.learning_rate,
        betas=list(run.optimizer.betas),
        eps=run.optimizer.eps,
        weight_decay=run.optimizer.weight_decay,
    )
    filled.setdefault("steps_per_print", 10**9)
    zero = filled.get("zero_optimization", {})
    on_host = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
    if fused and not on_host and optimizer["params"].get("torch_adam"):
        optimizer["params"].setdefault("fused", True)
    if zero.get("stage") == 3:
        zero["memory_efficient_linear"] = False  # else torch's linear is replaced for the whole process
    return filled


def _shared_values(run: RunConfig) -> list[tuple[str, str, Any]]:
    """(key in the DeepSpeed file, key in the recipe, the recipe's value)."""
    optimizer = run.optimizer
    return [
        ("train_batch_size", "batch.global_size", run.batch.global_size),
        ("train_micro_batch_size_per_gpu", "batch.micro_size", _number(run.batch.micro_size)),
        ("gradient_clipping", "optimizer.grad_clip", optimizer.grad_clip),
        ("optimizer.params.lr", "optimizer.learning_rate", optimizer.learning_rate),
        ("optimizer.params.betas", "optimizer.betas", list(optimizer.betas)),
        ("optimizer.params.eps", "optimizer.eps", optimizer.eps),
        ("optimizer.params.weight_decay", "optimizer.weight_decay", optimizer.weight_decay),
    ]


def _number(value: Any) -> Any:
    """A recipe's value; missing where it is "auto", which contradicts nothing."""
    return _MISSING if value == "auto" else value


def _look_up(tree: Any, path: str) -> Any:
    for part in path.split("."):
        if not isinstance(tree, dict) or part not in tree:
            return _MISSING
        tree = tree[part]
    return tree


def _same(given: Any, value: Any) -> bool:
    if isinstance(given, list):
        return list(given) == list(value)
    return isinstance(given, int | float) and float(given) == float(value)
