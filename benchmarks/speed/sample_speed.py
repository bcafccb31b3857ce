"""python benchmarks/speed/sample_speed.py --family llamagen --dtype bf16 --llamagen PATH --date 2026-11-20

Sampling without guidance on random weights beside the original's own loop: GPT-B, 8 images of 576 codes.
Target: at least 1.5 times LlamaGen's tokens per second. VAR-d16, 4 images of 680 codes, the transformer's part (the
image is not decoded): at most 0.55 of the original's time.
"""

import sys
from collections.abc import Callable

import torch
from side_by_side import main

LLAMAGEN_IMAGES, VAR_IMAGES = 8, 4


def llamagen_ours(dtype: torch.dtype) -> Callable[[], object]:
    """GPT-B with this project's cache; the head, which starts at 0, random as in the original's run."""
    from cca_ds.models import create_model
    from cca_ds.sampling import generate

    model = create_model("llamagen-b").to(dtype).eval()
    torch.nn.init.normal_(model.output.weight, std=0.02)
    return lambda: generate(model, torch.arange(LLAMAGEN_IMAGES))


def llamagen_original(dtype: torch.dtype, checkout: str) -> Callable[[], object]:
    """GPT-B with LlamaGen's `generate`."""
    sys.path.insert(0, checkout)
    from autoregressive.models.generate import generate
    from autoregressive.models.gpt import GPT_models

    model = GPT_models["GPT-B"](block_size=576).to(dtype).eval()
    torch.nn.init.normal_(model.output.weight, std=0.02)
    settings = {"cfg_scale": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "sample_logits": True}
    return lambda: generate(model, torch.arange(LLAMAGEN_IMAGES), 576, **settings)


def var_ours(dtype: torch.dtype) -> Callable[[], object]:
    """VAR-d16 with this project's sampler, in `dtype` throughout."""
    from cca_ds.models import create_model
    from cca_ds.sampling import generate
    from cca_ds.vq import create_tokenizer

    tokenizer = create_tokenizer("var-vqvae", channels=32)  # only its codebook and residual convolutions are used
    model = create_model("var-d16", tokenizer=tokenizer).to(dtype).eval()
    return lambda: generate(model, torch.arange(VAR_IMAGES))


def var_original(dtype: torch.dtype, checkout: str) -> Callable[[], object]:
    """VAR-d16 with `autoregressive_infer_cfg` at guidance 0, under autocast for bf16 as its scripts do."""
    sys.path.insert(0, checkout)
    from models import VAR, VQVAE

    scales = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    tokenizer = VQVAE(vocab_size=4096, z_channels=32, ch=32, v_patch_nums=scales)
    tokenizer.fhat_to_img = lambda features: features  # the transformer's part alone
    shape = {"depth": 16, "embed_dim": 1024, "num_heads": 16, "norm_eps": 1e-6, "attn_l2_norm": True}
    model = VAR(tokenizer, **shape, patch_nums=scales).eval()
    model.init_weights(init_std=-1)

    def run() -> None:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            model.autoregressive_infer_cfg(VAR_IMAGES, torch.arange(VAR_IMAGES), g_seed=0, cfg=0.0)

    return run


if __name__ == "__main__":
    ours = {"llamagen": llamagen_ours, "var": var_ours}
    main("sample_speed", __doc__, ours, {"llamagen": llamagen_original, "var": var_original})
