"""What users of the original programs (LlamaGen, VAR, CCA) type, and what it is called here.

A flag of theirs sets keys of a recipe, or has no meaning here and is named with the reason. docs/original_commands.md
has their commands beside ours.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

# flag of a training program -> key of a recipe; `--set` takes these names too
KEYS = {
    "lambda_": "loss.lambda",
    "beta": "loss.beta",
    "loss_type": "loss.name",
    "uncond_ratio": "loss.condition_mask_probability",
    "ref_ckpt": "model.weights",
    "num_classes": "model.overrides.num_classes",
    "code_path": "data.codes",
    "data_path": "data.source",
    "keep_dropout": "model.dropout",
    "lr": "optimizer.learning_rate",
    "global_batch_size": "batch.global_size",
    "bs": "batch.global_size",
    "epochs": "batch.epochs",
    "ep": "batch.epochs",
    "max_grad_norm": "optimizer.grad_clip",
    "global_seed": "seed",
}


@dataclass(frozen=True)
class Flag:
    """A flag of an original program.

    Attributes:
        settings: value -> overrides KEY=VALUE of a recipe; raises ValueError for a value that has no such meaning.
        ignored: why it has no meaning here, where that is so.
        switch: whether it may stand without a value.
    """

    settings: Callable[[str], list[str]] = lambda value: []
    ignored: str | None = None
    switch: bool = False


def _key(key: str, switch: bool = False) -> Flag:
    return Flag(lambda value: [f"{key}={value}"], switch=switch)


def _only(value: str, remedy: str) -> Flag:
    """A flag that has this value here, and no other."""

    def settings(typed: str) -> list[str]:
        number = re.fullmatch(r"[0-9.]+", value) is not None
        if (_float(typed) != float(value)) if number else typed.lower() != value:
            raise ValueError(f"only {value} can be given here; {remedy}")
        return []

    return Flag(settings)


def _precision(value: str) -> list[str]:
    known = {"none": "fp32", "fp32": "fp32", "tf32": "fp32", "fp16": "fp16", "bf16": "bf16"}
    if value not in known:
        raise ValueError(f"one of {', '.join(known)} is needed")
    return [f"precision={known[value]}"]


def _dropout_ratio(value: str) -> list[str]:
    """CCA's `--dpr_ratio` scales VAR's stochastic depth; here it is kept or left out."""
    if _float(value) not in (0.0, 1.0):
        raise ValueError("0 leaves stochastic depth out and 1 keeps it; for another rate set model.overrides.drop_path")
    return [f"model.dropout={str(_float(value) == 1.0).lower()}"]


def _switch(key: str) -> Callable[[str], list[str]]:
    """From 0, 1, true or false."""

    def settings(value: str) -> list[str]:
        if value.lower() not in ("0", "1", "true", "false"):
            raise ValueError("0 or 1 is needed")
        return [f"{key}={str(value.lower() in ('1', 'true')).lower()}"]

    return settings


def _scales(value: str) -> list[str]:
    """VAR's `--pn`: sides of the scales joined by underscores, or the image size."""
    named = {"256": "1_2_3_4_5_6_8_10_13_16", "512": "1_2_3_4_6_9_13_18_24_32"}
    sides = named.get(value, value).split("_")
    if not all(side.isdecimal() for side in sides):
        raise ValueError("256, 512 or sides of scales such as 1_2_3_4 are needed")
    return [f"model.overrides.scales=[{', '.join(sides)}]"]


def _images(value: str) -> list[str]:
    """LlamaGen's `--num-fid-samples`, of ImageNet's thousand classes."""
    if not value.isdecimal() or int(value) % 1000 or not int(value):
        raise ValueError("a multiple of 1000 is needed; for other classes set sampling.images_per_class")
    return [f"sampling.images_per_class={int(value) // 1000}"]


def _guided_until(value: str) -> list[str]:
    """LlamaGen's `--cfg-interval` (autoregressive/models/generate.py): guidance ends some codes on; -1 never."""
    last = _float(value)
    if last < 0:
        return ["sampling.guidance_interval=null"]
    if last != int(last):
        raise ValueError("the number of a code is needed, or -1")
    return [f"sampling.guidance_interval=[0, {int(last) + 2}]"]  # theirs counts from the second code, and includes it


def _float(value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ValueError("a number is needed") from None


_FROM_FILE = Flag(ignored="initial values of a new model; weights are read from model.weights")
_SAME = Flag()  # names a recipe with --gpt-model, else compared with the recipe's
_OF_CODES = Flag(ignored="the table of codes has it")
_OF_MODEL = Flag(ignored="of the recipe's model")
_OF_TOKENIZER = Flag(ignored="of the recipe's tokenizer")
_ACCUMULATION = Flag(ignored="follows from batch.global_size, batch.micro_size and the number of ranks")
_WANDB = Flag(ignored="metrics go to TensorBoard and metrics.jsonl", switch=True)
_ALWAYS = Flag(ignored="always so here", switch=True)
_COMPILED = Flag(ignored="model.compile sets it", switch=True)

FLAGS: dict[str, Mapping[str, Flag]] = {
    "train": {
        **{name: _key(key, switch=name == "keep_dropout") for name, key in KEYS.items()},
        "tblr": Flag(),  # `config.recipes` multiplies it by batch.global_size / 256
        "seed": _key("seed"),
        "gpt_ckpt": _key("model.weights"),
        "beta1": _only("0.9", "set optimizer.betas"),
        "beta2": _only("0.95", "set optimizer.betas"),
        "opt": _only("adamw", "AdamW is the only optimizer"),
        "sche": _only("lin0", "set schedule.name"),
        "ls": _only("0", "labels are not smoothed"),
        "pg": _only("0", "there is no progressive training"),
        "ckpt_every": _key("checkpoint.every_steps"),
        "log_every": _key("logging.every_steps"),
        "num_workers": _key("data.workers"),
        "weight_decay": _key("optimizer.weight_decay"),
        "twd": _key("optimizer.weight_decay"),
        "twde": _key("optimizer.final_weight_decay"),
        "tclip": _key("optimizer.grad_clip"),
        "wp": _key("schedule.warmup_epochs"),
        "wp0": _key("schedule.warmup_start"),
        "wpe": _key("schedule.final_fraction"),
        "expid": _key("name"),
        "exp_name": _key("name"),
        "mixed_precision": Flag(_precision),
        "dpr_ratio": Flag(_dropout_ratio),
        "drop_path_rate": _key("model.overrides.drop_path"),
        "token_dropout_p": _key("model.overrides.token_dropout"),
        "dropout_p": Flag(lambda p: [f"model.overrides.resid_dropout={p}", f"model.overrides.ffn_dropout={p}"]),
        "ema": Flag(lambda value: ["model.ema_decay=0.9999"], switch=True),  # LlamaGen's decay
        "no_compile": Flag(lambda value: ["model.compile=false"], switch=True),
        "pn": Flag(_scales),
        "saln": Flag(_switch("model.overrides.shared_aln")),
        "fp16": Flag(ignored="weights train in bf16 on a GPU; set precision=fp16 for fp16"),
        "alng": _FROM_FILE,
        "aln": _FROM_FILE,
        "ini": _FROM_FILE,
        "hd": _FROM_FILE,
        "ac": _ACCUMULATION,
        "gradient_accumulation_step": _ACCUMULATION,
        "gradient_accumulation_steps": _ACCUMULATION,
        "image_size": _SAME,
        "downsample_size": _OF_CODES,
        "mid_reso": Flag(ignored="of encode: data.crop_ranges"),
        "hflip": Flag(ignored="of encode: --flip", switch=True),
        "vocab_size": _OF_MODEL,
        "gpt_type": _OF_MODEL,
        "cls_token_num": _OF_MODEL,
        "anorm": _OF_MODEL,
        "dataset": Flag(ignored="the manifest of data.codes says what the codes are"),
        "results_dir": Flag(ignored="name the run's folder with --output"),
        "cloud_save_path": Flag(ignored="name the run's folder with --output"),
        "no_local_save": Flag(ignored="name the run's folder with --output", switch=True),
        "gpt_resume": Flag(ignored="a run continues by itself; --resume names a checkpoint"),
        "data_parallel": Flag(ignored="the ds_config's ZeRO stage"),
        "grad_precision": Flag(ignored="the ds_config's data_types.grad_accum_dtype"),
        "wandb_project": Flag(ignored=_WANDB.ignored),
        "no_wandb": _WANDB,
        "tfast": Flag(ignored=_COMPILED.ignored),
        "vfast": Flag(ignored=_COMPILED.ignored),
        "fuse": Flag(ignored=_ALWAYS.ignored),
        "afuse": Flag(ignored=_ALWAYS.ignored),
        "tf32": Flag(ignored=_ALWAYS.ignored),
        "workers": Flag(ignored="data.workers sets it"),
    },
    "sample": {
        "lambda_": _key("loss.lambda"),
        "ref_ckpt": _key("model.weights"),
        "vq_ckpt": _key("tokenizer.weights"),
        "vae_ckpt": _key("tokenizer.weights"),
        "per_proc_batch_size": _key("sampling.batch_size"),
        "num_fid_samples": Flag(_images),
        "cfg_interval": Flag(_guided_until),
        "top_k": _key("sampling.top_k"),
        "top_p": _key("sampling.top_p"),
        "temperature": _key("sampling.temperature"),
        "global_seed": _key("sampling.seed"),
        "seed": _key("sampling.seed"),
        "num_classes": _key("model.overrides.num_classes"),
        "precision": Flag(_precision),
        "image_size": _SAME,
        "gpt_type": _OF_MODEL,
        "cls_token_num": _OF_MODEL,
        "downsample_size": _OF_TOKENIZER,
        "vq_model": _OF_TOKENIZER,
        "codebook_size": _OF_TOKENIZER,
        "codebook_embed_dim": _OF_TOKENIZER,
        "from_fsdp": Flag(ignored="a file's layout is recognised", switch=True),
        "compile": Flag(ignored="decoding steps are CUDA graphs", switch=True),
    },
    "encode": {
        "data_path": _key("data.source"),
        "code_path": _key("data.codes"),
        "vq_ckpt": _key("tokenizer.weights"),
        "image_size": _key("data.image_size"),
        "ten_crop": Flag(lambda value: ["data.crops=ten_crop"], switch=True),
        "crop_range": Flag(lambda value: [f"data.crop_ranges=[{_float(value):g}]"]),
        "global_seed": _key("seed"),
        "num_workers": Flag(ignored="--threads sets it"),
        "vq_model": _OF_TOKENIZER,
        "codebook_size": _OF_TOKENIZER,
        "codebook_embed_dim": _OF_TOKENIZER,
        "dataset": Flag(ignored="any image folder, dataset or tar is taken"),
        "debug": Flag(ignored="no such mode", switch=True),
    },
}


def is_published(name: str) -> bool:
    """Whether a file of weights has the name of a checkpoint of LlamaGen, VAR, CCA, GFT or DDO (docs/weights.md)."""
    return re.fullmatch(r"(c2i_(B|L|XL|XXL|3B)_|var_d\d\d|LlamaGen|VAR)[\w.-]*\.(pt|pth|safetensors)", name) is not None


def flags_of(command: str, reads: tuple[str, ...] | None = None) -> Mapping[str, Flag]:
    """The originals' flags that a command takes, by name with underscores.

    Args:
        command: as its parser is called.
        reads: for a command without a table of its own: keys or sections that it reads.
    """
    if command in FLAGS:
        return FLAGS[command]
    read = {
        name: key
        for name, key in KEYS.items()
        if reads is None or any(key == part or key.startswith(f"{part}.") for part in reads)
    }
    return {name: _key(key, switch=name == "keep_dropout") for name, key in read.items()}


def spellings(name: str) -> list[str]:
    """How a flag is typed: with underscores, as VAR has it, and with hyphens, as LlamaGen has it."""
    return ["--lambda_"] if name == "lambda_" else list(dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"]))


def canonical_model(name: str) -> str:
    """A model's name as the presets and recipes spell it: "GPT-3B" and "c2i_3B" are "llamagen-3b", "d30" is "var-d30".

    Any other name comes back in lower case with hyphens; whether it is known is the caller's question.
    """
    plain = re.sub(r"[_\s]+", "-", name.strip().lower())
    plain = re.sub(r"^(gpt|c2i)-", "llamagen-", plain)
    return f"var-{plain}" if re.fullmatch(r"d\d+", plain) else plain
