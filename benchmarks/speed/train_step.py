"""python benchmarks/speed/train_step.py --family llamagen --dtype bf16 --llamagen PATH --date 2026-11-20

One micro-batch of CCA fine-tuning, 2 pairs, dropout 0, on random weights: the reference's log-likelihoods,
the policy's, the loss and its gradients. Beside the same in the original program's way: its own model,
reference in training mode, autocast for bf16, log-softmax of all logits. Targets: 0.6 of its time in bf16,
0.85 in fp32, 0.65 of its peak memory. Optimizer steps, one for 16 micro-batches there, are left out on both
sides.
"""

import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from side_by_side import main

from cca_ds.alignment.losses import cca_loss

PAIRS, BETA, LAMBDA = 2, 0.02, 1000.0


def our_step(policy, reference, codes_BL: torch.Tensor, labels_B: torch.Tensor) -> Callable[[], float]:
    """A micro-batch of this project's: either family."""
    codes_2L = torch.cat([codes_BL, codes_BL])
    labels_2 = torch.cat([labels_B, labels_B.roll(-1)])  # [chosen, rejected]
    none_mtarget = torch.zeros(PAIRS, dtype=torch.bool)
    reference.eval().requires_grad_(False)
    policy.train()

    def step() -> float:
        with torch.no_grad():
            reference_pos, reference_neg = reference(codes_2L, labels_2).chunk(2)
        policy_pos, policy_neg = policy(codes_2L, labels_2).chunk(2)
        loss = cca_loss(policy_pos, policy_neg, reference_pos, reference_neg, none_mtarget, BETA, LAMBDA)
        loss.backward()
        policy.zero_grad(set_to_none=True)
        return loss.item()

    return step


def original_loss(logits_2LV: torch.Tensor, reference_2LV: torch.Tensor, codes_BL: torch.Tensor) -> torch.Tensor:
    """CCA's loss as the original programs compute it: four log-softmaxes of all logits, chosen first."""

    def sequence_logp(logits_BLV: torch.Tensor) -> torch.Tensor:
        return logits_BLV.log_softmax(-1).gather(2, codes_BL[..., None])[..., 0].sum(-1)

    chosen = sequence_logp(logits_2LV[:PAIRS]) - sequence_logp(reference_2LV[:PAIRS])
    rejected = sequence_logp(logits_2LV[PAIRS:]) - sequence_logp(reference_2LV[PAIRS:])
    loss = -F.logsigmoid(BETA * chosen).mean() - LAMBDA * F.logsigmoid(-BETA * rejected).mean()
    return loss / LAMBDA


def llamagen_ours(dtype: torch.dtype) -> Callable[[], float]:
    """GPT-B, 384 px, in `dtype` throughout."""
    from cca_ds.models import create_model

    off = {"token_dropout": 0.0, "resid_dropout": 0.0, "ffn_dropout": 0.0}
    policy, reference = (create_model("llamagen-b", **off).to(dtype) for _ in range(2))
    return our_step(policy, reference, torch.randint(16384, (PAIRS, 576)), torch.randint(1000, (PAIRS,)))


def llamagen_original(dtype: torch.dtype, checkout: str) -> Callable[[], float]:
    """LlamaGen's own GPT-B in the steps of CCA's `LlamaGen_finetune.py`."""
    sys.path.insert(0, checkout)
    from autoregressive.models.gpt import GPT_models

    off = {"token_dropout_p": 0.0, "resid_dropout_p": 0.0, "ffn_dropout_p": 0.0, "drop_path_rate": 0.0}
    policy, reference = (GPT_models["GPT-B"](block_size=576, **off).train() for _ in range(2))
    codes_BL, labels_B = torch.randint(16384, (PAIRS, 576)), torch.randint(1000, (PAIRS,))
    codes_2L = torch.cat([codes_BL, codes_BL])
    labels_2 = torch.cat([labels_B, labels_B.roll(-1)])

    def step() -> float:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            with torch.no_grad():
                reference_logits, _ = reference(codes_2L[:, :-1], labels_2, targets=codes_2L)
            logits, _ = policy(codes_2L[:, :-1], labels_2, targets=codes_2L)
        loss = original_loss(logits, reference_logits, codes_BL)
        loss.backward()
        policy.zero_grad(set_to_none=True)
        return loss.item()

    return step


def var_ours(dtype: torch.dtype) -> Callable[[], float]:
    """VAR-d16, 256 px, in `dtype` throughout, without stochastic depth; its input from the codes in every step."""
    from cca_ds.models import create_model
    from cca_ds.vq import create_tokenizer

    tokenizer = create_tokenizer("var-vqvae", channels=32)  # only its codebook and residual convolutions are used
    off = {"tokenizer": tokenizer, "drop_path": 0.0}
    policy, reference = (create_model("var-d16", **off).to(dtype) for _ in range(2))
    return our_step(policy, reference, torch.randint(4096, (PAIRS, 680)), torch.randint(1000, (PAIRS,)))


def var_original(dtype: torch.dtype, checkout: str) -> Callable[[], float]:
    """VAR's own d16 in the steps of CCA's `VAR_CCA_trainer.py`, with the codes given, not encoded again."""
    sys.path.insert(0, checkout)
    from models import VAR, VQVAE

    scales = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    tokenizer = VQVAE(vocab_size=4096, z_channels=32, ch=32, v_patch_nums=scales)
    shape = {"depth": 16, "embed_dim": 1024, "num_heads": 16, "norm_eps": 1e-6, "attn_l2_norm": True}
    policy, reference = (VAR(tokenizer, **shape, cond_drop_rate=0.0, patch_nums=scales).train() for _ in range(2))
    policy.init_weights(init_std=-1)
    reference.load_state_dict(policy.state_dict())
    codes_BL, labels_B = torch.randint(4096, (PAIRS, 680)), torch.randint(1000, (PAIRS,))
    labels_2 = torch.cat([labels_B, labels_B.roll(-1)])

    def step() -> float:
        scale_codes = list(codes_BL.split([scale**2 for scale in scales], dim=1))
        input_BLZ = tokenizer.quantize.idxBl_to_var_input(scale_codes)
        input_2LZ = torch.cat([input_BLZ, input_BLZ])
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = policy(labels_2, input_2LZ)
            with torch.no_grad():
                reference_logits = reference(labels_2, input_2LZ)
        loss = original_loss(logits, reference_logits, codes_BL)
        loss.backward()
        policy.zero_grad(set_to_none=True)
        return loss.item()

    return step


if __name__ == "__main__":
    ours = {"llamagen": llamagen_ours, "var": var_ours}
    main("train_step", __doc__, ours, {"llamagen": llamagen_original, "var": var_original}, matmuls=True)
