"""Work on all ranks: they meet, work and part, and an error on any of them is one line that names the rank."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import NoReturn

from cca_ds.cluster import launch
from cca_ds.cluster.failures import exit_code, explain_error
from cca_ds.cluster.job_state import note_end
from cca_ds.cluster.launch import Ranks
from cca_ds.cluster.rank_logs import log_only, report_end
from cca_ds.config.schema import Distributed


def run_on_ranks(work: Callable[[Ranks], int | None], limits: Distributed, micro_size: int | str) -> int:
    """Initialise the process group, do the work, and leave the group.

    With several ranks this ends the process. After an error it does so without closing the group: the peers are
    blocked in a collective, and their watchdog reports this rank.

    Args:
        work: gets this process's place; returns an exit code, None for 0.
        limits: how long ranks may be silent, and absent.
        micro_size: the run's batch.micro_size, for advice when memory is short.

    Returns:
        The exit code of a run on one rank.

    Raises:
        LaunchError: the ranks did not meet.
    """
    ranks = launch.initialize(launch.find_ranks(os.environ), limits.timeout_seconds, limits.rendezvous_seconds)
    _quiet_libraries()
    try:
        code = work(ranks) or 0
    except BaseException as error:
        if os.environ.get("CCA_DS_TRACEBACK"):
            traceback.print_exception(error)
        else:
            log_only("".join(traceback.format_exception(error)))
        message = f"rank {ranks.rank} on {ranks.host}: {explain_error(error, micro_size)}"
        note_end(exit_code(error), message)
        report_end(message)
        if ranks.world_size > 1:
            os._exit(exit_code(error))
        return exit_code(error)
    launch.shutdown()
    if ranks.world_size > 1:
        _leave(code)
    return code


def _leave(code: int) -> NoReturn:
    """End this process without the interpreter's finalization.

    One of gloo's threads may still hold a tensor of the last collective. If it frees the tensor during finalization, it
    needs the interpreter's lock, does not get it, and aborts a process whose work is done.
    """
    sys.stdout.flush()
    if mpi := sys.modules.get("mpi4py.MPI"):
        mpi.Finalize()  # or mpirun takes the exit for a crash
    atexit._run_exitfuncs()
    os._exit(code)


def _quiet_libraries() -> None:
    """DeepSpeed logs every rank's every setting, torch every name that will change; warnings are enough."""
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
