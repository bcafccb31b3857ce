"""A rank that steps for ever under the watchdog: argument 1 is the limit in seconds, argument 2 a rank whose main
thread stops at step 3 ("-1": none), argument 3 the number of steps (0: no end)."""

import os
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from cca_ds.cluster.launch import find_ranks, shutdown
from cca_ds.cluster.watchdog import Watchdog

limit, stuck, steps = float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
ranks = find_ranks(os.environ)
dist.init_process_group("gloo", timeout=timedelta(seconds=60))  # DeepSpeed would add seconds and nothing else
watchdog = Watchdog(ranks, limit)
step = 0
while steps == 0 or step < steps:
    step += 1
    watchdog.beat(step, "reading data")
    while step == 3 and ranks.rank == stuck:
        time.sleep(0.1)
    watchdog.beat(step, "training")
    dist.all_reduce(torch.ones(1))
    print(f"step {step}", flush=True)
    time.sleep(0.05)
watchdog.close()
shutdown()
print("closed", flush=True)
