"""cca_ds/train.py with precision=fp16 on a CPU, for tests: the two questions whether the device has fp16 are answered
yes, though few CPUs compute in it natively; DeepSpeed's engine, its loss scaler and all else are as they are."""

import sys

from deepspeed.accelerator import get_accelerator

from cca_ds.config import deepspeed_file
from cca_ds.training import session
from cca_ds.train import main

get_accelerator().is_fp16_supported = lambda: True
session.resolve_precision = lambda ds, run, _has_gpu: deepspeed_file.resolve_precision(ds, run, has_gpu=True)
sys.exit(main())
