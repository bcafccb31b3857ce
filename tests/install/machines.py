"""Machines as an install meets them, put together from stand-ins for compilers, toolkits and PyTorch's builds."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
SOURCES = ("cca_ds", "csrc", "ds_configs", "setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in")
TOOLS = ("sh", "env", "uname", "which", "touch", "cat", "rm", "ar")  # what a bare machine has
# writes the files that a compiler or linker is asked for; FAIL_ON is a word in the command line that makes it fail
COMPILER = """#!{python} -IS
import sys
import sysconfig
arguments = sys.argv[1:]
if {fail!r} and any({fail!r} in a for a in arguments):
    sys.exit("error: this compiler cannot compile that")
if "--version" in arguments or "-v" in arguments:
    print({version!r})
if "-dumpversion" in arguments:
    print("12.2.0")
if "--dryrun" in arguments:
    print("#$ TOP={top}/bin/..", file=sys.stderr)
for flag, path in zip(arguments, arguments[1:]):
    if flag in ("-o", "-MF", "--dependency-output"):
        open(path, "w").write("x: x\\n" if path.endswith(".d") else "")
"""


@dataclass
class Machine:
    """A folder with a PATH of its own and a copy of the sources.

    Args:
        folder: empty; everything is put below it.
        sources: the name of the copy's folder.
    """

    folder: Path
    sources: str = "src"
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.bin = self.folder / "bin"
        self.bin.mkdir()
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool))
        (self.bin / "ninja").symlink_to(Path(sys.executable).with_name("ninja"))
        self.source = self.folder / self.sources
        for name in SOURCES:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            self.source.mkdir(exist_ok=True)
            copy(ROOT / name, self.source / name)
        for built in (*self.source.rglob("*.so"), self.source / "cca_ds/ops/build.json"):
            built.unlink(missing_ok=True)
        if torch.version.cuda is not None:
            self.cuda_pytorch(None)

    def add_compiler(self, fail: str = "") -> Machine:
        """A C++ compiler on PATH that fails on command lines with the word `fail`."""
        self._program(self.bin / "g++", "gcc version 12.2.0", fail)
        # Python builds extensions with the compilers that it was built with, by their names
        own = (sysconfig.get_config_var(name) or "" for name in ("CC", "CXX", "LDSHARED", "LDCXXSHARED"))
        for name in {"c++", *(Path(words.split()[0]).name for words in own if words)} - {"g++"}:
            (self.bin / name).symlink_to("g++")
        return self

    def add_toolkit(
        self, version: str = "13.0", fail: str = "", headers: bool = True, wrapped: bool = False
    ) -> Machine:
        """A CUDA toolkit whose nvcc is on PATH, itself or (`wrapped`) by a wrapper elsewhere."""
        toolkit = self.folder / "toolkit"
        (toolkit / "bin").mkdir(parents=True)
        nvcc = self._program(toolkit / "bin" / "nvcc", f"Cuda compilation tools, release {version}, V{version}.1", fail)
        if headers:
            (toolkit / "include").mkdir()
            (toolkit / "include" / "cuda_runtime.h").touch()
        if wrapped:
            shutil.copy(nvcc, self.bin / "nvcc")
        else:
            self.environment["CUDA_HOME"] = str(toolkit)
        return self

    def cuda_pytorch(self, version: str | None = "13.0") -> Machine:
        """PyTorch says that it was built for this CUDA, None for a CPU build."""
        hook = self.folder / "hook"
        hook.mkdir(exist_ok=True)
        (hook / "sitecustomize.py").write_text(
            f"import torch\ntorch.version.cuda = {version!r}\n"
            f"torch.cuda._is_compiled = lambda: {version is not None}\ntorch.cuda.is_available = lambda: False\n"
        )
        self.environment["PYTHONPATH"] = str(hook)
        return self

    def set(self, **environment: str) -> Machine:
        """Variables of the environment."""
        self.environment |= environment
        return self

    def build_wheel(self, **environment: str) -> tuple[Path, dict, str]:
        """Build the wheel and install it: into which folder, its build.json, and what the build printed."""
        out = self.folder / "out"
        done = subprocess.run(
            [sys.executable, "setup.py", "-q", "bdist_wheel", "-d", str(out)],
            cwd=self.source, capture_output=True, text=True,
            env={"PATH": str(self.bin), "HOME": str(self.folder), **self.environment, **environment},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        (wheel,) = out.glob("*.whl")
        installed = self.folder / "installed"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--no-index", "--no-compile", "--target", str(installed), str(wheel)], check=True)
        return installed, json.loads((installed / "cca_ds/ops/build.json").read_text()), done.stderr

    def _program(self, path: Path, version: str, fail: str) -> Path:
        top = path.parent.parent
        path.write_text(COMPILER.format(python=sys.executable, fail=fail, version=version, top=top))
        path.chmod(0o755)
        return path


def overview(installed: Path) -> str:
    """What `python -m cca_ds` prints from an installed wheel."""
    environment = {"PATH": os.defpath, "PYTHONPATH": str(installed)}
    command = [sys.executable, "-m", "cca_ds"]
    done = subprocess.run(command, env=environment, cwd=installed, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
