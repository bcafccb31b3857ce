"""From a recipe's name, its overrides and a DeepSpeed file to one checked configuration.

Every error is reported at once, before any device or process group is touched; an unknown key names the
nearest known one. Nothing here imports torch, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import math
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from cca_ds.config import original_names
from cca_ds.config.schema import RunConfig
from cca_ds.files import expand
from cca_ds.untrusted import PlainYaml, regular_file

PACKAGE = Path(__file__).parents[1]
RECIPES, ASSETS = PACKAGE / "recipes", PACKAGE / "assets"
LARGEST_RECIPE = 2**20  # bytes
DEFAULT_RECIPE = "digits"


class ConfigError(ValueError):
    """Everything that is wrong with a configuration, one line each in `problems`."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        super().__init__("\n".join(f"config error: {problem}" for problem in problems))


def recipe_names() -> list[str]:
    """Names that `--recipe` takes; files that begin with an underscore are shared bases."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml") if not path.stem.startswith("_"))


def canonical_recipe(name: str) -> str:
    """The shipped recipe that a name means ("GPT-3B" -> "llamagen-3b"); the name itself where there is none."""
    for candidate in (name.lower(), original_names.canonical_model(name)):
        if (RECIPES / f"{candidate}.yaml").is_file():
            return candidate
    return name


def _shipped_below(name_or_file: str) -> RunConfig | None:
    """The shipped recipe that a recipe is or extends; None where it stands alone."""
    seen: set[str] = set()
    while name_or_file not in ("", *seen) and not name_or_file.startswith("_"):  # a base has no model of its own
        seen.add(name_or_file)
        shipped = RECIPES / f"{canonical_recipe(name_or_file)}.yaml"
        if shipped.is_file():
            return _validate(_read_with_bases(name_or_file, []), [])
        try:
            name_or_file = str(_read_tree(expand(name_or_file)).get("extends", ""))
        except (yaml.YAMLError, ValueError, OSError, RecursionError, AttributeError):
            return None
    return None


def _without_others_figures(run: RunConfig, shipped: RunConfig) -> RunConfig:
    """Without the paper's results and the expected likelihood of a shipped recipe, where the model is another one's: of
    another shape, or from other weights than published ones or the recipe's own.
    """

    def model(recipe: RunConfig) -> tuple[Any, ...]:
        return recipe.model.preset, recipe.model.overrides, recipe.tokenizer.name, recipe.tokenizer.options

    weights = run.model.weights
    published = weights in (None, shipped.model.weights) or original_names.is_published(Path(weights).name)
    another = run.model.reset_classes or not published
    if model(run) == model(shipped) and not another:
        return run
    paper = {name: value for name, value in run.paper.items() if shipped.paper.get(name) != value}
    band = None if run.baseline.nll_band == shipped.baseline.nll_band else run.baseline.nll_band
    baseline = run.baseline.model_copy(update={"nll_band": band})
    return run.model_copy(update={"paper": paper, "baseline": baseline})


Check = Callable[[RunConfig], list[str]]


def load_recipe(
    name_or_file: str = "digits",
    overrides: list[str] | None = None,
    check: Check | None = None,
    text: str | None = None,
) -> RunConfig:
    """Read a recipe, apply `a.b=c` overrides, and check it.

    Args:
        text: a resolved recipe's YAML, as exported weights carry it, in the place of a file; `name_or_file` is then
            where it is from, for messages.
        check: further problems of a recipe that is well-formed, such as names of variants that nobody registered
            (`training.checks.recipe_problems`); commands give it.

    Raises:
        ConfigError: with every problem found, not the first.
    """
    problems: list[str] = []
    tree = _read_with_bases(name_or_file, problems) if text is None else _parse_text(name_or_file, text, problems)
    for override in overrides or []:
        _apply(tree, override, problems)
    run = _validate(tree, problems)
    if run is not None and text is None and (shipped := _shipped_below(name_or_file)):
        run = _without_others_figures(run, shipped)
    if run is not None:
        problems.extend(_contradictions(run))
        problems.extend(check(run) if check else [])
    if problems:
        raise ConfigError(problems)
    assert run is not None
    return run


# What a run may change when it is started again: it does not shape the trajectory. Sections, and keys of the others.
MAY_CHANGE = (
    "name", "deterministic", "logging", "checkpoint", "evaluation", "sampling", "distributed", "balance", "baseline",
    "paper", "data", "batch.micro_size", "model.activation_checkpointing", "model.compile", "tokenizer",
    "reference.placement", "reference.offload", "reference.cache", "reference.batch_size", "reference.ahead_steps",
    "reference.shard_steps", "reference.wait_seconds", "loss.accuracy_band",
)  # fmt: skip


def trajectory_settings(run: RunConfig) -> dict[str, Any]:
    """Key -> value of all that shapes the trajectory besides the data, whose hash is compared where it is opened."""
    tree = run.model_dump(mode="json", by_alias=True)
    flat = {name: value for name, value in tree.items() if not isinstance(value, dict)}
    flat |= {
        f"{name}.{key}": v for name, values in tree.items() if isinstance(values, dict) for key, v in values.items()
    }
    return {key: value for key, value in flat.items() if not {key, key.partition(".")[0]} & set(MAY_CHANGE)}


def config_hash(run: RunConfig) -> str:
    """sha256 of `trajectory_settings`."""
    return hashlib.sha256(json.dumps(trajectory_settings(run), sort_keys=True).encode()).hexdigest()


def changed_settings(before: dict[str, Any], run: RunConfig) -> list[str]:
    """`trajectory_settings` that differ from an earlier start's, each as KEY=OLD, not NEW."""
    now = trajectory_settings(run)
    known = [key for key in now if key in before]  # a key of a later version had no effect before
    return [f"{key}={before[key]}, not {now[key]}" for key in known if before[key] != now[key]]


def dump_recipe(run: RunConfig) -> str:
    """The resolved recipe as YAML; `load_recipe` reads it back."""
    return yaml.safe_dump(run.model_dump(mode="json", by_alias=True), sort_keys=False)


def resolve_path(path: str) -> Path:
    """`asset:NAME` is a file shipped with the package, anything else a path of the user's."""
    return ASSETS / path.removeprefix("asset:") if path.startswith("asset:") else expand(path)


def add_recipe_arguments(parser: argparse.ArgumentParser, reads: tuple[str, ...] | None = None) -> None:
    """`--recipe`, `--set`, and the names that users of the original programs know.

    Args:
        reads: keys or sections of a recipe that the command reads and the originals' flags may set; None for all.
    """
    shipped = ", ".join(recipe_names())
    parser.add_argument(
        "--recipe", metavar="NAME_OR_FILE",
        help=f"a YAML file, or a shipped recipe: {shipped} (default: {DEFAULT_RECIPE})",
    )  # fmt: skip
    parser.add_argument(
        "--set", dest="overrides", nargs="+", action="extend", default=[], metavar="KEY.PATH=VALUE",
        help="override a value of the recipe, e.g. loss.beta=0.1",
    )  # fmt: skip
    original = parser.add_argument_group("names of the original programs")
    original.add_argument("--gpt-model", "--gpt_model", dest="gpt_model",
                          help="GPT-B ... GPT-3B: that recipe; with --image-size 256 that of 256 px")  # fmt: skip
    original.add_argument("--depth", type=int, help="16, 20, 24, 30, 36: VAR's recipe of that depth")
    flags = original_names.flags_of(parser.prog, reads)
    parser.set_defaults(originals=flags)
    for name, flag in flags.items():
        kind: dict[str, Any] = {"nargs": "?", "const": "true"} if flag.switch else {}
        meaning = f"ignored: {flag.ignored}" if flag.ignored else "see docs/original_commands.md"
        if name in original_names.KEYS:
            meaning = f"same as --set {original_names.KEYS[name]}=VALUE"
        original.add_argument(
            *original_names.spellings(name), dest=f"original_{name}", metavar="VALUE", help=meaning, **kind
        )


def recipe_from_arguments(
    arguments: argparse.Namespace, check: Check | None = None, text: str | None = None
) -> RunConfig:
    """The configuration that a parsed command line names, checked as in `load_recipe`; `text` as there.

    Raises:
        ConfigError: with every problem found.
    """
    problems: list[str] = []
    translated = _translated(arguments, problems)
    if problems:
        raise ConfigError(problems)
    recipe, settings = _named_recipe(arguments), translated + arguments.overrides
    run = load_recipe(recipe, settings, check, text)
    if (base := getattr(arguments, "original_tblr", None)) is not None:
        settings.append(_base_rate(base, run.batch.global_size, settings, run.optimizer.learning_rate))
        run = load_recipe(recipe, settings, check, text)
    problems += _other_models(arguments, run)
    if problems:
        raise ConfigError(problems)
    return run


def _named_models(arguments: argparse.Namespace) -> dict[str, str]:
    """Flag -> the model that it names."""
    depth = None if arguments.depth is None else f"var-d{arguments.depth}"
    named = {f"--gpt-model {arguments.gpt_model}": arguments.gpt_model, f"--depth {arguments.depth}": depth}
    return {flag: original_names.canonical_model(name) for flag, name in named.items() if name is not None}


def _named_recipe(arguments: argparse.Namespace) -> str:
    """The recipe of --recipe, or that of the model and the image size that an original's flags name."""
    models = list(_named_models(arguments).values())
    if getattr(arguments, "original_vq_ckpt", None) is not None:  # LlamaGen's own programs, whose default is GPT-B
        models.append("llamagen-b")
    if arguments.recipe is not None or not models:
        return arguments.recipe or DEFAULT_RECIPE
    sized = f"{models[0]}-{getattr(arguments, 'original_image_size', None)}"
    return sized if sized in recipe_names() else models[0]


def _other_models(arguments: argparse.Namespace, run: RunConfig) -> list[str]:
    """Where an original's flags name another model, or another size of images, than the recipe and --set do."""
    found = [
        f"{flag} and model.preset={run.model.preset} of recipe {run.name} contradict each other"
        for flag, model in _named_models(arguments).items()
        if (load_recipe(model).model.preset if model in recipe_names() else model) != canonical_recipe(run.model.preset)
    ]
    size = getattr(arguments, "original_image_size", None)
    compared = size is not None and not arguments.originals["image_size"].settings(size)
    if compared and size != str(run.data.image_size):
        found.append(
            f"--image-size {size}: recipe {run.name} has images of {run.data.image_size} px; name one that has "
            f"{size} with --recipe"
        )
    return found


def _base_rate(base: str, images: int, settings: list[str], given: float) -> str:
    """VAR's --tblr, the learning rate of 256 images, as the setting of a run with so many images a step.

    Args:
        settings: the others; `given` is the learning rate that they lead to.

    Raises:
        ConfigError: no number, or another learning rate in `settings`.
    """
    try:
        rate = float(base) * images / 256
    except ValueError:
        raise ConfigError([f"--tblr {base}: a number is needed"]) from None
    own = any(_canonical_key(setting.partition("=")[0]) == "optimizer.learning_rate" for setting in settings)
    if own and not math.isclose(given, rate):
        raise ConfigError([f"--tblr {base} and the learning rate {given:g} contradict each other"])
    return f"optimizer.learning_rate={given if own else rate!r}"


def _translated(arguments: argparse.Namespace, problems: list[str]) -> list[str]:
    """The overrides that the originals' flags stand for; those without a meaning are named on stderr.

    A value that a flag does not take is a problem, and so is a key that is set differently by two flags, or by a flag
    and --set.
    """
    found: dict[str, tuple[str, str]] = {}  # key -> value, where from
    ignored = []
    for override in arguments.overrides:
        key, _, value = override.partition("=")
        found[_canonical_key(key)] = (value, f"--set {override}")  # of two the later one counts, as in a script's own
    translated = []
    for name, flag in arguments.originals.items():
        value = getattr(arguments, f"original_{name}", None)
        if value is None:
            continue
        typed = original_names.spellings(name)[-1]
        if flag.ignored:
            ignored.append(f"ignored: {typed}: {flag.ignored}")
            continue
        try:
            settings = flag.settings(value)
        except ValueError as error:
            problems.append(f"{typed} {value}: {error}")
            continue
        for setting in settings:
            key, _, own = setting.partition("=")
            other, source = found.setdefault(key, (own, f"{typed} {value}"))
            if not _same_value(other, own):
                problems.append(f"{typed} {value} and {source} contradict each other ({key})")
            translated.append(setting)
    if ignored and os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        print("\n".join(ignored), file=sys.stderr)
    return translated


def _same_value(one: str, other: str) -> bool:
    return one.lower() == other.lower() or _scalar(one) == _scalar(other)


def _read_with_bases(name_or_file: str, problems: list[str], seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    shipped = RECIPES / f"{canonical_recipe(name_or_file)}.yaml"
    path = shipped if shipped.is_file() else expand(name_or_file)
    if not path.is_file():
        near = _nearest(name_or_file, recipe_names())
        problems.append(f"--recipe {path}: no shipped recipe and no file of that name{near}")
        return {}
    if path in seen:
        problems.append(f"recipe {path.name} extends itself")
        return {}
    try:
        tree = _read_tree(path)
    except (yaml.YAMLError, ValueError, OSError, RecursionError) as error:
        problems.append(f"recipe {path}: not a recipe's YAML ({' '.join(str(error).split())[:300]})")
        return {}
    if not isinstance(tree, dict):
        problems.append(f"recipe {path}: holds a {type(tree).__name__}, not a mapping of sections")
        return {}
    base = tree.pop("extends", None)
    return _merge(_read_with_bases(str(base), problems, (*seen, path)), tree) if base else tree


def _read_tree(path: Path) -> Any:
    """A recipe's file. Raises YAMLError, ValueError (too large, not UTF-8, a date or number that is none), OSError."""
    return _tree(regular_file(path, largest=LARGEST_RECIPE).read_text(encoding="utf-8"))


def _tree(text: str) -> Any:
    return _typed(yaml.load(text, PlainYaml) or {}, yaml.load(text, yaml.BaseLoader))


def _parse_text(source: str, text: str, problems: list[str]) -> dict[str, Any]:
    """The tree of a recipe that a file of weights carries, without bases."""
    try:
        tree = _tree(text) if len(text) <= LARGEST_RECIPE else None
    except (yaml.YAMLError, ValueError, RecursionError):
        tree = None
    if isinstance(tree, dict) and "extends" not in tree:
        return tree
    problems.append(f"{source}: the recipe in its header is none; name one with --recipe")
    return {}


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and value and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _apply(tree: dict[str, Any], override: str, problems: list[str]) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        problems.append(f"--set {override}: write KEY.PATH=VALUE, e.g. loss.beta=0.1")
        return
    key = _canonical_key(key)
    value = _literal(text) if _is_text(_annotation(key)) else _scalar(text)
    if key.endswith(".name") and isinstance(value, str):  # CCA's own script takes --loss_type CCA
        value = value.lower()
    *parents, leaf = key.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            problems.append(f"--set {override}: {parent} is a value, not a section")
            return
    tree[leaf] = value


def _canonical_key(key: str) -> str:
    """A key as recipes spell it, also under its name in the original programs."""
    return re.sub(r"\blambda_$", "lambda", original_names.KEYS.get(key, key))


def _scalar(text: str) -> Any:
    """What YAML makes of a value, with 1e-5 as a number, which YAML 1.1 reads as a string."""
    try:
        return _number(yaml.load(text, PlainYaml))
    except (yaml.YAMLError, ValueError, RecursionError):
        return text


def _literal(text: str) -> str | None:
    """A text as it is written, without quotes around it; null and nothing are None."""
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    return None if text in ("", "null") else text


def _annotation(key: str) -> Any:
    """The type of a key (SECTION.NAME); None for one that is not in the schema."""
    section: Any = RunConfig
    for part in key.split("."):
        fields = getattr(section, "model_fields", {})
        found = [field for name, field in fields.items() if part in (name, field.alias)]
        section = found[0].annotation if found else None
    return section


def _is_text(annotation: Any) -> bool:
    """Whether a key takes text and nothing else but null."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _is_text(typing.get_args(annotation)[0])
    if origin in (types.UnionType, typing.Union):
        return all(part is types.NoneType or _is_text(part) for part in typing.get_args(annotation))
    return annotation is str


def _typed(tree: Any, literal: Any, section: type[BaseModel] = RunConfig) -> Any:
    """A file's tree with its text keys as they are written (a folder 007 is no number) and 1e-5 as a number.

    Args:
        tree: as YAML resolves it. literal: the same with every scalar as text.
    """
    if not isinstance(tree, dict) or not isinstance(literal, dict):
        return _number(tree)
    fields = {field.alias or name: field.annotation for name, field in section.model_fields.items()}
    found = {}
    for key, value in tree.items():
        kind, written = fields.get(key), literal.get(str(key))
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found[key] = _typed(value, written, kind)
        else:
            found[key] = (
                written if _is_text(kind) and value is not None and isinstance(written, str) else _number(value)
            )
    return found


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-5 as a string; users mean the number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    if isinstance(value, dict):
        return {key: _number(item) for key, item in value.items()}
    return [_number(item) for item in value] if isinstance(value, list) else value


# keys that older versions wrote into a run's config.yaml, with the only value that is still taken
_RETIRED: dict[str, Any] = {
    "reference.tensor_parallel": 1, "balance.slowdown": {}, "balance.slowdown_seconds": None, "baseline.images": 64,
}  # fmt: skip


def _drop_retired(tree: dict[str, Any]) -> None:
    """Remove keys that no longer exist where they have the value that changes nothing."""
    for key, neutral in _RETIRED.items():
        section, leaf = key.split(".")
        values = tree.get(section)
        if isinstance(values, dict) and leaf in values and values[leaf] == neutral:
            del values[leaf]


def _validate(tree: dict[str, Any], problems: list[str]) -> RunConfig | None:
    """The tree as a RunConfig. After an error the values in error take their defaults, so that checks of the others
    still find what is wrong with them; None where even that is not valid.
    """
    _drop_retired(tree)
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        problems.extend(_explain(entry) for entry in _joined(error.errors()))
        for entry in error.errors():
            _remove(tree, entry["loc"])
    try:
        return RunConfig.model_validate(tree)
    except ValidationError:
        return None


def _remove(tree: dict[str, Any], location: tuple[int | str, ...]) -> None:
    """Delete the innermost key of a mapping on the way to a location."""
    holder, key, node = tree, location[0], tree
    for part in location:
        if not isinstance(node, dict) or part not in node:
            break
        holder, key, node = node, part, node[part]
    holder.pop(key, None)


def _joined(entries: Sequence[Any]) -> Iterator[Any]:
    """One entry a value: of a key that takes "auto" or something else, pydantic has an entry for each."""
    of_auto: set[tuple[int | str, ...]] = set()
    for entry in entries:
        *key, branch = entry["loc"]
        if entry["type"] == "literal_error" and str(branch).startswith("literal["):
            of_auto.add(tuple(key))
        elif tuple(key) in of_auto:
            yield {**entry, "loc": tuple(key), "msg": f"{entry['msg']}, or be auto"}
        else:
            yield entry


def _explain(entry: Any) -> str:
    where = ".".join(str(part) for part in entry["loc"])
    if entry["type"] == "extra_forbidden":
        section: type[BaseModel] | None = RunConfig
        for part in entry["loc"][:-1]:
            annotation = section.model_fields[str(part)].annotation if section else None
            section = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
        known = [field.alias or name for name, field in section.model_fields.items()] if section else []
        return f"{where}: unknown key{_nearest(str(entry['loc'][-1]), known)}"
    return f"{where}: {entry['msg']} (got {entry['input']!r})"


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known)}" if known else ""


def _contradictions(run: RunConfig) -> list[str]:
    """What each value allows alone but not together."""
    found = []
    if run.batch.micro_size != "auto" and run.batch.micro_size > run.batch.global_size:
        found.append(
            f"batch.micro_size={run.batch.micro_size} is larger than batch.global_size={run.batch.global_size}"
        )
    if run.balance.mode == "given" and not run.balance.speeds:
        found.append("balance.mode=given needs balance.speeds={device, host or rank: pairs a second}")
    if run.balance.remeasure_every and run.balance.mode != "measured":
        found.append(
            f"balance.remeasure_every={run.balance.remeasure_every} needs balance.mode=measured, not {run.balance.mode}"
        )
    return found
