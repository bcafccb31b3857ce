"""A signal asks the run to stop; the ranks then agree on a step, save, and exit.

stop = StopSignal()                        # early: until it stands, a signal ends the process at once
for step in steps:
    ...
    if agree(stop.requested):              # every rank, every step
        save(); break
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# DeepSpeed's launcher sends SIGTERM right after the terminal's own Ctrl-C: one wish, told twice
ONE_WISH_SECONDS = 1.0


class Stopped(Exception):
    """The ranks agreed to stop within a step, before any of them had begun to compute it.

    Args:
        done: number of the last finished step; 0 before the first.
    """

    def __init__(self, done: int):
        super().__init__(f"stopped after step {done}")
        self.done = done


class StopSignal:
    """Remembers the first of SIGTERM, SIGUSR1 and SIGINT instead of ending the process.

    A second one, of whatever kind, ends the process at once with 128 + its number, for who does not want to wait
    for the step; one that follows the first within a second is the same wish and changes nothing.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._first = 0.0
        self._previous = {number: signal.signal(number, self._remember) for number in STOP_SIGNALS}

    @property
    def requested(self) -> bool:
        return self.name is not None

    def restore(self) -> None:
        """Put back what handled the signals before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.name is None:
            self.name, self._first = signal.Signals(number).name, now
        elif now - self._first >= ONE_WISH_SECONDS:
            os.write(2, f"a second signal, {signal.Signals(number).name}: ended at once\n".encode())
            os._exit(128 + number)
