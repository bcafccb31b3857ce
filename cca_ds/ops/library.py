"""The compiled kernels of csrc/: loading them, and whether one takes a given tensor."""

import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from cca_ds.ops.build_record import read_record

KERNEL_DTYPES = (torch.float32, torch.bfloat16)


def _load_libraries(folder: Path) -> str:
    """Load the schema and the CPU kernels for this machine from `folder`; returns what `backend` returns.

    Warns with the reason and the remedy where the libraries are missing or built for another PyTorch.
    """
    capability = torch.backends.cpu.get_cpu_capability().lower()
    usable = {"avx512": ("avx512", "avx2", "default"), "avx2": ("avx2", "default")}.get(capability, ("default",))
    kernels = [path for name in usable for path in folder.glob(f"_cpu_{name}.*so")]
    found = [next(iter(paths), None) for paths in (sorted(folder.glob("_C.*so")), kernels)]
    record = read_record(folder)
    if None in found:
        reason = f"not built ({record['summary']})" if record["kernels"] == "none" else "not built"
    elif record["torch"] not in (None, torch.__version__):
        reason = f"built for PyTorch {record['torch']}, and this is {torch.__version__}"
    else:
        try:
            for library in found:
                torch.ops.load_library(library)
        except OSError as error:
            reason = f"built for another PyTorch or Python ({' '.join(str(error).split())})"
        else:
            has_cuda = torch._C._dispatch_has_kernel_for_dispatch_key("cca_ds::row_stats", "CUDA")
            return "cuda" if has_cuda else "cpp"
    remedy = "install cca_ds again beside this PyTorch (`pip install --no-build-isolation .` in the repository)"
    warnings.warn(
        f"cca_ds: the kernels of csrc/ are {reason}; the slower plain-torch versions are used. "
        f"To build them, {remedy}.",
        stacklevel=2,
    )
    return "torch"


_BUILT = _load_libraries(Path(__file__).parent)
_in_use = _BUILT


def backend(device: str | None = None) -> str:
    """Which implementation is in use: "cuda" or "cpp" for the built kernels, "torch" for the plain versions.

    Args:
        device: "cuda" or "cpu", the type of a device: what computes there. None: what was built.
    """
    if device is None or _in_use == "torch":
        return _in_use
    return "cpp" if device == "cpu" else "cuda" if _in_use == "cuda" else "torch"


@contextmanager
def eager_ops() -> Iterator[None]:
    """Within it every op runs its plain version, as if the kernels were not built: for tests and measurements."""
    global _in_use
    before, _in_use = _in_use, "torch"
    try:
        yield
    finally:
        _in_use = before


def has_kernel(x: Tensor, dtypes: Collection[torch.dtype] = KERNEL_DTYPES) -> bool:
    """Whether the CPU kernels are in use and take a tensor of the device and dtype of `x`.

    Inside a compiled block they are not: the compiler fuses the plain versions itself.
    """
    usable = backend() != "torch" and not torch.compiler.is_compiling()
    return usable and x.device.type == "cpu" and x.dtype in dtypes


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that autocast gives the matmuls on the device of `x`; without autocast the dtype of `x`."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def register(name: str, fake: Callable[..., Any], flops: Callable[..., int] | None = None) -> None:
    """Give torch what it needs to trace the kernel `cca_ds::name`; does nothing where no kernel is built.

    Args:
        fake: (arguments) -> empty tensors of the results' shapes and dtypes.
        flops: (shapes of the tensor arguments, **_) -> operations, for torch's FlopCounterMode.
    """
    if _BUILT == "torch":
        return
    torch.library.register_fake(f"cca_ds::{name}", fake)
    if flops is not None:
        register_flop_formula(getattr(torch.ops.cca_ds, name))(flops)
