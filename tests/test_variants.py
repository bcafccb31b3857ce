"""No code outside a variant's own folder compares its name: it asks the variant's record."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from cca_ds.alignment.losses import LOSSES
from cca_ds.models.registry import FAMILIES
from cca_ds.reference.placements import PLACEMENTS
from cca_ds.vq import TOKENIZERS

PACKAGE = Path(__file__).parents[1] / "cca_ds"
# name of a variant -> folders in which it may be compared
HOMES: dict[str, set[str]] = {}
for names, home in (
    (LOSSES, "alignment/"),
    (PLACEMENTS, "reference/"),
    (TOKENIZERS, "vq/"),
    *(((family.name, *family.presets), f"models/{family.name}/") for family in FAMILIES.values()),
):
    for name in names:
        HOMES.setdefault(name, set()).add(home)
COMPARISONS = (ast.Eq, ast.NotEq, ast.In, ast.NotIn)
METHODS = ("startswith", "endswith", "removeprefix", "removesuffix")


def strings(node: ast.AST) -> Iterator[str]:
    """String constants of an expression: its own, or those in a tuple, list, set or conditional expression."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.Tuple | ast.List | ast.Set):
        for element in node.elts:
            yield from strings(element)
    elif isinstance(node, ast.IfExp):
        yield from strings(node.body)
        yield from strings(node.orelse)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):  # frozenset({...})
        for argument in node.args:
            yield from strings(argument)


def compared(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, string) of every string that is compared, matched, or the key of a mapping."""
    for node in ast.walk(tree):
        found: list[ast.AST] = []
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], COMPARISONS):
            found = [node.left, *node.comparators]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in METHODS:
            found = list(node.args)
        elif isinstance(node, ast.Dict):
            found = [key for key in node.keys if key is not None]
        elif isinstance(node, ast.Subscript):
            found = [node.slice]
        elif isinstance(node, ast.MatchValue):
            found = [node.value]
        for part in found:
            for text in strings(part):
                yield getattr(part, "lineno", 0), text


def offences(source: str, path: str) -> list[str]:
    """ "path:line: name" of every variant's name that the source compares outside its folder."""
    hits = []
    for line, text in compared(ast.parse(source)):
        name = text.strip("-_ ")
        if name in HOMES and not any(path.startswith(home) for home in HOMES[name]):
            hits.append(f"cca_ds/{path}:{line}: {text!r}")
    return sorted(hits)


def test_no_variants_name_is_compared_outside_its_folder():
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        found += offences(path.read_text(), path.relative_to(PACKAGE).as_posix())
    assert not found, "ask the variant's record instead of its name:\n" + "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "x = run.loss.name == 'mle'",
        "x = 'mle' != name",
        "if placement in ('cached', 'streamed'):\n    pass",
        "x = preset.startswith('var')",
        "x = preset.startswith(('var-', 'gpt-'))",
        "offset = {'llamagen': 1.0, 'other': 0.0}[family]",
        "spec = LOSSES['cca']",
        "match name:\n    case 'digits' | 'other':\n        pass",
        "x = name in frozenset({'dpo'})",
    ],
)
def test_comparisons_are_found(source):
    assert offences(source, "training/run.py")


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("x = name == 'mle'", "alignment/objective.py"),
        ("x = {'var': 1}", "models/var/model.py"),
        ("name: str = 'cca'", "config/schema.py"),
        ("spec = TOKENIZERS[run.tokenizer.name]", "training/inputs.py"),
        ("x = mode == 'variable'", "training/run.py"),
    ],
)
def test_what_is_allowed(source, path):
    assert not offences(source, path)
