"""The sections of a recipe. One run = one recipe + overrides. `python -m cca_ds config` prints every key.

Figures in the descriptions are the paper's (arXiv 2410.09347, Table 4).
"""

from __future__ import annotations

import typing
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from cca_ds.config.original_names import canonical_model
from cca_ds.files import expand

PathText = Annotated[str, AfterValidator(lambda text: str(expand(text)) if text.startswith("~") else text)]


MOST_PROFILED = 100  # steps of one trace, which takes megabytes a step
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]


def key(default: Any, meaning: str, **limits: Any) -> Any:
    """A key of a section: its default, what it means, and its limits (gt, ge, lt, le) and alias as pydantic's Field."""
    return Field(default=default, description=meaning, **limits)


def _takes_switches(annotation: Any) -> bool:
    return annotation in (bool, Any) or any(map(_takes_switches, typing.get_args(annotation)))


class Section(BaseModel):
    """Unknown keys are errors; a field may be written under its name or its alias."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Python counts true as 1; a recipe that says so is a mistake."""
        if isinstance(value, bool) and not _takes_switches(cls.model_fields[str(info.field_name)].annotation):
            raise ValueError("true and false are no numbers")
        return value


class Model(Section):
    """The policy: its shape, its starting weights, and what of it is trained how."""

    preset: str = key("digits", "the model: llamagen-b, -l, -xl, -xxl, -3b, var-d16, -d20, -d24, -d30, -d36, digits")
    overrides: dict[str, Any] = key({}, "fields of LlamaGenConfig or VARConfig that differ from the preset's")
    weights: PathText | None = key(
        None, "a published checkpoint, a safetensors file, a run's folder, or asset:NAME; null draws at random"
    )
    reset_classes: bool = key(
        False, "take all of model.weights but its classes, which are drawn anew in the model's own number"
    )
    from_scratch: bool = key(False, "allow a loss that contrasts classes to start from random weights")
    dropout: bool = key(True, "keep the model's own dropouts while training")
    activation_checkpointing: Literal["auto"] | bool = key(
        "auto", "compute activations again in the backward pass: less memory, more time; auto does where a GPU needs it"
    )
    compile: Literal["auto"] | bool = key(
        "auto", "fuse the element-wise work of the blocks by torch.compile; auto does on a GPU"
    )
    lambda_conditioning: bool = key(False, "one model for every lambda, which it takes as an input (Table 5)")
    gft_conditioning: bool | None = key(
        None, "the model takes GFT's beta as an input; null: as loss.name needs, so true for gft alone"
    )
    ema_decay: float | None = key(
        None, "decay a step of a moving average of the weights; null keeps none", gt=0.0, lt=1.0
    )

    @property
    def shape(self) -> dict[str, Any]:
        """What the recipe changes of the preset's config, as `create_model` takes it."""
        on = [name for name in ("lambda_conditioning", "gft_conditioning") if getattr(self, name)]
        return self.overrides | dict.fromkeys(on, True)

    @field_validator("preset")
    @classmethod
    def _canonical_preset(cls, name: str) -> str:
        """The original programs' names are taken too: GPT-3B, d30."""
        return canonical_model(name)


class Tokenizer(Section):
    """What turns images into codes and codes into images."""

    name: str = key("digits", "digits, llamagen-vq16, var-vqvae, or one that you registered")
    weights: PathText | None = key(None, "its weights file; the digits' tokenizer needs none")
    options: dict[str, Any] = key({}, "its shape where that differs: channels, channel_multipliers, scales, ...")


class Data(Section):
    """The training data, and how `encode` makes it."""

    codes: PathText = key("digits", "the folder that encode wrote, or digits")
    generated: PathText | None = key(
        None,
        "ddo: images that the reference drew, as the folder that sample --codes wrote; online draws them step by step",
    )
    source: PathText | None = key(None, "encode: the images, as a folder, a tar, or a dataset on disk")
    image_size: int = key(8, "encode: side of a crop in pixels", gt=0, le=8192)
    crops: Literal["none", "ten_crop", "random"] = key("none", "encode: how crops are taken from an image")
    crop_ranges: list[float] = key([1.1, 1.05], "encode: ten_crop resizes the image to these multiples of image_size")
    crops_per_image: int = key(1, "encode: random crops of each image", ge=1, le=1000)
    upright: bool = key(False, "encode: turn images as their EXIF orientation says, which the originals do not")
    workers: int = key(2, "processes that read codes ahead; 0 reads in the training process", ge=0, le=256)
    prefetch: int = key(4, "global batches read ahead", ge=1, le=1024)


class Loss(Section):
    """What is minimised."""

    name: str = key("cca", "cca, dpo, unlearning, mle, gft, ddo, or one that you registered")
    beta: float = key(0.02, "weight of the log-ratios, 1 over a guidance scale in theory", gt=0.0, le=1000.0)
    lambda_: float = key(1000.0, "weight of the negatives", ge=0.0, alias="lambda", le=1e9)
    condition_mask_probability: float = key(0.1, "share of pairs whose label is the null class", ge=0.0, lt=1.0)
    options: dict[str, float] = key({}, "the loss's own hyperparameters, for those that have any")
    accuracy_band: tuple[float, float] | None = key(
        None,
        "ends the run when rewards/accuracies, averaged over about 50 steps, has been in this range and leaves it; "
        "null never does",
    )

    @field_validator("accuracy_band")
    @classmethod
    def _band(cls, band: tuple[float, float] | None) -> tuple[float, float] | None:
        if band is not None and not 0.0 <= band[0] < band[1] <= 1.0:
            raise ValueError("give the lowest and the highest accuracy, from 0 to 1, e.g. [0.55, 0.8]")
        return band


class Reference(Section):
    """The frozen model that log-likelihoods are compared with."""

    placement: str = key(
        "inference", "inference, zero3, cached, streamed (README says what each is), or one that you registered"
    )
    weights: PathText | None = key(None, "its weights; null takes the policy's starting weights")
    dropout: bool = key(False, "run it in training mode with dropout, as the public program does")
    offload: bool = key(False, "zero3: its parameters wait in host memory")
    cache: PathText | None = key(None, "cached, streamed: folder of the stored log-likelihoods")
    batch_size: int = key(64, "cached, streamed: pairs a forward", ge=1, le=100000)
    ahead_steps: int = key(64, "streamed: steps that producers may run ahead", ge=1, le=1000000)
    shard_steps: int | None = key(
        None, "cached, streamed: steps in a file of the cache; null: 1 where images are drawn online, else 8",
        ge=1, le=100000,
    )  # fmt: skip
    wait_seconds: float = key(600.0, "streamed: longest wait for a file of the cache", gt=0.0, le=1e7)


class Optimizer(Section):
    """AdamW, with vectors and biases free of weight decay."""

    name: Literal["adamw"] = key("adamw", "the optimizer")
    learning_rate: float = key(1e-5, "its peak", gt=0.0, le=10.0)
    betas: tuple[Decay, Decay] = key((0.9, 0.95), "decay of the moments' averages")
    eps: float = key(1e-8, "added to the root of the second moment", gt=0.0, le=1.0)
    weight_decay: float = key(0.05, "decoupled weight decay", ge=0.0, le=10.0)
    final_weight_decay: float | None = key(
        None, "reached along half a cosine; null keeps weight_decay", ge=0.0, le=10.0
    )
    no_decay: list[str] = key([], "parameters whose name has one of these parts do not decay")
    grad_clip: float = key(1.0, "largest norm of the gradient; 0 does not clip", ge=0.0, le=1e9)


class Schedule(Section):
    """The learning rate over the run."""

    name: Literal["constant", "linear", "cosine"] = key("constant", "its course after warm-up and hold")
    warmup_epochs: float = key(0.0, "epochs of linear warm-up", ge=0.0, le=10000.0)
    warmup_start: float = key(0.005, "share of the peak at step 0", ge=0.0, le=1.0)
    hold: float = key(0.0, "share of the steps after warm-up spent at the peak", ge=0.0, lt=1.0)
    final_fraction: float = key(0.0, "share of the peak at the last step", ge=0.0, le=1.0)


class Batch(Section):
    """Pairs of an image and its label."""

    global_size: int = key(256, "pairs a step, whatever the number of ranks", ge=2, le=10000000)
    micro_size: Literal["auto"] | Annotated[int, Field(ge=1, le=100000)] = key(
        8, "most pairs a forward holds on one rank; auto: as many as the smallest GPU's memory has room for"
    )
    epochs: float = key(1.0, "passes over the data", gt=0.0, le=100000.0)
    max_steps: int | None = key(None, "ends the run earlier; null trains all epochs", ge=1, le=1000000000)


class Balance(Section):
    """Unequal ranks. Keys of the mappings are a rank's number, a host, or a device's name or a part of it (H100)."""

    mode: Literal["auto", "even", "measured", "given"] = key(
        "auto", "how a batch is cut over ranks: equal, measured, by speeds; auto measures where devices differ"
    )
    speeds: dict[str, Annotated[float, Field(gt=0.0)]] = key({}, "given: pairs a second")
    micro_sizes: dict[str, Annotated[int, Field(ge=0)]] = key({}, "most pairs a forward of some ranks; 0 for none")
    remeasure_every: int | None = key(
        None, "measured: steps between measurements; null measures once", ge=1, le=1000000000
    )

    @field_validator("speeds", "micro_sizes", mode="before")
    @classmethod
    def _names(cls, table: Any) -> Any:
        """YAML reads a rank's number as a number."""
        return {str(key): value for key, value in table.items()} if isinstance(table, dict) else table


class Checkpoint(Section):
    """When the run's state is saved, and what is kept."""

    every_steps: int = key(500, "steps between checkpoints", ge=1, le=1000000000)
    every_minutes: float | None = key(
        15.0, "minutes after which one is saved before its step has come; null counts steps only", gt=0.0, le=1e6
    )
    final: bool = key(True, "save one after the last step; false only where the run's weights are not wanted")
    keep_last: int = key(2, "newest checkpoints kept", ge=1, le=10000)
    keep_every: int | None = key(None, "checkpoints of steps divisible by this are kept for good", ge=1, le=1000000000)
    asynchronous: bool = key(False, "write to disk while training goes on")


class Logging(Section):
    """Metrics, progress bar and sample grids."""

    every_steps: int = key(1, "steps between logged metrics", ge=1, le=1000000000)
    tensorboard: bool = key(True, "write event files beside metrics.jsonl; the folder is the run's name")
    sample_every_steps: int | None = key(None, "steps between grids of samples; null draws none", ge=1, le=1000000000)
    profile_steps: tuple[int, int] | None = key(
        None, "first and last step, from 1, whose trace every rank writes to profile/; null writes none"
    )
    memory_snapshot: bool = key(
        False, "record a GPU's allocations: profile/ gets a snapshot after the traced steps, or when memory runs out"
    )
    samples_per_grid: int = key(40, "images in a grid", ge=1, le=10000)
    progress: bool = key(True, "show progress bars")

    @field_validator("profile_steps")
    @classmethod
    def _in_order(cls, steps: tuple[int, int] | None) -> tuple[int, int] | None:
        if steps is not None and not 1 <= steps[0] <= steps[1] <= steps[0] + MOST_PROFILED:
            raise ValueError(f"give the first and the last step, from 1, at most {MOST_PROFILED} apart")
        return steps


class Sampling(Section):
    """Of `sample`, and of the grids while training."""

    guidance_scale: float = key(0.0, "the paper's s: c + s (c - u); 0 is guidance-free", ge=0.0, le=10000.0)
    guidance_schedule: Literal["constant", "linear"] = key(
        "constant", "linear grows from 0 to s, as VAR does over its scales"
    )
    guidance_interval: tuple[int, int] | None = key(None, "guide only from this code to that one")
    gft_beta: float | None = key(
        None,
        "of a model trained by GFT: its samples are like those of s = (1 - beta) / beta; null takes 1",
        gt=0.0,
        le=1.0,
    )
    temperature: float = key(1.0, "divides the logits", gt=0.0, le=10000.0)
    top_k: int = key(0, "draw from this many likeliest codes; 0 from all", ge=0, le=10000000)
    top_p: float = key(1.0, "draw from the likeliest codes that hold this probability", gt=0.0, le=1.0)
    batch_size: int = key(450, "images drawn together on one rank", ge=1, le=100000)
    images_per_class: int = key(50, "images of each class", ge=1, le=10000000)
    seed: int = key(0, "of the images; an image depends on it and its own index alone", ge=0, lt=2**63)
    lambda_: float | None = key(
        None, "of a lambda-conditioned model; null takes loss.lambda", gt=0.0, alias="lambda", le=1e9
    )


class Evaluation(Section):
    """Of `evaluate`."""

    reference: PathText | None = key(None, ".npz of real images or of statistics; null takes the digits' own")
    inception_weights: PathText | None = key(None, "weights file of the FID network")
    batch_size: int = key(64, "images a forward of the FID network", ge=1, le=100000)


class Baseline(Section):
    """Checks before the first step."""

    check: bool = key(True, "the log-ratios must be 0 at step 0, and the likelihood in its band")
    nll_band: tuple[float, float] | None = key(None, "lowest and highest negative log-likelihood, in nats a code")


class Distributed(Section):
    """Ranks."""

    timeout_seconds: float = key(600.0, "after which a silent rank ends the run", gt=0.0, le=1e6)
    rendezvous_seconds: float = key(300.0, "limit for all ranks to arrive at the start", gt=0.0, le=1e6)


class RunConfig(Section):
    """A whole recipe. See `cca_ds/recipes/` for the shipped ones."""

    name: str = key("digits", "of the run: its folder is runs/NAME unless --output names another")
    seed: int = key(0, "of the order, negatives, masks and dropout", ge=0, lt=2**63)
    precision: Literal["auto", "bf16", "fp16", "fp32"] = key("auto", "auto is bf16 on a GPU and fp32 on a CPU")
    deterministic: bool = key(False, "the same bits in every run on the same machines; slower on a GPU")

    @field_validator("name")
    @classmethod
    def _folder_name(cls, name: str) -> str:
        """It names a folder below runs/."""
        if not 0 < len(name) <= 100 or name.startswith(".") or any(c in "/\\" or not c.isprintable() for c in name):
            raise ValueError("give a name without slashes that does not begin with a dot; it becomes a folder")
        return name

    model: Model = Field(default_factory=Model)
    tokenizer: Tokenizer = Field(default_factory=Tokenizer)
    data: Data = Field(default_factory=Data)
    loss: Loss = Field(default_factory=Loss)
    reference: Reference = Field(default_factory=Reference)
    optimizer: Optimizer = Field(default_factory=Optimizer)
    schedule: Schedule = Field(default_factory=Schedule)
    batch: Batch = Field(default_factory=Batch)
    balance: Balance = Field(default_factory=Balance)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    logging: Logging = Field(default_factory=Logging)
    sampling: Sampling = Field(default_factory=Sampling)
    evaluation: Evaluation = Field(default_factory=Evaluation)
    baseline: Baseline = Field(default_factory=Baseline)
    distributed: Distributed = Field(default_factory=Distributed)
    paper: dict[str, Any] = key({}, "the paper's results of this model, for the reports")


def path_keys() -> list[tuple[str, str]]:
    """(section, name) of every key that holds a file or a folder of this machine."""

    def is_path(field: Any) -> bool:
        return PathText in typing.get_args(field.annotation) or set(PathText.__metadata__) <= set(field.metadata)

    sections = {name: field.annotation for name, field in RunConfig.model_fields.items()}
    return [
        (section, name)
        for section, fields in sections.items()
        if isinstance(fields, type) and issubclass(fields, Section)
        for name, field in fields.model_fields.items()
        if is_path(field)
    ]
