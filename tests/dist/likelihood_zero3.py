"""One step of a small head on two ranks under DeepSpeed ZeRO-3; rank 0 writes what it got. Started by torchrun.

torchrun --nproc_per_node 2 tests/dist/likelihood_zero3.py OUTPUT
"""

import os
import sys

import deepspeed
import torch
from torch import nn

from cca_ds.likelihood import LikelihoodHead

WIDTH, VOCABULARY, TOKENS = 32, 120, 9


class Small(nn.Module):
    """An embedding, a layer and the head, as in the models: log p is made inside the head's own forward."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.head = LikelihoodHead(WIDTH, VOCABULARY, bias=bias)

    def forward(self, codes_BL: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(self.embedding(codes_BL)).tanh(), codes_BL.roll(1, 1))


def main(output: str) -> None:
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    results = {}
    for bias in (True, False):
        torch.manual_seed(0)
        model = Small(bias)
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,
        }
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        rank = torch.distributed.get_rank()
        codes = torch.randint(VOCABULARY, (4, TOKENS), generator=torch.Generator().manual_seed(5))
        assert engine.module.head.weight.numel() == 0  # sharded: only the hooks bring it back
        logp = engine(codes[2 * rank : 2 * rank + 2])
        engine.backward(-logp.mean())
        engine.step()
        with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
            state = {k: v.detach().float().clone() for k, v in engine.module.state_dict().items()}
        gathered = [torch.empty_like(logp) for _ in range(2)]
        torch.distributed.all_gather(gathered, logp.detach())
        results[bias] = {"state": state, "logp": torch.cat(gathered)}
    if torch.distributed.get_rank() == 0:
        torch.save(results, output)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # gloo's threads may abort the interpreter's finalization


if __name__ == "__main__":
    main(sys.argv[1])
