"""What setup.py decides to build, and what it says when it cannot."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.utils.cpp_extension

ROOT = Path(__file__).parents[1]


@pytest.fixture
def package_setup():
    spec = importlib.util.spec_from_file_location("cca_ds_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_builds_the_most_that_can_be_built(package_setup, monkeypatch, capsys):
    monkeypatch.delenv("CCA_DS_BUILD", raising=False)
    for cuda, cpu, expected in ((None, None, "cuda"), ("no nvcc", None, "cpu"), ("no nvcc", "no g++", "none")):
        monkeypatch.setattr(package_setup, "missing_for_cuda", lambda answer=cuda: answer)
        monkeypatch.setattr(package_setup, "missing_for_cpu", lambda answer=cpu: answer)
        assert package_setup.chosen_build() == expected
    said = capsys.readouterr().err
    assert said.count("NO KERNELS ARE BUILT") == 1 and "no g++" in said


@pytest.mark.parametrize("asked", ["cuda", "cpu"])
def test_what_is_asked_for_is_built_or_refused(package_setup, monkeypatch, asked):
    monkeypatch.setenv("CCA_DS_BUILD", asked)
    monkeypatch.setattr(package_setup, "missing_for_cuda", lambda: "no toolkit")
    monkeypatch.setattr(package_setup, "missing_for_cpu", lambda: "no compiler")
    with pytest.raises(SystemExit, match=f"CCA_DS_BUILD={asked} cannot be built here: no (toolkit|compiler)"):
        package_setup.chosen_build()
    monkeypatch.setattr(package_setup, f"missing_for_{asked}", lambda: None)
    assert package_setup.chosen_build() == asked


def test_unknown_build_names_the_choices(package_setup, monkeypatch):
    monkeypatch.setenv("CCA_DS_BUILD", "rocm")
    with pytest.raises(SystemExit, match="CCA_DS_BUILD=rocm is not known; choose one of cuda, cpu, none"):
        package_setup.chosen_build()


def test_without_a_compiler_the_reason_names_it(package_setup, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no-such-compiler is not on PATH" in package_setup.missing_for_cpu()


@pytest.mark.skipif(torch.version.cuda is not None, reason="a CUDA build of PyTorch is installed")
def test_cuda_needs_a_cuda_pytorch(package_setup):
    assert "has no CUDA" in package_setup.missing_for_cuda()


def test_a_wrapper_of_nvcc_leads_to_its_toolkit(package_setup, monkeypatch, tmp_path):
    toolkit = tmp_path / "cuda-13.0"
    (toolkit / "bin").mkdir(parents=True)
    (tmp_path / "nvcc").write_text(f'#!/bin/sh\necho "#$ TOP={toolkit}/bin/.." >&2\n')
    (tmp_path / "nvcc").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert package_setup.toolkit_of_nvcc() == str(toolkit)
    monkeypatch.setenv("PATH", str(toolkit))
    assert package_setup.toolkit_of_nvcc() is None


def test_a_folder_without_headers_is_no_toolkit(package_setup, monkeypatch, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(torch.utils.cpp_extension, "CUDA_HOME", str(tmp_path))
    assert "has no include/cuda_runtime.h (CUDA_HOME names" in package_setup.missing_for_cuda()


def test_sources_exist_and_none_builds_none(package_setup):
    assert package_setup.extensions("none") == [] and package_setup.build_commands("none") == {}
    sources = {s for e in package_setup.extensions("cpu") for s in e.sources}
    assert not [s for s in (*sources, *package_setup.CUDA_SOURCES, *package_setup.HEADERS) if not (ROOT / s).exists()]
    assert {p.name for p in (ROOT / "csrc").rglob("*") if p.is_file()} == {
        Path(s).name for s in (*sources, *package_setup.CUDA_SOURCES, *package_setup.HEADERS)
    }


def test_targets_are_the_three_gpus_and_ptx(package_setup):
    flags = " ".join(package_setup.gencode())
    for part in ("code=sm_80", "code=sm_86", "code=sm_90", "code=compute_90"):
        assert part in flags


def test_package_is_installable_metadata(package_setup):
    command = [sys.executable, "setup.py", "--name", "--version"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={"CCA_DS_BUILD": "none", "PATH": ""})
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-2:] == ["cca_ds", "0.1.0"]
