"""SIGTERM, SIGUSR1 and SIGINT request a stop: the ranks agree on a step, save, and exit.

stop = StopSignal()                        # early: before this line a signal ends the process at once
for step in steps:
    ...
    sums, stopping, _ = coordinator.sum_over_ranks(sums)      # the coordinator holds `stop`
    if stopping:                           # the same on every rank
        save(); break
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# A launcher may hand on the terminal's own Ctrl-C once more: within a second it is the same one
SAME_REQUEST_SECONDS = 1.0


class Stopped(Exception):
    """The ranks agreed to stop before any of them had begun to compute the next step.

    Args:
        done: number of the last finished step; 0 before the first.
    """

    def __init__(self, done: int):
        super().__init__(f"stopped after step {done}")
        self.done = done


class StopSignal:
    """Handles SIGTERM, SIGUSR1 and SIGINT: the first sets `requested` and `name`, and the process goes on.

    Schedulers and launchers send several, also minutes apart and while the checkpoint is written (a warning ahead of
    the time limit, then the limit): they are one request, and SIGKILL is theirs to send. Only a person's second Ctrl-C
    ends the process at once, without a checkpoint, with exit code 130.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._interrupted: float | None = None
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)

    @property
    def requested(self) -> bool:
        """Whether this process has received a stop signal; the other ranks may not have."""
        return self.name is not None

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self.name = self.name or signal.Signals(number).name
        if number != signal.SIGINT:
            return
        now = time.monotonic()
        if self._interrupted is None:
            self._interrupted = now
        elif now - self._interrupted >= SAME_REQUEST_SECONDS:
            os.write(2, b"interrupted a second time: ended at once, without a checkpoint\n")
            os._exit(128 + number)
