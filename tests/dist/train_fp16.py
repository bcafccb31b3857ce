"""cca_ds/train.py with precision=fp16 on a CPU, for tests: the two questions whether the device has fp16 are answered
yes, though few CPUs compute in it natively; DeepSpeed's engine, its loss scaler and all else are as they are."""

import sys

from deepspeed.accelerator import get_accelerator

from cca_ds.config import deepspeed_file
from cca_ds.train import main
from cca_ds.training import run

get_accelerator().is_fp16_supported = lambda: True
run.resolve_precision = lambda ds, recipe, _has_gpu: deepspeed_file.resolve_precision(ds, recipe, has_gpu=True)
sys.exit(main())
