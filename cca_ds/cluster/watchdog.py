"""A rank that stops answering ends the run, with its number and host named, instead of a hang.

Every rank has a thread that reports to a store on rank 0 that the process lives and how far its main thread is.
Rank 0's thread reads all reports. A process that is silent for the limit (stopped, swapped out, its node gone),
or a main thread that stays behind the others for the limit (a dead data-loader, a lost collective), is named,
and every rank ends itself with EXIT_SILENT. A second thread on each rank watches the first: where the store does
not answer, rank 0 is the silent one.

Seconds are counted in ticks of the watching thread itself, so that a run suspended as a whole (gang scheduling,
a paused machine) does not find everybody silent when it wakes.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from cca_ds.cluster.launch import Ranks

EXIT_SILENT = 75  # EX_TEMPFAIL: starting again may well succeed


@dataclass
class Seen:
    """What rank 0 knows of a rank; `life` grows while its process runs, `progress` with its main thread."""

    life: int = -1
    progress: int = -1
    where: str = ""
    host: str = ""
    pid: int = 0
    life_silent: float = 0.0
    progress_silent: float = 0.0
    gone: bool = False


class Watchdog:
    """Watches all ranks of the process group from construction to `close`.

    Args:
        ranks: this process's place; the process group is up (a collective runs in here).
        timeout_seconds: silence after which the run ends.
    """

    def __init__(self, ranks: Ranks, timeout_seconds: float):
        self._ranks, self._limit = ranks, timeout_seconds
        self._tick = min(1.0, timeout_seconds / 10)
        self._progress, self._where = 0, "starting"
        self._answered = threading.Event()
        self._closing = threading.Event()
        self._threads: list[threading.Thread] = []
        if ranks.world_size == 1:
            return
        self._store = _open_store(ranks, timeout_seconds)
        self._post("here", 0)
        dist.barrier()  # from here on rank 0 knows everybody's host
        self._threads = [
            threading.Thread(target=work, name=f"watchdog-{name}", daemon=True)
            for name, work in (("report", self._report), ("guard", self._guard))
        ]
        for thread in self._threads:
            thread.start()

    def beat(self, step: int, doing: str = "training") -> None:
        """The main thread got this far. Cheap; every rank calls it in the same places, equally often."""
        self._where = f"{doing}, step {step}"
        self._progress += 1

    def close(self) -> None:
        """Stop watching, at the end of a run that went well. A collective.

        After an error it is not called: the others then learn from the watchdog which rank went away.
        """
        self._closing.set()
        for thread in self._threads:
            thread.join()
        if self._threads:
            dist.barrier()  # rank 0 keeps the store until everybody has left it

    def vanished(self) -> str:
        """Who went away, for a rank whose collective has just lost its connection: those that report no more.

        Takes a few ticks, in which the survivors go on reporting; empty when nobody is missing.
        """
        if not self._threads:
            return ""
        try:
            before = [
                self._store.get(f"rank {rank}").decode().split("\t") for rank in range(self._ranks.world_size)
            ]
            time.sleep(3 * self._tick)
            after = [
                self._store.get(f"rank {rank}").decode().split("\t") for rank in range(self._ranks.world_size)
            ]
        except RuntimeError:
            return f"rank 0 on {self._ranks.master_address} is gone"
        time.sleep(1.5 * self._tick)  # the others still read in rank 0's store
        gone = [
            f"rank {rank} on {now[3]} (pid {now[4]}) is gone, last heard of in {now[5]}"
            for rank, (then, now) in enumerate(zip(before, after, strict=True))
            if then[1] == now[1]
        ]
        return "; ".join(gone)

    def _post(self, state: str, life: int) -> None:
        fields = (state, life, self._progress, self._ranks.host, os.getpid(), self._where)
        self._store.set(f"rank {self._ranks.rank}", "\t".join(map(str, fields)))

    def _report(self) -> None:
        """Tell rank 0 of this process, and end it when rank 0 has named a silent one."""
        seen = [Seen() for _ in range(self._ranks.world_size)]
        life = 0
        try:
            while True:
                closing = self._closing.is_set()
                life += 1
                self._post("gone" if closing else "here", life)
                if self._ranks.rank == 0 and not closing:
                    self._look_at_all(seen)
                if self._store.check(["verdict"]):
                    self._end(self._store.get("verdict").decode())
                self._answered.set()
                if closing:
                    return
                self._closing.wait(self._tick)
        except Exception as error:  # the store went away with rank 0
            if not self._closing.is_set():
                self._end(f"rank 0 on {self._ranks.master_address} is gone: {str(error).splitlines()[0]}")

    def _guard(self) -> None:
        """End this process when the store has not answered for the limit."""
        silent = 0.0
        while not self._closing.wait(self._tick):
            silent = 0.0 if self._answered.is_set() else silent + self._tick
            self._answered.clear()
            # two ticks later than rank 0 judges: where it lives, its verdict comes first
            if silent > self._limit + 2 * self._tick:
                self._end(
                    f"rank 0 on {self._ranks.master_address} has not answered for {self._limit:g} s "
                    f"(this rank: {self._where})"
                )

    def _look_at_all(self, seen: list[Seen]) -> None:
        """Rank 0: read every report, and name who is silent."""
        for rank, report in enumerate(seen):
            if not report.gone:
                _update(report, self._store.get(f"rank {rank}").decode(), self._tick)
        verdict = judge(seen, self._limit)
        if verdict is not None:
            self._say(verdict)  # first: once the others leave, the main thread may fail at any moment
            self._store.set("verdict", verdict)
            time.sleep(
                2.5 * self._tick
            )  # the others read it at their next tick; the store must live until then
            os._exit(EXIT_SILENT)

    def _say(self, verdict: str) -> None:
        sys.stderr.write(f"rank {self._ranks.rank} on {self._ranks.host} ends the run: {verdict}\n")
        sys.stderr.flush()

    def _end(self, verdict: str) -> None:
        self._say(verdict)
        os._exit(EXIT_SILENT)  # the main thread is inside a collective that will not return


def judge(seen: list[Seen], limit: float) -> str | None:
    """The line that names the silent rank, or None while all is well.

    A process that does not report is to blame before any that waits for it; among processes that all live, the
    one whose main thread is furthest behind is, and only if all have stood still for the limit.
    """
    present = [(rank, report) for rank, report in enumerate(seen) if not report.gone]
    for rank, report in present:
        if report.life_silent > limit:
            return (
                f"rank {rank} on {report.host} (pid {report.pid}) has not answered for {limit:g} s; "
                f"last heard of in {report.where}"
            )
    if not present or any(report.progress_silent <= limit for _, report in present):
        return None
    behind = min(report.progress for _, report in present)
    late = [(rank, report) for rank, report in present if report.progress == behind]
    named = "; ".join(f"rank {rank} on {report.host} in {report.where}" for rank, report in late[:8])
    if len(late) == len(present):
        return f"no rank has made progress for {limit:g} s, all are at one place: {named}"
    return f"no progress for {limit:g} s; behind the others: {named}"


def _update(report: Seen, text: str, tick: float) -> None:
    state, life, progress, host, pid, where = text.split("\t")
    report.gone, report.host, report.pid, report.where = state == "gone", host, int(pid), where
    report.life_silent = 0.0 if int(life) != report.life else report.life_silent + tick
    report.progress_silent = 0.0 if int(progress) != report.progress else report.progress_silent + tick
    report.life, report.progress = int(life), int(progress)


def _open_store(ranks: Ranks, timeout_seconds: float) -> dist.TCPStore:
    """A store of its own: a thread that waits in the process group's store would block the others."""
    timeout = timedelta(seconds=max(timeout_seconds, 30.0))
    default = dist.PrefixStore("watchdog", dist.distributed_c10d._get_default_store())
    if ranks.rank == 0:
        store = dist.TCPStore("0.0.0.0", 0, None, True, timeout, wait_for_workers=False)
        default.set("port", str(store.port))
        return store
    port = int(default.get("port").decode())
    return dist.TCPStore(str(ranks.master_address), port, None, False, timeout, wait_for_workers=False)
