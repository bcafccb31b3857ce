"""A small VAR on the digits: its multi-scale tokenizer and its base model, both trained here from scratch.

8 x 8 pixels become 4 x 4 features and 21 codes of three scales (1, 2 and 4) from a codebook of 64.

Letters: B images, L codes per image, C channels, H and W pixels.
"""

from __future__ import annotations

import shutil

import numpy as np
import torch
from lab import Digits
from torch import Tensor, nn

from cca_ds.console import progress
from cca_ds.data.batches import BatchPlan, Steps
from cca_ds.data.codes import CodeTable
from cca_ds.data.table_files import write_codes
from cca_ds.models import VARConfig, create_model
from cca_ds.vq import create_tokenizer
from cca_ds.vq.digits import load_digit_images

SCALES = (1, 2, 4)
CODES = 64
TOKENIZER_STEPS, BASE_EPOCHS, BATCH = 600, 25, 64


def small_var(shipped: Digits, seed: int = 0) -> Digits:
    """The digits as VAR codes: table, pretrained base model, and the decoder to pixels."""
    images_BCHW, labels_B = load_digit_images()
    tokenizer = train_tokenizer(images_BCHW, seed)
    with torch.no_grad():
        codes_BL = tokenizer.encode(images_BCHW).numpy()
    folder = shipped.table.folder.parent / "digits-var"
    shutil.rmtree(folder, ignore_errors=True)
    write_codes(
        folder,
        codes_BL[:, None].astype(np.uint16),
        labels_B.numpy(),
        classes=10,
        vocab_size=CODES,
        family="var",
        tokenizer="var-vqvae",
        tokenizer_hash=tokenizer.hash(),
        crop_settings={"crops": "none"},
    )
    table = CodeTable.open(folder)
    return Digits(table, train_base(table, tokenizer, seed), lambda codes: to_grey_levels(tokenizer, codes))


def to_grey_levels(tokenizer: nn.Module, codes_BL: Tensor) -> np.ndarray:
    """Grey levels 0 to 16, [B, 64] int64, of codes [B, L]: the input of the digits' classifier."""
    with torch.no_grad():
        images_BCHW = torch.cat([tokenizer.decode(part) for part in codes_BL.split(450)])
    return ((images_BCHW.clamp(-1, 1) + 1) * 8).round().long().flatten(1).numpy()


def train_tokenizer(images_BCHW: Tensor, seed: int) -> nn.Module:
    """Reconstruction plus the quantizer's losses; the codebook starts at features of the images."""
    torch.manual_seed(seed)
    tokenizer = create_tokenizer(
        "var-vqvae", channels=32, channel_multipliers=(1, 2), z_channels=16, codebook_size=CODES, scales=SCALES,
        image_channels=1,
    )  # fmt: skip
    tokenizer.requires_grad_(True).train()
    with torch.no_grad():
        features = tokenizer.features(images_BCHW[:512]).permute(0, 2, 3, 1).flatten(0, 2)
        tokenizer.quantize.embedding.weight.copy_(features[torch.randperm(len(features))[:CODES]])
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=2e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, TOKENIZER_STEPS)
    for _ in progress(range(TOKENIZER_STEPS), "VAR's tokenizer"):
        batch = images_BCHW[torch.randint(len(images_BCHW), (BATCH,))]
        loss, _ = tokenizer.training_loss(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return tokenizer.requires_grad_(False).eval()


def train_base(table: CodeTable, tokenizer: nn.Module, seed: int) -> nn.Module:
    """Maximum likelihood with 10% of the labels dropped."""
    torch.manual_seed(seed)
    config = VARConfig(
        depth=4, width=128, heads=4, num_classes=10, vocab_size=CODES, scales=SCALES, code_channels=16, drop_path=0.0
    )
    model = create_model(config, tokenizer=tokenizer).train()
    steps = Steps(table, BatchPlan(BATCH, seed, 0.1, model.null_class, contrastive=False), 0, [BATCH])
    total = BASE_EPOCHS * steps.steps_per_epoch
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total)
    for step in progress(range(total), "VAR's base model"):
        (batch,) = steps[step]
        (-model(batch.codes_BL, batch.positive_labels_B).mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 32.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()
