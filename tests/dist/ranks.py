"""Start several ranks of a program on this machine, for tests.

    outputs = run_ranks("tests/dist/program.py", 2, arguments=["--steps", "3"], timeout=60)
    assert outputs[1].stdout.strip() == "..."

    with start_ranks("cca_ds.train", 2, arguments=[...]) as ranks:      # a module's name runs as python -m
        ranks.wait_for("step 3", rank=0, timeout=60)
        ranks.signal(1, signal.SIGKILL)
        outputs = ranks.wait(timeout=60)

The ranks see what torchrun would set (RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and a free
MASTER_PORT) and no other launcher's variable. Nothing outlives the call.
"""

from __future__ import annotations

import contextlib
import os
import signal as signals
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "LOCAL_SIZE")
LAUNCHER_PREFIXES = ("SLURM", "OMPI_", "PMI_", "PMIX_", "MPI_", "TORCHELASTIC_", "MASTER_", "CCA_", "CROSS_")


class RanksFailed(AssertionError):
    """A rank failed or outlived its time; the message holds the tail of every rank's output."""


@dataclass(frozen=True)
class RankOutput:
    rank: int
    returncode: int  # negative: the number of the signal that ended it
    stdout: str
    stderr: str


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def clean_environment(extra: Mapping[str, str | None] | None = None) -> dict[str, str]:
    """This process's environment without any launcher's variables, plus `extra`, in which None removes a variable."""
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in LAUNCHER_VARIABLES and not key.startswith(LAUNCHER_PREFIXES)
    }
    paths = [str(REPOSITORY), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    environment.setdefault("OMP_NUM_THREADS", "1")
    environment["PYTHONUNBUFFERED"] = "1"
    environment.update(extra or {})
    return {name: value for name, value in environment.items() if value is not None}


def python_command(target: str | Path, arguments: Sequence[str] = ()) -> list[str]:
    """A script ends in .py and is looked up from the repository's root; anything else is a module."""
    target = str(target)
    program = [str(REPOSITORY / target)] if target.endswith(".py") else ["-m", target]
    return [sys.executable, *program, *map(str, arguments)]


class RankGroup:
    """Running ranks; leaving the `with` block kills what is left of them."""

    def __init__(self, command: Sequence[str], n: int, env: Mapping[str, str] | None, cwd: str | Path | None):
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self._port = free_port()
        self.processes = [self._start(command, rank, n, env, cwd) for rank in range(n)]

    def _start(self, command, rank, n, env, cwd) -> subprocess.Popen:
        environment = clean_environment(
            {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(n),
                "LOCAL_WORLD_SIZE": str(n),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(self._port),
                **(env or {}),
            }
        )
        with open(self._file(rank, "stdout"), "w") as out, open(self._file(rank, "stderr"), "w") as error:
            return subprocess.Popen(
                command,
                cwd=cwd or REPOSITORY,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=error,
                start_new_session=True,
            )

    def _file(self, rank: int, stream: str) -> Path:
        return Path(self._folder.name) / f"{rank}.{stream}"

    def __enter__(self) -> RankGroup:
        return self

    def __exit__(self, *_) -> None:
        self.kill()
        self._folder.cleanup()

    def output(self, rank: int) -> RankOutput:
        code = self.processes[rank].poll()
        texts = [self._file(rank, stream).read_text(errors="replace") for stream in ("stdout", "stderr")]
        return RankOutput(rank, -999 if code is None else code, *texts)

    def signal(self, rank: int, number: int) -> None:
        """Send a signal to one rank's process group (its data-loader workers included)."""
        os.killpg(self.processes[rank].pid, number)

    def kill(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signals.SIGKILL)
            process.wait()

    def wait_for(self, text: str, rank: int = 0, timeout: float = 60) -> None:
        """Return once the rank's stdout or stderr contains `text`."""
        end = time.monotonic() + timeout
        while True:
            output = self.output(rank)
            if text in output.stdout or text in output.stderr:
                return
            if self.processes[rank].poll() is not None or time.monotonic() > end:
                raise RanksFailed(f"rank {rank} never printed {text!r}\n{self.tails()}")
            time.sleep(0.05)

    def wait(self, timeout: float = 120, grace: float | None = 20) -> list[RankOutput]:
        """Outputs by rank. Once one rank failed, the others have `grace` seconds (None: no such limit).

        Raises RanksFailed when `timeout` passes; ranks that outlive `grace` are killed (returncode -9).
        """
        end = time.monotonic() + timeout
        failed = None
        while None in (codes := [process.poll() for process in self.processes]):
            now = time.monotonic()
            if failed is None and any(codes):
                failed = now
            if grace is not None and failed is not None and now > failed + grace:
                break
            if now > end:
                raise RanksFailed(f"the ranks were not done after {timeout} s\n{self.tails()}")
            time.sleep(0.05)
        self.kill()
        return [self.output(rank) for rank in range(len(self.processes))]

    def tails(self, characters: int = 3000) -> str:
        """The end of every rank's output, for a failure's message."""
        outputs = [self.output(rank) for rank in range(len(self.processes))]
        return "\n".join(
            f"--- rank {output.rank}, exit status {output.returncode} ---\n"
            f"{output.stdout[-characters:]}\n{output.stderr[-characters:]}"
            for output in outputs
        )


def start_ranks(
    target: str | Path,
    n: int,
    *,
    arguments: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
    group: type[RankGroup] = RankGroup,
) -> RankGroup:
    """Running ranks; `group` is `ForkedRanks` where the ranks may skip their imports."""
    return group(python_command(target, arguments), n, env, cwd)


def run_ranks(
    target: str | Path,
    n: int,
    *,
    arguments: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
    timeout: float = 120,
    grace: float | None = 20,
    check: bool = True,
    group: type[RankGroup] = RankGroup,
) -> list[RankOutput]:
    """Run `n` ranks to their end; with `check`, a rank that exits non-zero raises RanksFailed."""
    with start_ranks(target, n, arguments=arguments, env=env, cwd=cwd, group=group) as ranks:
        outputs = ranks.wait(timeout, grace)
        if check and any(output.returncode for output in outputs):
            raise RanksFailed(f"a rank failed\n{ranks.tails()}")
        return outputs
