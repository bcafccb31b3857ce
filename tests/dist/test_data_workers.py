"""Worker processes that read the codes end with whoever reads from them, even one that hangs."""

import os
import re
import signal
import subprocess
import sys

import pytest

from cca_ds.cluster.failures import explain_error
from cca_ds.data.batches import read_ahead
from tests.dist.ranks import REPOSITORY, clean_environment

pytestmark = pytest.mark.dist

# A worker is stopped for good, then the reader fails: at its exit Python waits for its children.
HANGING = """
import os, signal, sys
from pathlib import Path
from cca_ds.data.batches import BatchPlan, Steps, read_ahead
from tests.support.digits_table import digits_table

steps = Steps(digits_table(Path(sys.argv[1])), BatchPlan(32, 0, 0.1, 10), 0, [32])
for _ in read_ahead(steps, range(50), 1, 2):
    (worker,) = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    print(worker, flush=True)
    os.kill(int(worker), signal.SIGSTOP)
    raise RuntimeError("as the run's own error")
"""


@pytest.mark.slow  # torch waits five seconds for it, twice
def test_a_worker_that_hangs_does_not_hang_the_end(tmp_path):
    process = subprocess.run(
        [sys.executable, "-c", HANGING, str(tmp_path)], cwd=REPOSITORY, env=clean_environment(), capture_output=True,
        text=True, timeout=100,
    )  # fmt: skip
    assert process.returncode == 1 and "as the run's own error" in process.stderr
    with pytest.raises(ProcessLookupError):
        os.kill(int(process.stdout), signal.SIGKILL)


class Killed:
    """A batch whose worker dies while the reader asks it for the tensors' memory."""

    def __reduce__(self):
        return _reset_by, (os.getpid(),)


def _reset_by(worker: int) -> None:
    os.kill(worker, signal.SIGKILL)
    raise ConnectionResetError(104, "Connection reset by peer")


def test_a_worker_killed_while_a_batch_is_passed_is_named():
    with pytest.raises(RuntimeError) as caught:
        next(read_ahead([Killed()] * 4, range(4), workers=1, prefetch=1))
    assert re.match(r"data-loader worker \d+ (exited unexpectedly|is killed by signal)", explain_error(caught.value))
