"""A rank that runs the preflight. Arguments: the limit in seconds, and what rank 1 does:
"nothing", "another configuration", "no report" (it stays away), "no collective" (it stays away after reporting)."""

import os
import sys
import time
from datetime import timedelta

import torch.distributed as dist

from cca_ds.cluster import preflight
from cca_ds.cluster.launch import find_ranks, shutdown

limit, trouble = float(sys.argv[1]), sys.argv[2]
ranks = find_ranks(os.environ)
dist.init_process_group("gloo", timeout=timedelta(seconds=60))  # DeepSpeed would add seconds and nothing else
run = {"the configuration": "3f1c", "the data manifest": "9b2e"}
if ranks.rank == 1:
    if trouble == "another configuration":
        run["the configuration"] = "77aa"
    elif trouble == "no report":
        time.sleep(3 * limit)
    elif trouble == "no collective":
        preflight._try_collectives = lambda *_: time.sleep(4 * limit)
try:
    preflight.check_ranks(ranks, limit, run)
    print(f"{ranks.world_size} ranks agree")
except ValueError as error:
    print(f"refused: {error}", flush=True)
    time.sleep(1.0)  # until every rank has printed its line
    os._exit(3)
dist.barrier()  # rank 0 holds the store that the others may still ask
shutdown()
