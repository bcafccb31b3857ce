"""`cca_ds/train.py` that prints how often ZeRO-3 fetched weights and gathered them. BY_LAYER=1: as DeepSpeed has it."""

import atexit
import collections
import os
import sys

from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

from cca_ds import train
from cca_ds.training import policy

COUNTED = {"fetch_sub_module": "fetched", "_PartitionedParameterCoordinator__all_gather_params_": "gathered"}
counts = collections.Counter()


def counting(method, what):
    def call(*arguments, **more):
        counts[what] += 1
        return method(*arguments, **more)

    return call


for name, what in COUNTED.items():
    setattr(PartitionedParameterCoordinator, name, counting(getattr(PartitionedParameterCoordinator, name), what))
if os.environ.get("BY_LAYER"):
    policy.gather_whole_blocks = lambda module: None
atexit.register(lambda: print(f"counted {counts['fetched']} {counts['gathered']}", file=sys.stderr, flush=True))
sys.exit(train.main(sys.argv[1:]))
