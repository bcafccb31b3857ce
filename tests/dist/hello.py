"""A rank that prints its place and the result of an all-reduce over all ranks, as one line of JSON."""

import dataclasses
import json
import sys

import torch

from cca_ds.cluster.launch import Ranks
from cca_ds.cluster.ranked import run_on_ranks
from cca_ds.config.schema import Distributed


def hello(ranks: Ranks) -> None:
    total = torch.tensor([2.0**ranks.rank], device=ranks.device)
    torch.distributed.all_reduce(total)
    line = json.dumps({**dataclasses.asdict(ranks), "total": total.item()})
    sys.stdout.write(f"HELLO {line}\n")


sys.exit(run_on_ranks(hello, Distributed(timeout_seconds=60, rendezvous_seconds=60), micro_size="auto"))
