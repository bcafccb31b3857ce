"""What can be held about the CUDA kernels without a GPU: they compile, and their row algorithm is right on the CPU."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import COMMON_NVCC_FLAGS

CSRC = Path(__file__).parents[2] / "csrc"
ROWS = Path(__file__).parents[1] / "support" / "rows.cpp"
TARGETS = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in (80, 86, 90)] + [
    "-gencode=arch=compute_90,code=compute_90"
]
FLOAT, FLOAT_TO_BF16, BF16 = 0, 1, 2


@pytest.fixture(scope="module")
def rows_program(tmp_path_factory) -> Path:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = tmp_path_factory.mktemp("csrc") / "rows"
    flags = ["-std=c++17", "-O1", "-fno-fast-math", "-fsanitize=address,undefined", f"-I{CSRC}"]
    subprocess.run([compiler, *flags, str(ROWS), "-o", str(program)], check=True)
    return program


def run_rows(program, logits_V, target, *, threads=64, weight=1.0, shifts=(0, 0), types=FLOAT, bias_V=None):
    """One row through the program: log p, (max, log sum), gradient [V], visits [V]."""
    head = [len(logits_V), threads, target, weight, *shifts, types, int(bias_V is not None)]
    numbers = [*logits_V.tolist(), *([] if bias_V is None else bias_V.tolist())]
    text = " ".join(map(str, head)) + "\n" + " ".join(f"{x:.9g}" for x in numbers)
    done = subprocess.run([program], input=text, capture_output=True, text=True, check=True)
    first, gradient, visits, offset = done.stdout.splitlines()
    assert int(offset) == 2**34  # 64-bit offsets
    logp, *stats = map(float, first.split())
    return logp, stats, torch.tensor([*map(float, gradient.split())]), [*map(int, visits.split())]


def exact(logits_V, target, weight=1.0):
    logits_V = logits_V.double()
    gradient_V = -weight * logits_V.softmax(0)
    gradient_V[target] += weight
    return logits_V.log_softmax(0)[target].item(), gradient_V


@pytest.mark.parametrize("types", [FLOAT, FLOAT_TO_BF16, BF16])
@pytest.mark.parametrize("vocabulary", [1, 7, 17, 1000, 4097, 16384])
@pytest.mark.parametrize("threads", [64, 512])
def test_rows_as_the_gpu_shares_them(rows_program, types, vocabulary, threads):
    generator = torch.Generator().manual_seed(vocabulary)
    logits_V = torch.randn(vocabulary, generator=generator) * 4
    bias_V = torch.randn(vocabulary, generator=generator).bfloat16().float()
    if types == BF16:
        logits_V = logits_V.bfloat16().float()
    target = vocabulary // 3
    for bias, shifts in ((None, (0, 0)), (bias_V, (0, 0)), (None, (1, 1)), (None, (1, 0)), (bias_V, (3, 3))):
        logp, _, gradient_V, visits = run_rows(
            rows_program, logits_V, target, threads=threads, weight=-0.75, shifts=shifts, types=types, bias_V=bias
        )
        expected, expected_V = exact(logits_V if bias is None else logits_V + bias, target, -0.75)
        assert visits == [1] * vocabulary  # each element by one thread, once, aligned or not
        assert abs(logp - expected) < 3e-6 * max(1, abs(expected))
        tolerance = 1e-6 if types == FLOAT else 3e-3
        error = (gradient_V - expected_V).norm() / expected_V.norm().clamp_min(1e-30)
        assert error < tolerance or expected_V.norm() < 1e-6  # one column: softmax is 1, the gradient 0


def test_rows_that_are_not_finite(rows_program):
    inf, nan = float("inf"), float("nan")
    base_V = torch.randn(100, generator=torch.Generator().manual_seed(0))
    for bad in (inf, nan):
        row_V = base_V.clone()
        row_V[40] = bad
        logp, _, gradient_V, _ = run_rows(rows_program, row_V, 3)
        assert logp != logp and gradient_V.isnan().all()
    logp, _, gradient_V, _ = run_rows(rows_program, torch.full((100,), -inf), 3)
    assert logp != logp and gradient_V.isnan().all()
    row_V = torch.full((4097,), -inf)
    row_V[5] = 1.0
    row_V[4000] = 2.0
    logp, _, gradient_V, _ = run_rows(rows_program, row_V, 5)
    expected, expected_V = exact(row_V, 5)
    assert abs(logp - expected) < 1e-6
    torch.testing.assert_close(gradient_V.double(), expected_V, atol=1e-6, rtol=0)
    assert run_rows(rows_program, row_V, 7)[0] == -inf


def test_rows_of_large_logits_keep_the_digits_of_the_sum(rows_program):
    logits_V = torch.randn(5000, generator=torch.Generator().manual_seed(1)) + 1e4
    logp, stats, gradient_V, _ = run_rows(rows_program, logits_V, 17)
    expected, expected_V = exact(logits_V, 17)
    assert abs(logp - expected) < 1e-5  # from one rounded log-sum-exp it would be 5e-4
    assert abs(stats[0] - logits_V.max().item()) < 1e-3 and 0 < stats[1] < 10
    assert (gradient_V - expected_V).norm() / expected_V.norm() < 1e-6


@pytest.mark.parametrize("target", [-1, 100, 2**40])
def test_rows_read_nothing_for_a_target_outside_the_vocabulary(rows_program, target):
    logp, _, gradient_V, _ = run_rows(rows_program, torch.zeros(100), target)  # the sanitizer watches
    assert logp != logp
    torch.testing.assert_close(gradient_V, torch.full((100,), -0.01))


def test_rows_sum_in_a_fixed_order(rows_program):
    logits_V = torch.randn(3001, generator=torch.Generator().manual_seed(2))
    first, second = (run_rows(rows_program, logits_V, 9, threads=256) for _ in range(2))
    assert first[:2] == second[:2] and torch.equal(first[2], second[2])


def test_cuda_file_has_no_torch_header_and_no_atomics():
    for name in ("sequence_logp_cuda.cu", "sequence_logp_cuda.h", "sequence_logp.h"):
        text = (CSRC / "likelihood" / name).read_text()
        assert not re.findall(r"#include <(torch|ATen|c10)", text)
        assert "atomic" not in text


@pytest.mark.parametrize("source", ["sequence_logp_cuda.cu"])
def test_nvcc_alone_compiles_the_kernels_for_all_targets(source, tmp_path):
    """With the flags that PyTorch's builder adds: they switch the conversions of 16-bit numbers off."""
    assert "-D__CUDA_NO_BFLOAT16_CONVERSIONS__" in COMMON_NVCC_FLAGS
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    compiled = tmp_path / "kernels.o"
    flags = ["-std=c++17", "-O3", "--extended-lambda", "-Werror=all-warnings", f"-I{CSRC}"]
    command = [nvcc, *flags, *COMMON_NVCC_FLAGS, *TARGETS]
    done = subprocess.run(
        [*command, "-Xptxas=-v", "-c", str(CSRC / "likelihood" / source), "-o", str(compiled)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert set(re.findall(r"for '(sm_\d+)'", done.stderr)) == {"sm_80", "sm_86", "sm_90"}

    spills = {int(n) for n in re.findall(r"(\d+) bytes spill", done.stderr)}
    assert spills == {0}


def test_bindings_of_the_cuda_kernels_compile(tmp_path):
    """Against PyTorch's own headers, which a CPU build of it ships too, all but one that its build generates."""
    nvcc, compiler = shutil.which("nvcc"), shutil.which("g++")
    if nvcc is None or compiler is None:
        pytest.skip("nvcc or g++ is not installed")
    dryrun = subprocess.run([nvcc, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
    cuda = re.search(r'INCLUDES="-I([^"]+)"', dryrun)[1]
    torch_headers = Path(torch.__file__).parent / "include"
    if not (torch_headers / "c10/cuda/impl/cuda_cmake_macros.h").exists():
        generated = tmp_path / "c10/cuda/impl/cuda_cmake_macros.h"
        generated.parent.mkdir(parents=True)
        generated.write_text("#pragma once\n#define C10_CUDA_BUILD_SHARED_LIBS\n")
    command = [compiler, "-std=c++20", "-Wall", "-Werror", "-fsyntax-only", f"-I{CSRC}", "-isystem", tmp_path]
    for folder in (torch_headers, torch_headers / "torch/csrc/api/include", cuda):
        command += ["-isystem", folder]
    done = subprocess.run([*command, CSRC / "likelihood" / "bindings_cuda.cpp"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
