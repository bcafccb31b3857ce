"""Imports point one way, deepspeed stays in the engine, and no name in the package hides another's."""

import ast
import sys
from importlib import metadata
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "cca_ds"
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
ENTRIES = {"train", "encode", "sample", "evaluate", "export", "plan"}
# What each stage may import of the others; a stage may always import itself.
BOTTOM = {"config", "config_schema", "config_deepspeed", "telemetry", "__init__"}
MIDDLE = {"models", "likelihood", "data", "vq"}
UPPER = {"alignment", "sampling"}
ALLOWED = {
    **dict.fromkeys(BOTTOM, BOTTOM),
    **dict.fromkeys(MIDDLE, MIDDLE | BOTTOM),
    **dict.fromkeys(UPPER, UPPER | MIDDLE | BOTTOM),
    "engine": UPPER | MIDDLE | BOTTOM,
    "metrics": set(),
    "reporting": {"metrics"} | BOTTOM,  # evaluate's own tables and pages
    "planning": {"engine"} | BOTTOM,  # the cut over unequal ranks is the training's own solver
    "dry_run": {"planning", "engine"} | MIDDLE | BOTTOM,  # the part of train that --dry_run prints
}
# Tables of shapes and of GPUs, which import nothing of the package: the engine reads its peak rates there.
TABLES = ("planning/architecture.py", "planning/devices.py")
ALONE = ("alignment/losses.py", "data/pairs.py", "likelihood/ops.py")


def imported(path: Path) -> set[str]:
    """Every dotted name that a file imports, inside functions and TYPE_CHECKING too."""
    names = set()
    for node in ast.walk(ast.parse((PACKAGE / path).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own_parts(path: Path) -> set[str]:
    """First parts below cca_ds of what a file imports: "engine", "config", ..."""
    found = set()
    for name in imported(path):
        if name.startswith(
            tuple(f"cca_ds.{table.removesuffix('.py').replace('/', '.')}" for table in TABLES)
        ):
            continue
        first, _, rest = name.partition(".")
        if first == "cca_ds" and rest:
            part = rest.partition(".")[0]
            known = (PACKAGE / part).is_dir() or (PACKAGE / f"{part}.py").is_file()
            found.add(part if known else "__init__")  # cca_ds.__version__ and the like
    return found


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_point_one_way(path):
    stage = path.parts[0].removesuffix(".py")
    parts = own_parts(path) - {stage, "__init__"}
    assert not parts & ENTRIES, f"{path} imports the entry point {parts & ENTRIES}"
    if stage not in ENTRIES:
        assert stage in ALLOWED, f"{path}: DESIGN.md has no such stage"
        assert parts <= ALLOWED[stage], f"{path} imports {parts - ALLOWED[stage]}"


@pytest.mark.parametrize("path", ALONE + TABLES)
def test_pure_parts_import_nothing_of_the_package(path):
    assert not own_parts(Path(path)) - {"__init__"}


def test_only_the_engine_imports_deepspeed():
    outside = [path for path in MODULES if path.parts[0] != "engine"]
    found = [str(path) for path in outside if any(n.partition(".")[0] == "deepspeed" for n in imported(path))]
    assert not found
    assert any("deepspeed" in imported(path) for path in MODULES if path.parts[0] == "engine")


def test_no_name_in_the_package_hides_another():
    """`deepspeed cca_ds/train.py` puts cca_ds/ first on sys.path."""
    own = {path.stem for path in PACKAGE.glob("*.py")} | {
        path.name for path in PACKAGE.iterdir() if path.is_dir()
    }
    own -= {"__init__", "__pycache__"}
    assert own >= ENTRIES
    others = set(sys.stdlib_module_names) | set(sys.builtin_module_names)
    for name, packages in metadata.packages_distributions().items():
        if any(package.lower().replace("_", "-") != "cca-ds" for package in packages):
            others.add(name)
    assert {"torch", "datasets", "yaml"} <= others  # the list is of this environment
    assert not own & others
