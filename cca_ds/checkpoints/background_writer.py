"""One thread that writes checkpoints off the training path."""

import queue
import threading
from collections.abc import Callable
from typing import Any


class BackgroundWriter:
    """Runs the calls it is given one after another in a thread, in their order.

    Give it state that was copied to host memory, and no collective: another rank's thread may be elsewhere.
    `submit` blocks while `waiting` calls are queued, which bounds the memory of the copies. What a call
    raises is raised again, once, by the next `submit`, `wait` or `close` of the training thread.
    """

    def __init__(self, waiting: int = 1):
        self._calls: queue.Queue[tuple[Callable[..., Any], tuple, dict] | None] = queue.Queue(maxsize=waiting)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="checkpoint-writer", daemon=True)
        self._thread.start()

    def submit(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Queue `call(*args, **kwargs)`; waits for room, raises what an earlier call raised."""
        self._raise()
        if not self._thread.is_alive():
            raise RuntimeError("the checkpoint writer is closed")
        self._calls.put((call, args, kwargs))

    def wait(self) -> None:
        """Return when all that was submitted is written; raises what a call raised."""
        self._calls.join()
        self._raise()

    def close(self) -> None:
        """Write all that was submitted and end the thread; may be called again."""
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
                item = call = args = kwargs = None  # the copied state is freed before the next comes
                self._calls.task_done()
        self._calls.task_done()

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error
