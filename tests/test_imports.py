"""Imports point one way, deepspeed stays where ranks are, and no name in the package hides another's."""

import ast
import sys
from importlib import metadata
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "cca_ds"
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
COMMANDS = ("__main__", "train", "encode", "sample", "evaluate", "export", "choose", "plan")
# A stage imports only itself and what is below it.
ORDER = (
    "planning",
    "training",
    "reference",
    "checkpoints",
    "balance",
    "cluster",
    "reporting",
    "alignment",
    "sampling",
    "metrics",
    "vq",
    "models",
    "data",
    "likelihood",
    "ops",
    "config",
    "console",
    "folder_lock",
    "untrusted",
    "files",
    "__init__",
)
WITH_DEEPSPEED = {"training", "reference", "checkpoints", "cluster"}
ALONE = ("data/pairs.py", "files.py", "config/variants.py")  # import nothing of the package


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
    """First parts below cca_ds of what a file imports: "training", "config", ..."""
    found = set()
    for name in imported(path):
        first, _, rest = name.partition(".")
        if first == "cca_ds" and rest:
            part = rest.partition(".")[0]
            known = (PACKAGE / part).is_dir() or (PACKAGE / f"{part}.py").is_file()
            found.add(part if known else "__init__")  # cca_ds.__version__ and the like
    return found


def test_every_stage_has_its_place():
    stages = {path.parts[0].removesuffix(".py") for path in MODULES}
    assert stages == {*ORDER, *COMMANDS}


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_point_one_way(path):
    stage = path.parts[0].removesuffix(".py")
    parts = own_parts(path) - {stage}
    assert not parts & set(COMMANDS), f"{path} imports the command {parts & set(COMMANDS)}"
    below = set(ORDER) if stage in COMMANDS else set(ORDER[ORDER.index(stage) + 1 :])
    assert parts <= below, f"{path} imports {parts - below}, which are above it"


@pytest.mark.parametrize("path", ALONE)
def test_pure_parts_import_nothing_of_the_package(path):
    assert not own_parts(Path(path))


def test_deepspeed_stays_where_ranks_are():
    users = {path.parts[0] for path in MODULES if any(n.partition(".")[0] == "deepspeed" for n in imported(path))}
    assert users <= WITH_DEEPSPEED


def test_no_name_in_the_package_hides_another():
    """`deepspeed cca_ds/train.py` puts cca_ds/ first on sys.path."""
    own = {path.stem for path in PACKAGE.glob("*.py")} | {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    own -= {"__init__", "__main__", "__pycache__"}
    assert own >= {"train", "sample"}
    others = set(sys.stdlib_module_names) | set(sys.builtin_module_names)
    for name, packages in metadata.packages_distributions().items():
        if any(package.lower().replace("_", "-") != "cca-ds" for package in packages):
            others.add(name)
    assert {"torch", "datasets", "yaml"} <= others  # the list is of this environment
    assert not own & others


def test_no_source_unpickles():
    """`weights_only` and `allow_pickle` are written at every call; YAML is read by safe loaders."""
    found = []
    for path in MODULES:
        for node in ast.walk(ast.parse((PACKAGE / path).read_text())):
            if not isinstance(node, ast.Call):
                continue
            name, words = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
            arguments = [ast.unparse(argument) for argument in node.args]
            fine = {
                "torch.load": words.get("weights_only") == "True",
                "np.load": words.get("allow_pickle") == "False",
                "yaml.load": bool({"PlainYaml", "yaml.SafeLoader", "yaml.BaseLoader"} & {*arguments, *words.values()}),
            }
            forbidden = ("pickle.load", "pickle.loads", "yaml.unsafe_load", "yaml.full_load", "eval", "exec")
            if not fine.get(name, name not in forbidden):
                found.append(f"{path}:{node.lineno}: {ast.unparse(node)}")
    assert not found
