"""Builds and installs cca_ds.

    pip install --no-build-isolation -e .          # CUDA kernels where they can be built, else C++, else none
    CCA_DS_BUILD=cuda|cpu|none pip install ...     # one of them, or an error with the reason

The kernels of csrc/ become libraries beside cca_ds/ops/library.py, which loads them: `_C` (the schema, and the CUDA
kernels), and `_cpu_default`, `_cpu_avx2`, `_cpu_avx512`, of which one is loaded, as PyTorch's own dispatch decides.
"""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup

CHOICES = ("cuda", "cpu", "none")
ARCHITECTURES = ("80", "86", "90")  # A100, A40, H100; newer ones by PTX
CPU_SOURCES = [
    "csrc/likelihood/sequence_logp_cpu.cpp",
    *(f"csrc/cpu/{name}_cpu.cpp" for name in ("matmul", "activations", "norms", "heads", "attention", "decoding")),
]
SHARED_SOURCES = ["csrc/likelihood/bindings.cpp", "csrc/likelihood/linear_sequence_logp.cpp"]
CUDA_SOURCES = ["csrc/likelihood/bindings_cuda.cpp", "csrc/likelihood/sequence_logp_cuda.cu"]
HEADERS = sorted(str(path) for path in Path("csrc").rglob("*.h"))
INCLUDES = [str(Path("csrc").resolve())]
CPU_FLAGS = ["-O3", "-g0", "-fopenmp", "-Wno-unknown-pragmas"]
INSTRUCTION_SETS = {
    "default": ["-DCPU_CAPABILITY=DEFAULT", "-DCPU_CAPABILITY_DEFAULT"],
    "avx2": ["-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2", "-mavx2", "-mfma", "-mf16c"],
    "avx512": [
        "-DCPU_CAPABILITY=AVX512",
        "-DCPU_CAPABILITY_AVX512",
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"),
    ],
}


class BuildError(SystemExit):
    """The build that was requested is not possible here."""

    def __init__(self, message: str) -> None:
        super().__init__(f"cca_ds: {message}")


def missing_for_cpu() -> str | None:
    """Why the C++ kernels cannot be built here; None where they can."""
    try:
        import torch  # noqa: F401
    except ImportError:
        return "torch is not installed where setup.py runs (install it first, and use --no-build-isolation)"
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler ({compiler} is not on PATH; CXX names another)"
    return None


def toolkit_of_nvcc() -> str | None:
    """The toolkit's folder as nvcc itself says it: an nvcc on PATH may be a wrapper, which misleads PyTorch."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    said = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    top = next((line.split("TOP=", 1)[1].strip() for line in said.splitlines() if "TOP=" in line), None)
    return top and os.path.realpath(top)


def missing_for_cuda() -> str | None:
    """Why the CUDA kernels cannot be built here; None where they can."""
    missing = missing_for_cpu()
    if missing:
        return missing
    import torch

    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} has no CUDA (install a CUDA build of it)"
    if not (os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")) and (toolkit := toolkit_of_nvcc()):
        os.environ["CUDA_HOME"] = toolkit  # the next import reads it
    from torch.utils.cpp_extension import CUDA_HOME

    if CUDA_HOME is None:
        return "there is no CUDA toolkit (CUDA_HOME names its folder)"
    for part in ("bin/nvcc", "include/cuda_runtime.h"):
        if not os.path.exists(os.path.join(CUDA_HOME, part)):
            return f"{CUDA_HOME} is no CUDA toolkit, it has no {part} (CUDA_HOME names the toolkit's folder)"
    return None


def shout(message: str) -> None:
    """One framed line, on stderr and so in pip's output with -v and on failure."""
    print(f"\n{'*' * 100}\n* cca_ds: {message}\n{'*' * 100}\n", file=sys.stderr, flush=True)


def chosen_build() -> str:
    """What to build: CCA_DS_BUILD, or the most that can be built here."""
    asked = os.environ.get("CCA_DS_BUILD", "")
    if asked and asked not in CHOICES:
        raise BuildError(f"CCA_DS_BUILD={asked} is not known; choose one of {', '.join(CHOICES)}")
    missing = {"cuda": missing_for_cuda(), "cpu": missing_for_cpu(), "none": None}
    if asked:
        if missing[asked]:
            raise BuildError(f"CCA_DS_BUILD={asked} cannot be built here: {missing[asked]}")
        return asked
    best = next(choice for choice in CHOICES if missing[choice] is None)
    if best == "none":
        shout(f"NO KERNELS ARE BUILT, the slower plain-torch versions will be used: {missing['cpu']}.")
    return best


def gencode() -> list[str]:
    """nvcc's target flags: machine code for each architecture, and PTX of the last for newer ones."""
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    return [*flags, f"-gencode=arch=compute_{ARCHITECTURES[-1]},code=compute_{ARCHITECTURES[-1]}"]


def extensions(build: str) -> list[Extension]:
    """The libraries to build."""
    if build == "none":
        return []
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    x86 = platform.machine().lower() in ("x86_64", "amd64")
    modules = [
        CppExtension(
            f"cca_ds.ops._cpu_{name}",
            CPU_SOURCES,
            include_dirs=INCLUDES,
            depends=HEADERS,
            extra_compile_args=[*CPU_FLAGS, *flags],
            extra_link_args=["-fopenmp"],
        )
        for name, flags in INSTRUCTION_SETS.items()
        if x86 or name == "default"
    ]
    if build == "cpu":
        return [
            CppExtension("cca_ds.ops._C", SHARED_SOURCES, include_dirs=INCLUDES, extra_compile_args=["-O2", "-g0"]),
            *modules,
        ]
    nvcc = ["-O3", "--extended-lambda", *gencode()]
    library = CUDAExtension(
        "cca_ds.ops._C",
        [*SHARED_SOURCES, *CUDA_SOURCES],
        include_dirs=INCLUDES,
        depends=HEADERS,
        extra_compile_args={"cxx": ["-O2", "-g0"], "nvcc": nvcc},
    )
    return [library, *modules]


def build_commands(build: str) -> dict:
    """PyTorch's builder, with ninja where it is installed."""
    if build == "none":
        return {}
    from torch.utils.cpp_extension import BuildExtension

    return {"build_ext": BuildExtension}


def main() -> None:
    """Hands it all to setuptools."""
    build = chosen_build()
    setup(
        name="cca_ds",
        version="0.1.0",
        description="Condition Contrastive Alignment of autoregressive image models, on DeepSpeed",
        python_requires=">=3.11",
        packages=find_packages(include=["cca_ds", "cca_ds.*"]),
        package_data={"cca_ds": ["recipes/*.yaml", "assets/*", "reporting/*.css"]},
        install_requires=[
            "torch>=2.11",
            "deepspeed>=0.19,<0.20",
            "mpi4py>=4",
            "datasets>=3",
            "pyyaml>=6",
            "tensorboard>=2.16",
            "ninja>=1.11",
            "pydantic>=2.7,<3",
            "scikit-learn>=1.5",
            "safetensors>=0.4.3",
            "tqdm>=4.66",
            "numpy>=1.26",
            "pillow>=10",
            "matplotlib>=3.8",
        ],
        extras_require={"test": ["pytest>=8", "pytest-timeout>=2.3", "ruff>=0.8"]},
        ext_modules=extensions(build),
        cmdclass=build_commands(build),
    )


if __name__ == "__main__":
    main()
