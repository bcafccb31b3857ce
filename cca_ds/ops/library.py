"""The compiled kernels of csrc/, built by setup.py into libraries beside this file."""

import warnings
from pathlib import Path

import torch


def _load_libraries(folder: Path) -> str:
    """Loads the schema and the CPU kernels for this machine; says "cuda", "cpp", or, where there is none, "torch"."""
    capability = torch.backends.cpu.get_cpu_capability().lower()
    capability = capability if capability in ("avx2", "avx512") else "default"
    found = [next(iter(sorted(folder.glob(f"{name}.*so"))), None) for name in ("_C", f"_cpu_{capability}")]
    if None in found:
        reason = "not built"
    else:
        try:
            for library in found:
                torch.ops.load_library(library)
        except OSError as error:
            reason = f"built for another PyTorch or Python ({error})"
        else:
            has_cuda = torch._C._dispatch_has_kernel_for_dispatch_key("cca_ds::row_stats", "CUDA")
            return "cuda" if has_cuda else "cpp"
    remedy = "run `pip install --no-build-isolation -e .` in the repository"
    warnings.warn(
        f"cca_ds: the kernels of csrc/ are {reason}; the slower plain-torch twin is used. To build them, {remedy}.",
        stacklevel=2,
    )
    return "torch"


_BACKEND = _load_libraries(Path(__file__).parent)


def backend() -> str:
    """Which implementation is in use: "cuda" and "cpp" are the built extension, "torch" the plain twin."""
    return _BACKEND
