"""What can be held about the CUDA kernels without a GPU: they compile as they should, and an emulation runs them."""

import re
import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.cpp_extension import COMMON_NVCC_FLAGS

CSRC = Path(__file__).parents[2] / "csrc"
EMULATION = Path(__file__).parents[1] / "support" / "cuda_on_cpu"
TARGETS = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in (80, 86, 90)] + [
    "-gencode=arch=compute_90,code=compute_90"
]
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
ELEMENTS = {FP32: 0, BF16: 1, FP16: 2}
STATS, GRADIENT, RESIDUAL = 0, 1, 2
INF, NAN = float("inf"), float("nan")


def build(folder: Path, changes: dict[str, str] | None = None) -> Path:
    """The real kernels and launchers with the emulation's headers; `changes` are texts to replace in them."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    (folder / "likelihood").mkdir(parents=True)
    left = dict(changes or {})
    for name in ("sequence_logp.h", "sequence_logp_cuda.h", "sequence_logp_cuda.cu"):
        text = (CSRC / "likelihood" / name).read_text()
        for old in [old for old in left if old in text]:
            text = text.replace(old, left.pop(old))
        if name.endswith(".cu"):  # the one thing of CUDA that is no C++
            launch = re.compile(r"(\w+<[\w, ]+>)<<<(.+?), 0, stream>>>\(")
            text, count = launch.subn(r"emulation::launch(\1, \2)(", text)
            assert count == 3
        (folder / ("kernels.cpp" if name.endswith(".cu") else f"likelihood/{name}")).write_text(text)
    assert not left, f"nothing to replace: {left}"
    program = folder / "kernels"
    flags = ["-std=c++17", "-O1", "-g", "-fno-fast-math", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    includes = [f"-I{folder}", f"-I{EMULATION}"]
    done = subprocess.run([compiler, *flags, *includes, EMULATION / "run_kernels.cpp", "-o", program],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return program


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("csrc") / "kernels")


@dataclass(frozen=True)
class Case:
    """One launch: logits [N, V], targets [N], and how the buffers lie."""

    logits: Tensor
    targets: Tensor
    other: torch.dtype | None = None  # of bias and residual; None: the logits'
    bias: Tensor | None = None
    grad: Tensor | None = None  # [B]
    in_place: bool = False
    shifts: tuple[int, int] = (0, 0)
    blocks: int = 2**30

    @property
    def other_type(self) -> torch.dtype:
        return self.other or self.logits.dtype


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def run(program: Path, launcher: int, case: Case, stats: Tensor | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """log p [N] (of a gradient: nothing), and stats [N, 2] or what is written [N, V]. Fails as the program does."""
    rows, vocabulary = case.logits.shape
    sequences = len(case.grad) if case.grad is not None else 1
    types = ELEMENTS[case.logits.dtype], ELEMENTS[case.other_type]
    head = [launcher, *types, rows, vocabulary, max(rows // sequences, 1), case.bias is not None,
            case.in_place, *case.shifts, case.blocks, seed]  # fmt: skip
    parts = [case.logits, case.bias, case.targets, stats, case.grad if launcher == GRADIENT else None]
    data = struct.pack("12q", *head) + b"".join(raw(part) for part in parts if part is not None)
    done = subprocess.run([program], input=data, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    split = 4 * rows if launcher != GRADIENT else 0
    logp, rest = done.stdout[:split], done.stdout[split:]
    kind = FP32 if launcher == STATS else case.other_type if launcher == RESIDUAL else case.logits.dtype
    shape = (rows, 2) if launcher == STATS else (rows, vocabulary)
    written = torch.frombuffer(bytearray(rest), dtype=kind).view(shape)
    return torch.frombuffer(bytearray(logp or bytes(4)), dtype=FP32), written


def check(program: Path, case: Case, seed: int = 0) -> None:
    """All three launchers against float64."""
    logits_NV = case.logits.double() + (case.bias.double() if case.bias is not None else 0.0)
    known = (case.targets >= 0) & (case.targets < logits_NV.shape[1])
    picked = case.targets.clamp(0, logits_NV.shape[1] - 1)[:, None]
    exact = torch.where(known, logits_NV.log_softmax(1).gather(1, picked)[:, 0], NAN)
    one_hot = torch.zeros_like(logits_NV).scatter(1, picked, known.double()[:, None])
    gradient_NV = one_hot - logits_NV.softmax(1)

    def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
        torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance, equal_nan=True)

    coarse = 1e-6 if case.other_type == FP32 else 8e-3
    logp, stats = run(program, STATS, case, seed=seed)
    close(logp, exact, 4e-6)
    logp, residual = run(program, RESIDUAL, case, seed=seed)
    close(logp, exact, 4e-6)
    close(residual, gradient_NV, coarse)
    if case.bias is None and case.grad is not None:
        weight_N = case.grad.double().repeat_interleave(len(logits_NV) // len(case.grad))
        _, gradient = run(program, GRADIENT, case, stats, seed)
        close(gradient, weight_N[:, None] * gradient_NV, 1e-6 if case.logits.dtype == FP32 else 8e-3)


def rows(count: int, vocabulary: int, dtype: torch.dtype = FP32, scale: float = 4.0) -> Tensor:
    generator = torch.Generator().manual_seed(count + vocabulary)
    return (torch.randn(count, vocabulary, generator=generator) * scale).to(dtype)


def targets(count: int, vocabulary: int) -> Tensor:
    return torch.arange(count) * 7919 % vocabulary


def shapes() -> list[tuple[str, Case]]:
    found = []
    for vocabulary in (1, 7, 17, 63, 1000, 4097, 16384):
        for dtype, other in ((FP32, FP32), (BF16, BF16), (FP16, FP16), (FP32, BF16), (FP32, FP16)):
            logits, where = rows(4, vocabulary, dtype), targets(4, vocabulary)
            name = f"{vocabulary} {dtype}-{other}".replace("torch.", "")
            grad = torch.tensor([-0.75, 2.0])
            found.append((name, Case(logits, where, other, grad=grad, in_place=dtype == other)))
            bias = rows(1, vocabulary, other)[0]
            found.append((f"{name} beside, bias", Case(logits, where, other, bias, shifts=(3, 3))))
            found.append((f"{name} apart", Case(logits, where, other, grad=grad, shifts=(1, 0))))
            found.append((f"{name} striding", Case(logits, where, other, bias, grad, blocks=2)))
    return found


SHAPES = shapes()


@pytest.mark.parametrize("case", [case for _, case in SHAPES], ids=[name for name, _ in SHAPES])
def test_the_kernels_in_emulation(kernels, case):
    check(kernels, case)


def test_rows_that_are_not_finite(kernels):
    logits = rows(6, 100)
    logits[0, 40], logits[1, 40], logits[2], logits[3, 50:] = INF, NAN, -INF, -INF
    case = Case(logits, torch.tensor([3, 3, 3, 3, 60, 99]), grad=torch.ones(1))
    logp, stats = run(kernels, STATS, case)
    assert logp[:3].isnan().all() and logp[3:].isfinite().all()
    _, residual = run(kernels, RESIDUAL, case)
    assert residual[:3].isnan().all() and residual[3:].isfinite().all() and (residual[3, 50:] == 0).all()
    assert run(kernels, GRADIENT, case, stats)[1][:3].isnan().all()
    logits[4, 60] = -INF
    assert run(kernels, STATS, case)[0][4] == -INF


def test_large_logits_keep_the_digits_of_the_sum(kernels):
    logits = rows(2, 5000, scale=1.0) + 1e4
    check(kernels, Case(logits, targets(2, 5000), grad=torch.ones(1)))  # one rounded log-sum-exp would be 5e-4 off


@pytest.mark.parametrize("target", [-1, 100, 2**40])
def test_nothing_is_read_for_a_target_outside_the_vocabulary(kernels, target):
    check(kernels, Case(rows(2, 100), torch.tensor([5, target]), grad=torch.ones(2)))  # the sanitizer watches


def test_the_result_does_not_depend_on_the_threads_order(kernels):
    case = Case(rows(3, 3001, BF16), targets(3, 3001), in_place=True)
    found = [run(kernels, RESIDUAL, case, seed=seed) for seed in range(5)]
    assert all(torch.equal(one, found[0][0]) and torch.equal(other, found[0][1]) for one, other in found)


BROKEN = {
    "the barrier after the warps' sums": {
        "if (lane == 0) of_warp[warp] = sum;\n  __syncthreads();": "if (lane == 0) of_warp[warp] = sum;"},
    "the barrier before the block's sum is read": {
        "  }\n  __syncthreads();\n  return of_block;": "  }\n  return of_block;"},
    "the barrier before the row is overwritten": {
        "__syncthreads();  // the target's logit is read before it is overwritten": ""},
    "the tail": {"k = split.tail + thread; k < vocabulary;": "k = split.tail + thread; k < vocabulary - 1;"},
    "the packs' end": {"for (; i < split.tail; i += stride)": "for (; i <= split.tail; i += stride)"},
    "the stride over rows": {"n += gridDim.x) {\n    const T* row": "n += 2 * gridDim.x) {\n    const T* row"},
    "a shuffle": {"__shfl_down_sync(0xffffffffu, mine.sum, distance)": "__shfl_down_sync(0xffffffffu, mine.sum, 1)"},
    "the order of a shuffle's lanes": {"distance > 0; distance /= 2": "distance > 1; distance /= 2"},
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_broken_kernels_are_caught(what, tmp_path):
    """The emulation would be worth nothing if it did not see them."""
    program = build(tmp_path / "broken", BROKEN[what])
    seen = (
        "1000 float32-float32",
        "4097 bfloat16-bfloat16",
        "1000 float32-float32 striding",
        "63 float32-float32 striding",
    )
    with pytest.raises(AssertionError):
        for name, case in SHAPES:
            if name in (*seen, "4097 bfloat16-bfloat16"):
                for seed in range(3):
                    check(program, case, seed)


def test_cuda_file_has_no_torch_header_and_no_atomics():
    for name in ("sequence_logp_cuda.cu", "sequence_logp_cuda.h", "sequence_logp.h"):
        text = (CSRC / "likelihood" / name).read_text()
        assert not re.findall(r"#include <(torch|ATen|c10)", text)
        assert "atomic" not in text


def nvcc() -> str:
    found = shutil.which("nvcc")
    if found is None:
        pytest.skip("nvcc is not installed")
    return found


def test_nvcc_alone_compiles_the_kernels_for_all_targets(tmp_path):
    """With the flags that PyTorch's builder adds: they switch the conversions of 16-bit numbers off."""
    assert "-D__CUDA_NO_BFLOAT16_CONVERSIONS__" in COMMON_NVCC_FLAGS
    flags = ["-std=c++17", "-O3", "--extended-lambda", "-Werror=all-warnings", f"-I{CSRC}"]
    source = CSRC / "likelihood" / "sequence_logp_cuda.cu"
    done = subprocess.run(
        [nvcc(), *flags, *COMMON_NVCC_FLAGS, *TARGETS, "-Xptxas=-v", "-c", source, "-o", tmp_path / "kernels.o"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert set(re.findall(r"for '(sm_\d+)'", done.stderr)) == {"sm_80", "sm_86", "sm_90"}
    assert {int(n) for n in re.findall(r"(\d+) bytes spill", done.stderr)} == {0}
    assert max(int(n) for n in re.findall(r"Used (\d+) registers", done.stderr)) <= 64  # two blocks of 512 a processor


def test_gradients_are_stored_16_bytes_at_a_time(tmp_path):
    flags = ["-std=c++17", "-O3", "--extended-lambda", f"-I{CSRC}", "-arch=sm_90", "-ptx"]
    source, ptx = CSRC / "likelihood" / "sequence_logp_cuda.cu", tmp_path / "kernels.ptx"
    subprocess.run([nvcc(), *flags, *COMMON_NVCC_FLAGS, source, "-o", ptx], check=True, capture_output=True)
    kernels = [
        part
        for part in ptx.read_text().split(".entry ")[1:]
        if "row_gradient" in part[:80] or "row_residual" in part[:80]
    ]
    assert len(kernels) == 8  # three types, and for the residual two narrower than its logits
    for text in kernels:
        stores = re.findall(r"st\.global\.\w+(?:\.\w+)?", text)
        wide = [store for store in stores if store == "st.global.v4.u32"]
        assert len(wide) >= 5 and len(stores) - len(wide) <= 6, stores  # one by one: the ends of a row, and log p


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
