"""One writer at a time in a folder, on any file system that all nodes share.

    OWNER.json    who writes: host, process, job and start; touched every few seconds

The file is made by `link`, which is atomic on NFS too (by exclusive creation where there are no links); no lock of the
kernel is used. A lock whose process is gone is taken over: at once where that can be seen (the same machine, or an
earlier attempt of the same Slurm job), else after its heartbeat has not come for half a minute.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cca_ds.files import sync_folder, write_new
from cca_ds.untrusted import not_a_file, parse_json

NAME = "OWNER.json"
BEAT_SECONDS = 5.0
SILENCE_SECONDS = 30.0


class FolderTaken(ValueError):
    """Another process writes to the folder; the message says which."""


class FolderLost(RuntimeError):
    """The folder was deleted, or taken over by a later start, while this process was writing to it."""


class FolderLock:
    """Makes this process the only writer of a folder until `release`; `check` tells whether it still is.

    Args:
        folder: exists.
        flag: how messages call it, e.g. "--output runs/x".
        environment: of the process, for the job's number and its restarts.
        say: gets a line where the lock of a vanished process is taken over.
        name: of the file, where writers that do not disturb one another share a folder.

    Raises:
        FolderTaken: a process that is alive holds it.
    """

    def __init__(self, folder: Path, flag: str, environment: Mapping[str, str] = os.environ,
                 say: Callable[[str], None] = lambda line: None,
                 beat_seconds: float = BEAT_SECONDS, silence_seconds: float = SILENCE_SECONDS,
                 name: str = NAME):  # fmt: skip
        self.path, self.flag = folder / name, flag
        self.owner = _this_process(environment)
        self._lost: str | None = None
        self._acquire(say, silence_seconds)
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat, args=(beat_seconds,), daemon=True, name="folder lock")
        self._thread.start()

    def check(self, look: bool = True) -> None:
        """Raise FolderLost where this process no longer owns the folder.

        Args:
            look: read the file now; else what the last heartbeat found.
        """
        if look and self._lost is None:
            self._look()
        if self._lost is not None:
            raise FolderLost(self._lost)

    def release(self) -> None:
        """Give the folder up; safe to call twice, and where it was lost."""
        self._released.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            if (found := _read(self.path)) and found.get("token") == self.owner["token"]:
                self.path.unlink()

    def _acquire(self, say: Callable[[str], None], silence_seconds: float) -> None:
        record = json.dumps(self.owner, indent=1) + "\n"
        for _ in range(5):  # between two looks another start may take it over first
            if write_new(self.path, record):
                return
            holder = _read(self.path)
            if holder is None:  # released in the meantime
                continue
            if reason := self._gone(holder, silence_seconds):
                if self._replace(self.path, holder, record, silence_seconds):
                    say(f"{self.flag}: taking over from {_describe(holder)}: {reason}")
                    return
                continue
            raise FolderTaken(
                f"{self.flag}: {_describe(holder)} is writing there; wait for it, stop it, or give another folder"
            )
        raise FolderTaken(f"{self.flag}: several processes start writing there at once; start one")

    def _replace(self, path: Path, gone: dict[str, Any], record: str, silence_seconds: float) -> bool:
        """Put our record in the place of a vanished holder's; False where another start was faster.

        Who may do it is decided by a second file, which can be made once for each holder. Its maker may vanish too:
        then that file is replaced in the same way.
        """
        claim = path.with_name(f".{NAME}.{_digest(path.name, gone)}")
        if not write_new(claim, record):
            other = _read(claim)
            if other is None or not self._gone(other, silence_seconds, claim):
                return False
            if not self._replace(claim, other, record, silence_seconds):
                return False
        if _read(path) != gone:  # another start was here before the claim was made
            claim.unlink(missing_ok=True)
            return False
        os.replace(claim, path)
        sync_folder(path.parent)
        return True

    def _gone(self, holder: dict[str, Any], silence_seconds: float, path: Path | None = None) -> str | None:
        """Why the holder of the lock, or of `path`, cannot be writing any more; None while it may be."""
        path = path or self.path
        own = self.owner
        if holder.get("job") and holder["job"] == own["job"] and _number(holder, "restart") < own["restart"]:
            return f"it is attempt {_number(holder, 'restart')} of this job"
        if holder.get("machine") and holder["machine"] == own["machine"]:
            return None if _start_of(_number(holder, "pid")) == holder.get("process_start") else "it has ended"
        beat, end = _beat_of(path), time.monotonic() + silence_seconds
        while time.monotonic() < end:
            time.sleep(min(1.0, silence_seconds / 10))
            if _beat_of(path) != beat:
                return None
        return f"silent for {silence_seconds:.0f} s"

    def _beat(self, seconds: float) -> None:
        while not self._released.wait(seconds):
            self._look()
            with contextlib.suppress(OSError):
                if self._lost is None:
                    os.utime(self.path)

    def _look(self) -> None:
        try:
            found = _read(self.path)
        except OSError:  # a file system that does not answer: the next write says more
            return
        if found is None:
            gone = "its lock" if self.path.parent.is_dir() else "the folder"
            self._lost = f"{self.flag}: {gone} was deleted while the run was writing there; start again"
        elif found.get("token") != self.owner["token"]:
            self._lost = f"{self.flag}: {_describe(found)} has taken over; this process ends without writing more"


def _this_process(environment: Mapping[str, str]) -> dict[str, Any]:
    job = environment.get("SLURM_ARRAY_JOB_ID") or environment.get("SLURM_JOB_ID") or environment.get("PBS_JOBID")
    task = environment.get("SLURM_ARRAY_TASK_ID")
    restart = environment.get("SLURM_RESTART_COUNT", "0")
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "process_start": _start_of(os.getpid()),
        "machine": _machine(),
        "job": f"{job}_{task}" if job and task else job,
        "restart": int(restart) if restart.isdigit() else 0,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "token": secrets.token_hex(16),
    }


def _machine() -> str | None:
    """This boot of this machine, and the space of process numbers, where process numbers mean the same."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return None


def _start_of(pid: int) -> int | None:
    """When a process started, in ticks since the machine did; None where there is none (or only its remains)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])


def _read(path: Path) -> dict[str, Any] | None:
    """The holder's record; None where there is none. A record that is no JSON is a holder without a name."""
    try:
        if path.exists() and not_a_file(path):  # opening a pipe would wait for its writer
            return {}
        with open(path, "rb") as file:
            found = parse_json(file.read(1 << 16))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _digest(name: str, holder: dict[str, Any]) -> str:
    return hashlib.sha256(f"{name} {json.dumps(holder, sort_keys=True)}".encode()).hexdigest()[:16]


def _beat_of(path: Path) -> int | None:
    """The time of the last heartbeat, by the file server's clock; opening the file makes NFS ask the server."""
    try:
        with open(path, "rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return None


def _number(holder: dict[str, Any], name: str) -> int:
    value = holder.get(name)
    return value if isinstance(value, int) else 0


def _describe(holder: dict[str, Any]) -> str:
    if not holder.get("host"):
        return "another process"
    job = f", job {holder['job']}" if holder.get("job") else ""
    return f"process {holder.get('pid')} on {holder['host']}{job}, started {holder.get('started')}"
