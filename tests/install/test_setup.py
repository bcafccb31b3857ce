"""An install ends on every machine, with the most kernels that can be built there and the reason for no more."""

import importlib.util
import re
import subprocess

import pytest

from tests.install.machines import ROOT, Machine, overview

CUDA_SOURCE = "sequence_logp_cuda.cu"
MACHINES = {
    # name: (set-up, kernels, reason in the summary)
    "no compiler": (lambda m: m, "none", r"there is no C\+\+ compiler \(c\+\+ is not on PATH"),
    "compiler, CPU PyTorch": (lambda m: m.add_compiler(), "cpu", r"PyTorch .* has no CUDA"),
    "compiler, CPU PyTorch, nvcc": (lambda m: m.add_compiler().add_toolkit(), "cpu", r"PyTorch .* has no CUDA"),
    "CUDA PyTorch, no nvcc": (
        lambda m: m.add_compiler().cuda_pytorch().set(CUDA_HOME="/nothing"), "cpu", "it has no bin/nvcc"),
    "CUDA PyTorch and toolkit, no GPU": (lambda m: m.add_compiler().cuda_pytorch().add_toolkit(), "cuda", ""),
    "nvcc is a wrapper": (lambda m: m.add_compiler().cuda_pytorch().add_toolkit(wrapped=True), "cuda", ""),
    "nvcc without headers": (
        lambda m: m.add_compiler().cuda_pytorch().add_toolkit(headers=False), "cpu", "has no include/cuda_runtime.h"),
    "nvcc of another CUDA": (
        lambda m: m.add_compiler().cuda_pytorch().add_toolkit("12.8"), "cpu", "of CUDA 12.8 and PyTorch of CUDA 13.0"),
    "nvcc that compiles nothing": (
        lambda m: m.add_compiler().cuda_pytorch().add_toolkit(fail="trial.cu"), "cpu",
        r"nvcc does not compile a program of ten lines \(error: this compiler cannot"),
    "nvcc that fails on the kernels": (
        lambda m: m.add_compiler().cuda_pytorch().add_toolkit(fail=CUDA_SOURCE), "cpu", "the cuda build failed"),
    "compiler that compiles nothing": (
        lambda m: m.add_compiler(fail="trial.cpp"), "none", r"c\+\+ does not compile a program of ten lines \(error"),
    "compiler that fails on the kernels": (
        lambda m: m.add_compiler(fail="matmul_cpu.cpp"), "none", "the cpu build failed"),
}  # fmt: skip


@pytest.fixture
def package_setup():
    spec = importlib.util.spec_from_file_location("cca_ds_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", MACHINES)
def test_a_wheel_with_what_can_be_built_and_the_reason(name, tmp_path):
    set_up, kernels, reason = MACHINES[name]
    installed, record, printed = set_up(Machine(tmp_path)).build_wheel()
    assert record["kernels"] == kernels and re.search(reason, record["summary"]), record
    assert record["summary"] in printed and record["summary"] in overview(installed)
    libraries = {path.name.partition(".")[0] for path in (installed / "cca_ds/ops").glob("*.so")}
    assert libraries == (set() if kernels == "none" else {"_C", "_cpu_default", "_cpu_avx2", "_cpu_avx512"})


@pytest.mark.parametrize(
    ("name", "build", "message"),
    [
        ("no compiler", "cpu", "CCA_DS_BUILD=cpu cannot be built here: there is no C++ compiler"),
        ("compiler, CPU PyTorch", "cuda", "CCA_DS_BUILD=cuda cannot be built here: PyTorch"),
        ("compiler that fails on the kernels", "cpu", "Error compiling objects"),
        ("no compiler", "rocm", "CCA_DS_BUILD=rocm is not known; choose one of cuda, cpu, none"),
    ],
)
def test_what_is_requested_is_built_or_fails(name, build, message, tmp_path):
    with pytest.raises(AssertionError, match=re.escape(message)):
        MACHINES[name][0](Machine(tmp_path)).build_wheel(CCA_DS_BUILD=build)


def test_one_instruction_set_on_request(tmp_path):
    installed, _, _ = Machine(tmp_path).add_compiler().build_wheel(CCA_DS_CPU="avx2")
    assert {path.name.partition(".")[0] for path in (installed / "cca_ds/ops").glob("*.so")} == {"_C", "_cpu_avx2"}


def test_no_kernels_on_request(tmp_path):
    _, record, _ = Machine(tmp_path).add_compiler().build_wheel(CCA_DS_BUILD="none")
    assert record["kernels"] == "none" and record["summary"].endswith("CCA_DS_BUILD=none")


def test_sources_that_cannot_be_written_in_a_path_with_spaces(tmp_path):
    """No git either; the wheel holds what a user needs beside the code."""
    machine = Machine(tmp_path, "read only sources").add_compiler()
    mounted = ["mount", "--bind", str(machine.source), str(machine.source)]
    if subprocess.run(mounted, capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(machine.source)], check=True)
        installed, record, _ = machine.build_wheel()
    finally:
        subprocess.run(["umount", str(machine.source)], check=True)
    assert record["kernels"] == "cpu"
    shipped = {path.stem for path in (installed / "cca_ds/ds_configs").glob("*.json")}
    assert shipped == {path.stem for path in (ROOT / "ds_configs").glob("*.json")}
    for path in ("recipes/llamagen-3b.yaml", "assets/digits_base.safetensors", "reporting/page.css", "py.typed"):
        assert (installed / "cca_ds" / path).is_file()
    (metadata,) = installed.glob("*.dist-info")
    text = (metadata / "METADATA").read_text()
    for part in (
        "Project-URL: Paper, https://arxiv.org/abs/2410.09347",
        "License",
        "Requires-Dist: deepspeed",
        "# cca_ds",
    ):
        assert part in text
    assert (metadata / "licenses" / "LICENSE").is_file()
    commands = (metadata / "entry_points.txt").read_text()
    for name in ("train", "encode", "sample", "evaluate", "export", "choose", "plan"):
        assert f"cca-{name} = cca_ds.{name}:main" in commands


def test_an_isolated_build_takes_the_pytorch_of_the_environment(package_setup, monkeypatch, tmp_path):
    monkeypatch.setattr(package_setup, "find_torch", lambda: False)
    monkeypatch.setattr(package_setup.shutil, "which", lambda name: "/usr/bin/c++")
    assert package_setup.torch_to_build_with(building=False) == ["ninja", "torch>=2.11"]
    monkeypatch.setattr(package_setup, "find_torch", lambda: True)
    assert package_setup.torch_to_build_with(building=False) == ["ninja"]
    monkeypatch.setattr(package_setup.shutil, "which", lambda name: None)
    assert package_setup.torch_to_build_with(building=False) == []


def test_sources_exist_and_none_builds_none(package_setup):
    assert package_setup.extensions("none") == []
    sources = {s for e in package_setup.extensions("cpu") for s in e.sources}
    assert not [s for s in (*sources, *package_setup.CUDA_SOURCES, *package_setup.HEADERS) if not (ROOT / s).exists()]
    assert {p.name for p in (ROOT / "csrc").rglob("*") if p.is_file()} == {
        s.rpartition("/")[2] for s in (*sources, *package_setup.CUDA_SOURCES, *package_setup.HEADERS)
    }


def test_targets_are_the_three_gpus_and_ptx(package_setup):
    flags = " ".join(package_setup.gencode())
    for part in ("code=sm_80", "code=sm_86", "code=sm_90", "code=compute_90"):
        assert part in flags
