"""One step of a small VAR on two ranks under DeepSpeed ZeRO-3; rank 0 writes what it got. Started by torchrun.

torchrun --nproc_per_node 2 tests/dist/var_zero3.py OUTPUT
"""

import os
import sys

import torch
from torch import nn

from cca_ds.models import create_model
from cca_ds.models.var.model import VARConfig
from cca_ds.vq import create_tokenizer

SCALES, CODES, CLASSES = (1, 2, 3), 16, 5
CASES = {  # name -> fields of the config, activation checkpointing
    "plain": ({}, False),
    "checkpointing": ({}, True),
    "shared": ({"shared_aln": True}, False),
}


def build(name: str) -> nn.Module:
    """The case's model, the same on every rank."""
    fields, checkpointing = CASES[name]
    torch.manual_seed(0)
    shape = {"channels": 32, "channel_multipliers": (1,), "z_channels": 4, "codebook_size": CODES}
    tokenizer = create_tokenizer("var-vqvae", scales=SCALES, **shape)
    size = {"depth": 2, "width": 32, "heads": 2, "num_classes": CLASSES, "vocab_size": CODES, "code_channels": 4}
    model = create_model(VARConfig(**size, scales=SCALES, drop_path=0.0, **fields), tokenizer=tokenizer)
    model.set_activation_checkpointing(checkpointing)
    return model


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and labels of the two ranks together."""
    generator = torch.Generator().manual_seed(5)
    return torch.randint(CODES, (4, 14), generator=generator), torch.tensor([0, 4, 2, 5])


def main(output: str) -> None:
    """Run every case."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    results = {}
    for name in CASES:
        model = build(name)
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,
        }
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        rank = torch.distributed.get_rank()
        part = slice(2 * rank, 2 * rank + 2)
        assert engine.module.blocks[0].ffn.fc1.weight.numel() == 0  # sharded: only the hooks bring it back
        codes_BL, labels_B = batch()
        logp_B = engine(codes_BL[part], labels_B[part])
        engine.backward(-logp_B.mean())
        engine.step()
        with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
            state = {k: v.detach().float().clone() for k, v in engine.module.named_parameters()}
        gathered = [torch.empty_like(logp_B) for _ in range(2)]
        torch.distributed.all_gather(gathered, logp_B.detach())
        results[name] = {"state": state, "logp": torch.cat(gathered)}
    if torch.distributed.get_rank() == 0:
        torch.save(results, output)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # gloo's threads may abort the interpreter's finalization


if __name__ == "__main__":
    main(sys.argv[1])
