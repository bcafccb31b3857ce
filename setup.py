"""Builds and installs cca_ds.

    pip install --no-build-isolation -e .          # CUDA kernels where they can be built, else C++, else none
    pip install .                                  # the same, for the PyTorch of this environment, or else PyPI's
    CCA_DS_BUILD=cuda|cpu|none pip install ...     # one of them, or an error with the reason
    CCA_DS_CPU=avx512 pip install ...              # for one kind of processor only, in a third of the time

The kernels of csrc/ become libraries beside cca_ds/ops/library.py, which loads them: `_C` (the schema, and the CUDA
kernels), and `_cpu_default`, `_cpu_avx2`, `_cpu_avx512`, of which one is loaded, as PyTorch's own dispatch decides.
`build.json` beside them says what was built and why no more; `python -m cca_ds` prints it.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_py import build_py

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
CPP_TRIAL = """
    #include <Python.h>
    #include <cmath>
    #include <omp.h>
    double sum(const double* x, int n) {
        double total = 0;
        #pragma omp parallel for reduction(+ : total)
        for (int i = 0; i < n; ++i) total += std::exp(x[i]) * omp_get_num_threads();
        return total;
    }
"""
CUDA_TRIAL = """
    #include <cuda_runtime.h>
    #include <cuda_bf16.h>
    __global__ void add(__nv_bfloat16* x, float value) {
        x[threadIdx.x] = __float2bfloat16(__bfloat162float(x[threadIdx.x]) + value);
    }
    void launch(__nv_bfloat16* x, cudaStream_t stream) {
        add<<<1, 32, 0, stream>>>(x, 1.0f);
    }
"""


class BuildError(SystemExit):
    """The build that was requested is not possible here."""

    def __init__(self, message: str) -> None:
        super().__init__(f"cca_ds: {message}")


def find_torch() -> bool:
    """Whether torch can be imported; pip's build isolation hides that of the environment, which is looked up there."""
    installed = sysconfig.get_path("purelib")
    if installed not in sys.path and os.path.isdir(os.path.join(installed, "torch")):
        sys.path.append(installed)
    try:
        import torch  # noqa: F401
    except (ImportError, OSError):
        return False
    return True


def compiler() -> str:
    """The C++ compiler's command without its flags."""
    return (os.environ.get("CXX") or "c++").split()[0]


def fails_to_compile(command: list[str], name: str, source: str) -> str | None:
    """Why `command` does not compile a file `name` of ten lines; None where it does."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_text(textwrap.dedent(source))
        try:
            done = subprocess.run(
                [*command, "-c", str(path), "-o", str(path.with_suffix(".o"))],
                capture_output=True, text=True, timeout=300, cwd=folder,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{command[0]} does not run ({error})"
    if done.returncode == 0:
        return None
    said = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    cause = next((line for line in said if "error" in line), said[0] if said else f"exit code {done.returncode}")
    return f"{command[0]} does not compile a program of ten lines ({cause.strip().replace(folder + os.sep, '')})"


def missing_for_cpu() -> str | None:
    """Why the C++ kernels cannot be built here; None where they can."""
    if shutil.which(compiler()) is None:
        return f"there is no C++ compiler ({compiler()} is not on PATH; CXX names another)"
    if not find_torch():
        return "torch is not installed where setup.py runs (install it first, and use --no-build-isolation)"
    headers = sysconfig.get_path("include")
    return fails_to_compile([compiler(), "-std=c++17", "-fPIC", "-fopenmp", f"-I{headers}"], "trial.cpp", CPP_TRIAL)


def toolkit_of_nvcc() -> str | None:
    """The toolkit's folder as nvcc itself says it: an nvcc on PATH may be a wrapper, which misleads PyTorch."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    try:
        said = subprocess.run(
            [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, timeout=60
        ).stderr
    except (OSError, subprocess.TimeoutExpired):
        return None
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
    nvcc = os.path.join(CUDA_HOME, "bin", "nvcc")
    for part in (nvcc, os.path.join(CUDA_HOME, "include", "cuda_runtime.h")):
        if not os.path.exists(part):
            return (
                f"{CUDA_HOME} is no CUDA toolkit, it has no {os.path.relpath(part, CUDA_HOME)} "
                "(CUDA_HOME names the toolkit's folder)"
            )
    return other_major_version(nvcc, torch.version.cuda) or fails_to_compile(
        [nvcc, "-std=c++17", *gencode()], "trial.cu", CUDA_TRIAL
    )


def other_major_version(nvcc: str, cuda_of_torch: str) -> str | None:
    """Why PyTorch would refuse this nvcc: the toolkit's major version must be that PyTorch was built with."""
    try:
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{nvcc} does not run ({error})"
    found = re.search(r"release (\d+)\.(\d+)", said)
    if found and found[1] != cuda_of_torch.split(".")[0]:
        return (
            f"{nvcc} is of CUDA {found[1]}.{found[2]} and PyTorch of CUDA {cuda_of_torch} (CUDA_HOME names a toolkit)"
        )
    return None


def shout(message: str) -> None:
    """One framed line, on stderr and so in pip's output with -v and on failure."""
    print(f"\n{'*' * 100}\n* cca_ds: {message}\n{'*' * 100}\n", file=sys.stderr, flush=True)


def chosen_build() -> tuple[str, str]:
    """What to build, CCA_DS_BUILD or the most that can be built here, and why no more ("" where it is all)."""
    requested = os.environ.get("CCA_DS_BUILD", "")
    if requested and requested not in CHOICES:
        raise BuildError(f"CCA_DS_BUILD={requested} is not known; choose one of {', '.join(CHOICES)}")
    if requested == "none":
        return "none", "CCA_DS_BUILD=none"
    if requested:
        missing = missing_for_cuda() if requested == "cuda" else missing_for_cpu()
        if missing:
            raise BuildError(f"CCA_DS_BUILD={requested} cannot be built here: {missing}")
        return requested, "" if requested == "cuda" else "CCA_DS_BUILD=cpu"
    try:
        missing = missing_for_cuda()
    except Exception as error:  # a PyTorch that fails when it is asked
        missing = f"looking for CUDA failed ({error})"
    if missing is None:
        return "cuda", ""
    if (missing_at_all := missing_for_cpu()) is None:
        return "cpu", missing
    return "none", missing_at_all


def describe(build: str, reason: str) -> str:
    """The outcome in one line."""
    what = {
        "cuda": "CUDA and C++ kernels",
        "cpu": "C++ kernels, none for CUDA",
        "none": "no kernels, so the slower plain-torch versions are used",
    }[build]
    return f"{what}: {reason}" if reason else what


def gencode() -> list[str]:
    """nvcc's target flags: machine code for each architecture, and PTX of the last for newer ones."""
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    return [*flags, f"-gencode=arch=compute_{ARCHITECTURES[-1]},code=compute_{ARCHITECTURES[-1]}"]


def instruction_sets() -> list[str]:
    """Those that C++ kernels are built for: CCA_DS_CPU (comma-separated), or all of the machine's architecture."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    known = list(INSTRUCTION_SETS) if x86 else ["default"]
    chosen = [name.strip() for name in os.environ.get("CCA_DS_CPU", ",".join(known)).split(",")]
    if not set(chosen) <= set(known):
        raise BuildError(f"CCA_DS_CPU={','.join(chosen)} is not known; choose of {', '.join(known)}")
    return chosen


def extensions(build: str) -> list[Extension]:
    """The libraries to build."""
    if build == "none":
        return []
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

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
        if name in instruction_sets()
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


def record(folder: Path, build: str, reason: str) -> None:
    """Write build.json: what was built, why no more, and for which PyTorch."""
    version = sys.modules["torch"].__version__ if "torch" in sys.modules else None
    found = {"kernels": build, "torch": version, "summary": describe(build, reason)}
    try:
        (folder / "build.json").write_text(json.dumps(found) + "\n")
    except OSError as error:  # an editable install of sources that cannot be written
        shout(f"build.json is not written ({error})")


class Package(build_py):
    """Python files, and ds_configs/ inside the package."""

    build, reason = "none", ""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return record(Path("cca_ds/ops"), self.build, self.reason)
        package = Path(self.build_lib, "cca_ds")
        self.copy_tree("ds_configs", str(package / "ds_configs"))
        record(package / "ops", self.build, self.reason)


def builder(chosen: str, why_no_more: str) -> type:
    """PyTorch's build_ext (ninja where it is installed), which falls back to less where no build was requested."""
    from torch.utils.cpp_extension import BuildExtension

    class Kernels(BuildExtension):
        build, reason = chosen, why_no_more

        def run(self) -> None:
            folder = Path(self.get_ext_fullpath("cca_ds.ops._C")).parent
            try:
                if self.build != "none":
                    super().run()
            except (Exception, SystemExit) as error:  # whatever a toolchain can fail with
                if os.environ.get("CCA_DS_BUILD"):
                    raise
                less = Kernels(self.distribution)
                less.reason = f"the {self.build} build failed ({' '.join(str(error).split())[:300]})"
                less.build, less.inplace = CHOICES[CHOICES.index(self.build) + 1], self.inplace
                shout(less.reason)
                for library in (*folder.glob("_C.*so"), *folder.glob("_cpu_*so")):
                    library.unlink()
                self.distribution.ext_modules = self.extensions = extensions(less.build)
                less.ensure_finalized()
                return less.run()
            shout(describe(self.build, self.reason))
            record(folder, self.build, self.reason)

    return Kernels


def torch_to_build_with(building: bool) -> list[str]:
    """What pip is to put into an isolated build: torch, where a compiler could use it and none is installed."""
    if building or os.environ.get("CCA_DS_BUILD") == "none" or shutil.which(compiler()) is None:
        return []
    return ["ninja"] if find_torch() else ["ninja", "torch>=2.11"]


def elsewhere() -> dict[str, dict[str, str]]:
    """Setuptools' scratch folders: beside the sources, or in a temporary folder where those cannot be written."""
    if os.access(".", os.W_OK):
        return {}
    scratch = tempfile.mkdtemp(prefix="cca_ds_build_")
    return {"egg_info": {"egg_base": scratch}, "build": {"build_base": scratch}}


def main() -> None:
    """Hands it all to setuptools."""
    building = bool({"bdist_wheel", "build", "build_ext", "editable_wheel", "develop", "install"} & set(sys.argv))
    build, reason = chosen_build() if building else ("none", "")
    if "editable_wheel" in sys.argv and build != "none" and not os.access("cca_ds/ops", os.W_OK):
        build, reason = "none", f"{Path('cca_ds/ops').resolve()} is not writable, and an editable install builds there"
    Package.build, Package.reason = build, reason
    commands = {"build_py": Package}
    if build != "none":
        commands["build_ext"] = builder(build, reason)
    elif building:
        shout(describe(build, reason))
    version = re.search(r'__version__ = "(.+)"', Path("cca_ds/__init__.py").read_text())[1]
    setup(
        name="cca_ds",
        version=version,
        description="Condition Contrastive Alignment of autoregressive image models, on DeepSpeed",
        long_description=Path("README.md").read_text(),
        long_description_content_type="text/markdown",
        license="MIT",
        license_files=["LICENSE"],
        project_urls={"Paper": "https://arxiv.org/abs/2410.09347"},
        keywords=["image generation", "autoregressive", "guidance", "alignment", "DeepSpeed"],
        classifiers=[
            "Environment :: GPU :: NVIDIA CUDA",
            "Intended Audience :: Science/Research",
            "Programming Language :: Python :: 3",
            "Programming Language :: C++",
            "Topic :: Scientific/Engineering :: Artificial Intelligence",
            "Typing :: Typed",
        ],
        python_requires=">=3.11",
        packages=find_packages(include=["cca_ds", "cca_ds.*"]),
        package_data={"cca_ds": ["py.typed", "recipes/*.yaml", "assets/*", "reporting/*.css"]},
        install_requires=[
            "torch>=2.11",
            "deepspeed>=0.19.5,<0.20",
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
        setup_requires=torch_to_build_with(building),
        entry_points={
            "console_scripts": [
                f"cca-{name} = cca_ds.{name}:main"
                for name in ("train", "encode", "sample", "evaluate", "export", "choose", "plan")
            ]
        },
        ext_modules=extensions(build),
        cmdclass=commands,
        options=elsewhere(),
    )


if __name__ == "__main__":
    main()
