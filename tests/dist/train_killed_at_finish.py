"""cca_ds/train.py, killed between the last checkpoint and the mark of completion."""

import os
import signal
import sys

from cca_ds.train import main
from cca_ds.training import run_folder


def killed(folder, summary) -> None:
    """In the place of `run_folder.finish`."""
    os.kill(os.getpid(), signal.SIGKILL)


run_folder.finish = killed
sys.exit(main())
