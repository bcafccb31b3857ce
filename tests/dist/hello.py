"""A rank that prints its place and the result of an all-reduce over all ranks, as one line of JSON."""

import dataclasses
import json
import os
import sys

import torch

from cca_ds.cluster.launch import find_ranks, initialize, shutdown

ranks = initialize(find_ranks(os.environ), timeout_seconds=60, rendezvous_seconds=60)
total = torch.tensor([2.0**ranks.rank], device=ranks.device)
torch.distributed.all_reduce(total)
line = json.dumps({**dataclasses.asdict(ranks), "total": total.item()})
sys.stdout.write(f"HELLO {line}\n")
sys.stdout.flush()
shutdown()
