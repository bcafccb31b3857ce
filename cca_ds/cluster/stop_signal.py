"""SIGTERM, SIGUSR1 and SIGINT request a stop: the ranks agree on a step, save, and exit.

stop = StopSignal()                        # early: before this line a signal ends the process at once
for step in steps:
    ...
    sums, stopping = coordinator.sum_over_ranks(sums)      # the coordinator holds `stop`
    if stopping:                           # the same on every rank
        save(); break
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# DeepSpeed's launcher sends SIGTERM right after the terminal's own Ctrl-C: within a second it is the same request
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

    A second signal of any of the three ends the process at once, without a checkpoint, with exit code 128 + its
    number. A signal within a second of the first is part of the same request and is ignored.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._first = 0.0
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)

    @property
    def requested(self) -> bool:
        """Whether this process has received a stop signal; the other ranks may not have."""
        return self.name is not None

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.name is None:
            self.name, self._first = signal.Signals(number).name, now
        elif now - self._first >= SAME_REQUEST_SECONDS:
            os.write(2, f"a second signal, {signal.Signals(number).name}: ended at once\n".encode())
            os._exit(128 + number)
