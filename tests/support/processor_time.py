"""Processor time of commands, in units that a slow or busy machine changes as much: of `import torch`."""

import functools
import resource
import subprocess
import sys


def run_measured(*arguments: str) -> tuple[subprocess.CompletedProcess, float]:
    """`python *arguments`, run to its end, and the seconds of user time that it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300)
    return done, resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before.ru_utime


@functools.cache
def torch_imports() -> float:
    """Seconds of user time of `import torch`, the best of three."""
    return min(run_measured("-c", "import torch")[1] for _ in range(3))
