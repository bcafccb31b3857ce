"""Starts ranks of a script by forking one process that has imported what they need: a start costs a second, not ten.

Run as a program it reads requests from its standard input, one JSON object a line: the script, its arguments, the
environment, and a `base` path. It forks, writes the child's pid to `base`.pid, and once the child has ended its exit
status to `base`.exit. It ends, with all its children, when its input does.
"""

from __future__ import annotations

import functools
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.dist.ranks import REPOSITORY, RankGroup, clean_environment

CPU_ONLY = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


class Fork:
    """A forked rank, with what `RankGroup` asks of a `subprocess.Popen`."""

    def __init__(self, base: Path):
        self._exit = base.with_name(base.name + ".exit")
        path = base.with_name(base.name + ".pid")
        while not path.is_file():
            assert fork_server().poll() is None, "the fork server died"
            time.sleep(0.01)
        self.pid = int(path.read_text())
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None and self._exit.is_file():
            self.returncode = int(self._exit.read_text())
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """As `subprocess.Popen.wait`."""
        end = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired("a forked rank", timeout)
            time.sleep(0.01)
        return self.returncode


class ForkedRanks(RankGroup):
    """Ranks of a script, as `start_ranks` starts them, on the CPU."""

    def _start(self, command, rank, n, env, cwd) -> Fork:
        request = {
            "script": command[1],
            "arguments": command[2:],
            "environment": clean_environment(
                {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(n),
                    "LOCAL_WORLD_SIZE": str(n),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(self._port),
                    **CPU_ONLY,
                    **(env or {}),
                }
            ),
            "base": str(Path(self._folder.name) / str(rank)),
        }
        server = fork_server()
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        return Fork(Path(request["base"]))


@functools.cache
def fork_server() -> subprocess.Popen:
    """The server of this test session."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.dist.fork_server"],
        cwd=REPOSITORY,
        env=clean_environment(CPU_ONLY),
        stdin=subprocess.PIPE,
        text=True,
    )


def _become(request: dict) -> None:
    """The child: a session of its own, its streams in files, then the script as if Python had been started on it."""
    os.setsid()
    base = request["base"]
    for number, name, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, f"{base}.stdout", os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        (2, f"{base}.stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
    ):
        handle = os.open(name, flags)
        os.dup2(handle, number)
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    sys.argv = [request["script"], *request["arguments"]]
    runpy.run_path(request["script"], run_name="__main__")


def _run_child(request: dict) -> None:
    import traceback

    code = 1
    try:
        _become(request)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # as Python ends on it
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _reap(children: dict[int, str]) -> None:
    for pid in list(children):
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            _write(children.pop(pid) + ".exit", str(os.waitstatus_to_exitcode(status)))


def _write(path: str, text: str) -> None:
    Path(path + ".tmp").write_text(text)
    os.replace(path + ".tmp", path)


def _serve() -> None:
    import datasets  # noqa: F401
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  (deepspeed.initialize imports it: two seconds)
    import sklearn.datasets  # noqa: F401
    import torch._dynamo  # (the first optimizer imports it)
    import torch.distributed.fsdp
    import torch.utils.tensorboard

    import cca_ds.planning.dry_run
    import cca_ds.training.run  # noqa: F401

    torch.set_num_threads(1)
    children: dict[int, str] = {}
    pending = b""
    while True:
        _reap(children)
        if not select.select([0], [], [], 0.02)[0]:
            continue
        data = os.read(0, 1 << 20)
        if not data:
            break
        *lines, pending = (pending + data).split(b"\n")
        for line in lines:
            request = json.loads(line)
            pid = os.fork()
            if pid == 0:
                _run_child(request)
            children[pid] = request["base"]
            _write(request["base"] + ".pid", str(pid))
    for pid in children:
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    _serve()
