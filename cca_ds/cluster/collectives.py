"""Steps that all ranks take together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cca_ds.cluster.failures import exit_code
from cca_ds.cluster.launch import Ranks


class FirstRankFailed(ValueError):
    """What rank 0 met, on every rank."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.exit_code = code


def on_first(ranks: Ranks, action: Callable[[], Any]) -> None:
    """Run `action` on rank 0; every rank returns once it is done. Collective.

    Raises:
        FirstRankFailed: on every rank, with the message and exit code of rank 0's ValueError or OSError. With one
            rank, and for other errors on rank 0, the error itself.
    """
    if ranks.world_size == 1:
        action()
        return
    import torch.distributed

    problem: list[tuple[str, int] | None] = [None]
    if ranks.rank == 0:
        try:
            action()
        except (ValueError, OSError) as error:
            problem = [(str(error), exit_code(error))]
    torch.distributed.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise FirstRankFailed(*problem[0])


def barrier(ranks: Ranks) -> None:
    """Wait for all ranks; returns at once with one rank. Collective."""
    if ranks.world_size > 1:
        import torch.distributed

        torch.distributed.barrier()
