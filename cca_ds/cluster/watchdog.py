"""Ends a run in which a rank no longer answers, and names that rank and its host, where NCCL or gloo would hang.

A thread on every rank writes to a store on rank 0, once a tick: a counter of the thread (`life`), and a counter of
the main thread's calls of `beat` (`progress`). Rank 0's thread reads all reports. If a rank's `life` does not change
for the limit (process stopped, swapped out, node down), or if no rank makes progress for the limit and one is behind
the others (dead data loader, lost collective), rank 0 writes a verdict that names it, and every rank exits with
EXIT_SILENT. A second thread on each rank watches the first: if the store does not answer, rank 0 is named.

Time is counted in ticks of the watching thread, so that a run that was suspended as a whole (gang scheduling, a
paused machine) finds no rank silent when it continues.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from cca_ds.cluster.flight_recorder import dump_nccl_trace
from cca_ds.cluster.job_state import note_end
from cca_ds.cluster.launch import Ranks
from cca_ds.cluster.rank_logs import on_console

EXIT_SILENT = 75  # EX_TEMPFAIL of sysexits.h: starting again may succeed


@dataclass
class Seen:
    """Rank 0's record of a rank: its last report, and the seconds since its two counters changed."""

    life: int = -1  # ticks of the rank's reporting thread
    progress: int = -1  # calls of `beat`
    where: str = ""  # what the main thread was doing
    host: str = ""
    pid: int = 0
    life_silent: float = 0.0
    progress_silent: float = 0.0
    gone: bool = False  # it left through `close`


class Watchdog:
    """Watches all ranks of the process group from construction to `close`; with one rank it does nothing.

    Args:
        ranks: this process's place; the process group is up, as the constructor is a collective.
        timeout_seconds: limit after which a rank without a report, or without progress, ends the run.
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
        dist.barrier()  # now rank 0 has every rank's host
        self._threads = [
            threading.Thread(target=work, name=f"watchdog-{name}", daemon=True)
            for name, work in (("report", self._report), ("guard", self._guard))
        ]
        for thread in self._threads:
            thread.start()

    def beat(self, step: int, doing: str = "training") -> None:
        """Count one unit of progress of the main thread. Cheap; all ranks call it at the same places, equally often."""
        self._where = f"{doing}, step {step}"
        self._progress += 1

    def close(self) -> None:
        """Stop watching at the end of a run without errors. A collective.

        After an error it is not called: the other ranks' watchdogs then name this rank.
        """
        self._closing.set()
        for thread in self._threads:
            thread.join()
        if self._threads:
            dist.barrier()  # rank 0 keeps the store until all ranks have stopped using it

    def vanished(self) -> str:
        """The ranks that no longer report, for a rank whose collective has just lost its connection.

        Compares two readings three ticks apart, and blocks for about five ticks.

        Returns:
            "rank 3 on host (pid 17) is gone, last heard of in training, step 20; ..."; empty if all ranks report.
        """
        if not self._threads:
            return ""
        try:
            before = [self._store.get(f"rank {rank}").decode().split("\t") for rank in range(self._ranks.world_size)]
            time.sleep(3 * self._tick)
            after = [self._store.get(f"rank {rank}").decode().split("\t") for rank in range(self._ranks.world_size)]
        except RuntimeError:
            return f"rank 0 on {self._ranks.master_address} is gone"
        time.sleep(1.5 * self._tick)  # rank 0's store must outlive the other ranks' readings
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
        """Thread: write this rank's report once a tick, and end the process when rank 0 has written a verdict."""
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
        except Exception as error:  # rank 0, which serves the store, has ended
            if not self._closing.is_set():
                self._end_without_0(f"rank 0 on {self._ranks.master_address} is gone: {str(error).splitlines()[0]}")

    def _guard(self) -> None:
        """Thread: end this process when the store has not answered for the limit."""
        silent = 0.0
        while not self._closing.wait(self._tick):
            silent = 0.0 if self._answered.is_set() else silent + self._tick
            self._answered.clear()
            # two ticks after rank 0 would judge: if rank 0 still runs, its verdict comes first
            if silent > self._limit + 2 * self._tick:
                self._end_without_0(
                    f"rank 0 on {self._ranks.master_address} has not answered for {self._limit:g} s "
                    f"(this rank: {self._where})"
                )

    def _look_at_all(self, seen: list[Seen]) -> None:
        """Rank 0: read all reports; if a rank is silent, write the verdict and end this process."""
        for rank, report in enumerate(seen):
            if not report.gone:
                _update(report, self._store.get(f"rank {rank}").decode(), self._tick)
        verdict = judge(seen, self._limit)
        if verdict is not None:
            self._print(verdict)  # before the others exit, which may fail the main thread at any moment
            self._store.set("verdict", verdict)
            time.sleep(2.5 * self._tick)  # the store must live until the others have read it, at their next tick
            os._exit(EXIT_SILENT)

    def _print(self, verdict: str) -> None:
        line = f"rank {self._ranks.rank} on {self._ranks.host} ends the run: {verdict}"
        note_end(EXIT_SILENT, line)
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()
        dump_nccl_trace(self._ranks)

    def _end_without_0(self, verdict: str) -> None:
        """Rank 0, which has the console, cannot say it: rank 1 does."""
        if self._ranks.rank == 1:
            on_console(f"rank 1 on {self._ranks.host} ends the run: {verdict}")
        self._end(verdict)

    def _end(self, verdict: str) -> None:
        self._print(verdict)
        os._exit(EXIT_SILENT)  # the main thread is inside a collective that will not return


def judge(seen: list[Seen], limit: float) -> str | None:
    """The line that names the silent rank, or None.

    A rank that does not report is named before any that waits for it. If all report, those with the least progress
    are named, and only if no rank made progress for `limit` seconds.
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
    """Take in a rank's newest report; a counter that has not changed adds a tick to its silence."""
    state, life, progress, host, pid, where = text.split("\t")
    report.gone, report.host, report.pid, report.where = state == "gone", host, int(pid), where
    report.life_silent = 0.0 if int(life) != report.life else report.life_silent + tick
    report.progress_silent = 0.0 if int(progress) != report.progress else report.progress_silent + tick
    report.life, report.progress = int(life), int(progress)


def _open_store(ranks: Ranks, timeout_seconds: float) -> dist.TCPStore:
    """A second store, served by rank 0: a thread that waits in the process group's store would block the others."""
    timeout = timedelta(seconds=max(timeout_seconds, 30.0))
    default = dist.PrefixStore("watchdog", dist.distributed_c10d._get_default_store())
    if ranks.rank == 0:
        store = dist.TCPStore("0.0.0.0", 0, None, True, timeout, wait_for_workers=False)
        default.set("port", str(store.port))
        return store
    port = int(default.get("port").decode())
    return dist.TCPStore(str(ranks.master_address), port, None, False, timeout, wait_for_workers=False)
