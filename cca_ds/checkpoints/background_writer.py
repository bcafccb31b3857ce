"""One thread that writes checkpoints off the training path."""

import queue
import threading
from collections.abc import Callable
from typing import Any


class BackgroundWriter:
    """Runs submitted calls in a thread, one after another, in order.

    Calls may use only state that was copied to host memory, and no collective, as ranks' threads run at different
    times. `submit` blocks while `waiting` calls are queued, which bounds the memory of the copies. An exception of a
    call is raised once, by the next `submit`, `wait` or `close` in the training thread.
    """

    def __init__(self, waiting: int = 1):
        self._calls: queue.Queue[tuple[Callable[..., Any], tuple, dict] | None] = queue.Queue(maxsize=waiting)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="checkpoint-writer", daemon=True)
        self._thread.start()

    def submit(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Queue `call(*args, **kwargs)`; blocks while the queue is full; raises an earlier call's exception."""
        self._raise()
        if not self._thread.is_alive():
            raise RuntimeError("the checkpoint writer is closed")
        self._calls.put((call, args, kwargs))

    def wait(self) -> None:
        """Block until all submitted calls have run; raises a call's exception."""
        self._calls.join()
        self._raise()

    def close(self) -> None:
        """Run all submitted calls and end the thread; a second call does nothing."""
        if self._thread.is_alive():
            self._calls.put(None)
            self._thread.join()
        self._raise()

    def _run(self) -> None:
        while (item := self._calls.get()) is not None:
            call, args, kwargs = item
            try:
                call(*args, **kwargs)
            except BaseException as error:
                self._error = self._error or error
            finally:
                item = call = args = kwargs = None  # frees the copied state before the next call
                self._calls.task_done()
        self._calls.task_done()

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error
