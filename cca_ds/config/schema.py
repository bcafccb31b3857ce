"""The sections of a recipe. One run = one recipe + overrides.

Figures in the comments are the paper's (arXiv 2410.09347, Table 4).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from cca_ds.config.original_names import canonical_model


class Section(BaseModel):
    """Unknown keys are errors; a field may be written under its name or its alias."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True, validate_default=True)


class Model(Section):
    preset: str = "digits"
    overrides: dict[str, Any] = Field(default_factory=dict)  # fields of LlamaGenConfig or VARConfig
    weights: str | None = None  # published checkpoint, safetensors file, or asset:NAME; None = random
    dropout: bool = True  # keep the model's own dropouts while training
    activation_checkpointing: bool = False
    lambda_conditioning: bool = False  # Table 5: one model for every lambda
    ema_decay: float | None = Field(default=None, gt=0.0, lt=1.0)

    @property
    def shape(self) -> dict[str, Any]:
        """What the recipe changes of the preset's config, as `create_model` takes it."""
        return self.overrides | ({"lambda_conditioning": True} if self.lambda_conditioning else {})

    @field_validator("preset")
    @classmethod
    def _canonical_preset(cls, name: str) -> str:
        """The original programs' names are taken too: GPT-3B, d30."""
        return canonical_model(name)


class Tokenizer(Section):
    name: str = "digits"  # one of vq.TOKENIZERS
    weights: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)  # channels, channel_multipliers, scales, ...


class Data(Section):
    codes: str = "digits"  # "digits", or a folder that `cca_ds.encode` wrote
    source: str | None = None  # images for encode: folder, tar, or dataset on disk
    image_size: int = Field(default=8, gt=0)
    crops: Literal["none", "ten_crop", "random"] = "none"
    crop_ranges: list[float] = Field(default_factory=lambda: [1.1, 1.05])
    crops_per_image: int = Field(default=1, ge=1)
    workers: int = Field(default=2, ge=0)
    prefetch: int = Field(default=4, ge=1)  # global batches read ahead


class Loss(Section):
    name: str = "cca"  # one of alignment.losses.LOSSES
    beta: float = Field(default=0.02, gt=0.0)
    lambda_: float = Field(default=1000.0, ge=0.0, alias="lambda")
    condition_mask_probability: float = Field(default=0.1, ge=0.0, lt=1.0)
    options: dict[str, float] = Field(default_factory=dict)  # the loss's own hyperparameters, by its record


class Reference(Section):
    placement: str = "inference"  # one of reference.placements.PLACEMENTS
    weights: str | None = None  # None: the policy's own starting weights
    dropout: bool = False  # the public program's way, which runs its reference in training mode
    offload: bool = False  # zero3 only: parameters wait in host memory
    cache: str | None = None  # folder of stored log-likelihoods (cached, streamed)
    batch_size: int = Field(default=64, ge=1)  # pairs a forward while caching or streaming
    ahead_steps: int = Field(default=64, ge=1)  # streamed: how far producers may run ahead
    shard_steps: int = Field(default=8, ge=1)  # steps in one shard of the cache
    wait_seconds: float = Field(default=600.0, gt=0.0)


class Optimizer(Section):
    name: Literal["adamw"] = "adamw"
    learning_rate: float = Field(default=1e-5, gt=0.0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0.0)
    weight_decay: float = Field(default=0.05, ge=0.0)
    final_weight_decay: float | None = Field(default=None, ge=0.0)  # reached along half a cosine
    no_decay: list[str] = Field(default_factory=list)  # name parts; vectors and biases never decay
    grad_clip: float = Field(default=1.0, ge=0.0)  # 0: none


class Schedule(Section):
    name: Literal["constant", "linear", "cosine"] = "constant"
    warmup_epochs: float = Field(default=0.0, ge=0.0)
    warmup_start: float = Field(default=0.005, ge=0.0, le=1.0)  # share of the peak at step 0
    hold: float = Field(default=0.0, ge=0.0, lt=1.0)  # share of the steps after warm-up spent at the peak
    final_fraction: float = Field(default=0.0, ge=0.0, le=1.0)  # share of the peak at the last step


class Batch(Section):
    global_size: int = Field(default=256, ge=2)  # pairs a step, whatever the number of ranks
    micro_size: int = Field(default=8, ge=1)  # most pairs a forward holds on one rank
    epochs: float = Field(default=1.0, gt=0.0)
    max_steps: int | None = Field(default=None, ge=1)


class Balance(Section):
    """Keys of the mappings are a rank's number, a host, or a device's name or a word of it (H100, cpu)."""

    mode: Literal["even", "measured", "given"] = "even"
    speeds: dict[str, Annotated[float, Field(gt=0.0)]] = Field(default_factory=dict)  # given: pairs a second
    micro_sizes: dict[str, Annotated[int, Field(ge=0)]] = Field(default_factory=dict)  # most pairs a forward
    remeasure_every: int | None = Field(default=None, ge=1)  # steps

    @field_validator("speeds", "micro_sizes", mode="before")
    @classmethod
    def _names(cls, table: Any) -> Any:
        """YAML reads a rank's number as a number."""
        return {str(key): value for key, value in table.items()} if isinstance(table, dict) else table


class Checkpoint(Section):
    every_steps: int = Field(default=500, ge=1)
    keep_last: int = Field(default=2, ge=1)
    keep_every: int | None = Field(default=None, ge=1)  # steps; these are kept for good
    asynchronous: bool = False


class Logging(Section):
    every_steps: int = Field(default=1, ge=1)
    tensorboard: bool = True
    sample_every_steps: int | None = Field(default=None, ge=1)
    samples_per_grid: int = Field(default=40, ge=1)
    progress: bool = True


class Sampling(Section):
    """Of `cca_ds.sample`, and of the grids while training."""

    guidance_scale: float = Field(default=0.0, ge=0.0)  # the paper's s: c + s (c - u); 0 is guidance-free
    guidance_schedule: Literal["constant", "linear"] = "constant"
    guidance_interval: tuple[int, int] | None = None
    temperature: float = Field(default=1.0, gt=0.0)
    top_k: int = Field(default=0, ge=0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    batch_size: int = Field(default=450, ge=1)
    images_per_class: int = Field(default=50, ge=1)
    seed: int = 0
    lambda_: float | None = Field(default=None, gt=0.0, alias="lambda")  # of a lambda-conditioned model


class Evaluation(Section):
    reference: str | None = None  # .npz of images or of statistics; None for the digits' own features
    inception_weights: str | None = None
    batch_size: int = Field(default=64, ge=1)


class Baseline(Section):
    check: bool = True  # step 0 must show r = 0; the negative log-likelihood must lie in its band
    nll_band: tuple[float, float] | None = None  # nats a code


class Distributed(Section):
    timeout_seconds: float = Field(default=600.0, gt=0.0)  # after which a silent rank ends the run


class RunConfig(Section):
    """A whole recipe. See `cca_ds/recipes/` for the shipped ones."""

    name: str = "digits"
    seed: int = 0
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # auto: bf16 on a GPU, fp32 on a CPU
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
    paper: dict[str, Any] = Field(default_factory=dict)  # the paper's results of this model, for the reports
