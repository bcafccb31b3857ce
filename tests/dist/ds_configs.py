"""A rank that trains a tiny LlamaGen under each ds_config in turn. Arguments: output folder, precision, JSON files.

Leaves `rank_R.json` there: per file the losses of three steps and the bytes this rank holds, part by part.
"""

import gc
import json
import os
import sys
from pathlib import Path

import deepspeed
import torch

from cca_ds.cluster.launch import find_ranks, initialize, shutdown
from cca_ds.config.deepspeed_file import fill_ds_config, read_ds_config
from cca_ds.config.recipes import load_recipe
from cca_ds.models import LlamaGenConfig, create_model

output, precision, files = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
ranks = initialize(find_ranks(os.environ), timeout_seconds=120, rendezvous_seconds=60)
run = load_recipe("digits", ["optimizer.learning_rate=1e-2", "batch.global_size=8", "batch.micro_size=2"])
SHAPE = LlamaGenConfig(
    n_layer=2, n_head=2, dim=64, vocab_size=17, sequence_length=64, num_classes=10, token_dropout=0.0,
    resid_dropout=0.0, ffn_dropout=0.0,
)  # fmt: skip


def held_bytes(engine):
    """Bytes of this rank's weights, of its float32 master weights and of Adam's moments."""
    optimizer = engine.optimizer
    weights = sum(getattr(p, "ds_tensor", p).numel() * p.element_size() for p in engine.module.parameters())
    groups = getattr(optimizer, "fp32_partitioned_groups_flat", None) or optimizer.single_partition_of_fp32_groups
    moments = [
        value
        for state in optimizer.optimizer.state.values()
        for value in state.values()
        if torch.is_tensor(value) and value.numel() > 1
    ]
    return {"weights": weights, "optimizer": sum(t.numel() * t.element_size() for t in [*groups, *moments])}


def train(file):
    ds = fill_ds_config(
        read_ds_config(file), run, world_size=ranks.world_size, forwards=2, micro_size=2, precision=precision
    )
    zero = ds["zero_optimization"]
    if "zero_hpz_partition_size" in zero:
        zero["zero_hpz_partition_size"] = ranks.world_size  # the file's 8 is a node's GPUs
    torch.manual_seed(0)
    with deepspeed.zero.Init(config_dict_or_path=ds, enabled=zero["stage"] == 3):
        model = create_model(SHAPE)
    torch.manual_seed(1)
    with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0):
        for parameter in model.parameters():
            noise = torch.randn(getattr(parameter, "ds_shape", parameter.shape)) * 0.05
            parameter.data.copy_(noise + 1 if noise.ndim == 1 else noise)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=ds)
    data = torch.Generator().manual_seed(2)
    losses = []
    for _ in range(3):
        codes_BL, labels_B = (torch.randint(17, (8, 64), generator=data), torch.randint(10, (8,), generator=data))
        total = torch.zeros(())
        for forward in range(2):
            rows = slice(4 * forward + 2 * ranks.rank, 4 * forward + 2 * ranks.rank + 2)
            loss = -engine(codes_BL[rows], labels_B[rows]).mean() / 64
            engine.backward(loss)
            engine.step()
            total += loss.detach() / 2
        torch.distributed.all_reduce(total)
        losses.append(total.item() / ranks.world_size)
    found = {"losses": losses, "held": held_bytes(engine), "stage": engine.zero_optimization_stage()}
    engine.destroy()
    return found


results = {}
for name in files:
    results[Path(name).stem] = train(name)
    gc.collect()
(output / f"rank_{ranks.rank}.json").write_text(json.dumps(results))
shutdown()
