"""What the package asks of a model of codes (`CodeModel`) and of a family of such models (`Family`).

Legend: B images, L codes per image, N rows of a draw, S sampling steps, V vocabulary, D width.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cca_ds.models.conditioning import CONDITIONINGS, conditioning_of
from cca_ds.models.weight_files import WeightsKind


class CodeModel(nn.Module, ABC):
    """`model(codes_BL, labels_B)` gives the log-likelihoods [B] float32; `logits` the distributions behind
    them.

    A subclass implements `embed_class`, `hidden` and `read_out`, and calls `add_conditioning` where its config can
    switch a kind of conditioning on.
    """

    family: str  # the name of its `Family`, which weights files carry

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.conditioning = conditioning_of(config)
        self.activation_checkpointing = False

    @abstractmethod
    def embed_class(self, labels_B: Tensor) -> Tensor:
        """The labels' embeddings, [B] -> [B, D]."""

    @abstractmethod
    def hidden(self, codes_BL: Tensor, labels_B: Tensor, conditioning_B: Tensor | None = None) -> Tensor:
        """The output layer's input, [B, L, D]; `conditioning_B` is the number that the model is conditioned on."""

    @abstractmethod
    def read_out(self, hidden_BLD: Tensor, codes_BL: Tensor | None = None, *mixed: Tensor) -> Tensor:
        """The output layer: logits [B, L, V], or with codes their log-likelihoods [B].

        `mixed` is empty or (other_BLD, share_B), see `likelihood.linear_sequence_logp`; for models that are trained so.
        """

    @property
    def num_classes(self) -> int:
        """Real classes; labels are 0 to num_classes - 1."""
        return self.config.num_classes

    @property
    def null_class(self) -> int:
        """The label of no condition."""
        return self.config.num_classes

    @property
    def sequence_length(self) -> int:
        """Codes per image (over all scales), L."""
        return self.config.sequence_length

    @property
    def vocab_size(self) -> int:
        """Number of codes, V."""
        return self.config.vocab_size

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Keep only what passes between blocks while training; the backward computes each block again."""
        self.activation_checkpointing = enabled

    def add_conditioning(self) -> None:
        """Create the embedding of the number that the config conditions the model on, if any."""
        if self.conditioning is not None:
            self.add_module(self.conditioning.module, self.conditioning.embedding(self.config.dim))

    def condition(self, labels_B: Tensor, conditioning_B: Tensor | None = None) -> Tensor:
        """The class embedding [B, D], plus that of the number that the model is conditioned on."""
        class_BD, kind = self.embed_class(labels_B), self.conditioning
        if kind is None:
            assert conditioning_B is None, "a plain model"
            return class_BD
        if conditioning_B is None:
            raise ValueError(f"this model is conditioned on {kind.title}: {kind.argument} must be given")
        return class_BD + getattr(self, kind.module)(conditioning_B)

    def given_conditioning(self, labels_B: Tensor, **numbers: Tensor | float | None) -> Tensor | None:
        """The number of each image [B] float32 among `numbers` by argument, on the labels' device.

        Raises:
            ValueError: a number that this model is not conditioned on.
        """
        given = {argument: number for argument, number in numbers.items() if number is not None}
        for kind in CONDITIONINGS:
            if kind.argument in given and kind is not self.conditioning:
                raise ValueError(
                    f"{kind.argument} given to a model without {kind.title} conditioning: leave it out, "
                    f"or build the model with {kind.switch}=True"
                )
        if not given:
            return None
        (number,) = given.values()
        return torch.as_tensor(number, dtype=torch.float32, device=labels_B.device).expand(labels_B.shape)

    def run_blocks(self, blocks: Iterable[nn.Module], x_BLD: Tensor, shared: Tensor) -> Tensor:
        """`block(x_BLD, shared)` of one block after another, [B, L, D] -> [B, L, D]."""
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        for block in blocks:
            if recompute:
                # no determinism check: under ZeRO-3 a weight's shape is its shard's outside its module
                x_BLD = checkpoint(block, x_BLD, shared, use_reentrant=False, determinism_check="none")
            else:
                x_BLD = block(x_BLD, shared)
        return x_BLD

    def logits(
        self,
        codes_BL: Tensor,
        labels_B: Tensor,
        log_lambda_B: Tensor | None = None,
        gft_beta: Tensor | float | None = None,
    ) -> Tensor:
        """Logits [B, L, V] in the weights' dtype; arguments as in `log_likelihoods`."""
        conditioning_B = self.given_conditioning(labels_B, log_lambda=log_lambda_B, gft_beta=gft_beta)
        return self.read_out(self.hidden(codes_BL, labels_B, conditioning_B))

    def log_likelihoods(
        self,
        codes_BL: Tensor,
        labels_B: Tensor,
        log_lambda_B: Tensor | None = None,
        gft_beta: Tensor | float | None = None,
    ) -> Tensor:
        """log p(codes | label) in nats, [B] float32.

        `codes_BL` of any integer dtype, in [0, V), of several scales one after another; `labels_B` int64 in
        [0, num_classes], the last being the null class; `log_lambda_B` natural logarithms of lambda for a
        model conditioned on it, and only for one; so `gft_beta`, [B] or one number in [0, 1].
        """
        conditioning_B = self.given_conditioning(labels_B, log_lambda=log_lambda_B, gft_beta=gft_beta)
        codes_BL = codes_BL.long()
        return self.read_out(self.hidden(codes_BL, labels_B, conditioning_B), codes_BL)

    def forward(self, *inputs: Tensor, compute: Callable[..., Tensor] | None = None, **named: Any) -> Tensor:
        """`log_likelihoods(...)`, or `compute(model, ...)`.

        What a loss computes of the model beyond log-likelihoods runs within `forward` too: only there ZeRO-3 and
        DeepSpeed's engine see it.
        """
        return (compute or CodeModel.log_likelihoods)(self, *inputs, **named)


def shape_of(module: CodeModel) -> dict[str, Any]:
    """What describes a model's weights: the fields of its config but for the dropouts, which are of training."""
    fields = asdict(module.config)
    return {name: value for name, value in fields.items() if not name.endswith(("dropout", "drop_path"))}


def list_of_blocks(module: nn.Module) -> tuple[str, nn.ModuleList]:
    """The attribute that holds a model's transformer blocks, and the blocks."""
    return next((name, part) for name, part in module.named_children() if isinstance(part, nn.ModuleList))


# draw(cond_NV, uncond_NV or None, scale, uniforms_N) -> codes [N] int64: one code for each row of logits, from guided
# logits where `uncond_NV` is given, by the inverse of the cumulative distribution at `uniforms_N`
DrawCodes = Callable[[Tensor, Tensor | None, float, Tensor], Tensor]


class Generate(Protocol):
    """Samples the codes of new images from a family's model in eval mode."""

    def __call__(
        self,
        model: Any,
        labels_B: Tensor,
        scales: Sequence[float],
        uniforms_BL: Tensor,
        draw: DrawCodes,
        conditioning_B: Tensor | None = None,
        cuda_graphs: bool = False,
    ) -> Tensor:
        """Codes [B, L] int64 on the model's device.

        Args:
            model: of the family.
            labels_B: int64, on the model's device.
            scales: guidance s of each of the S sampling steps; the unconditional half need not run where it is 0.
            uniforms_BL: float64 in [0, 1); number l of an image draws its code l.
            draw: draws one code a row.
            conditioning_B: of each image the number that the model is conditioned on; the unconditional half takes
                the same.
            cuda_graphs: replay decoding steps as CUDA graphs where the family and the device can.
        """
        ...


@dataclass(frozen=True)
class Family:
    """A family of models of codes. Everything outside its folder asks this record and never compares the name.

    Attributes:
        name: in weights files, tables of codes and `CodeModel.family`.
        title: as its paper writes it; with `program` (URL), `paper` (arXiv number) and `licence` for the model card.
        config: the dataclass of a model's shape and dropouts; has `num_classes`, `vocab_size`, `sequence_length`,
            `n_layer`, and the switches of `conditioning.CONDITIONINGS` that the family has.
        presets: preset -> what differs from the config's defaults; names as `canonical_model` writes them.
        build: (config, tokenizer or None) -> model with random weights. Raises ValueError for impossible shapes.
        generate: see `Generate`.
        guidance_steps: config -> S, the sampling steps that have a guidance scale each.
        blocks: attribute of the model that holds its blocks, an `nn.ModuleList`.
        shortened: (config, blocks) -> the config's fields to replace for that many blocks of otherwise the same shape.
        guidance_offset: the family's own guidance number is the paper's s plus this.
        guidance_name: what the family calls that number.
        class_embedding: the tensor with one row per class, whose rows get one lambda's embedding on export.
        layouts: published layout -> (config, tensors by name) -> the object that `torch.save` writes.
        weights: how to recognise the family's weights files; None: they are not recognised.
        activation_elements: config -> elements a code that one block keeps for its backward, without dropout masks;
            0 leaves activations out of the planned memory.
        dropout_bytes: config -> bytes a code of the dropout masks that one block keeps.
        element_wise_bytes: (config, whether blocks are compiled) -> bytes a code that the element-wise operations of a
            block read and write in 16 bits, forward and backward, matmuls and attention apart.
        per_image_modules: name parts of parameters that each image uses once, not each code.
        pixel_shift: pixels are 127.5 x + pixel_shift of an image x in [-1, 1], cut off to uint8.
        needs_tokenizer: whether a model runs only with a tokenizer's codebook.
        tokenizer_hint: the usual file of that tokenizer, for messages and model cards.
        hub: the Hub's repository of the published weights, for the model card.
        hub_files: pattern of the files of weights in it.
    """

    name: str
    title: str
    program: str
    paper: str
    config: type
    presets: Mapping[str, Mapping[str, Any]]
    build: Callable[[Any, nn.Module | None], CodeModel]
    generate: Generate
    guidance_steps: Callable[[Any], int]
    blocks: str
    shortened: Callable[[Any, int], dict[str, Any]]
    guidance_offset: float
    guidance_name: str
    class_embedding: str
    activation_elements: Callable[[Any], int] = lambda config: 0
    dropout_bytes: Callable[[Any], int] = lambda config: 0
    element_wise_bytes: Callable[[Any, bool], tuple[float, float]] = lambda config, compiled: (0.0, 0.0)
    per_image_modules: tuple[str, ...] = ()
    layouts: Mapping[str, Callable[[Any, dict[str, Tensor]], Any]] = field(default_factory=dict)
    weights: WeightsKind | None = None
    pixel_shift: float = 127.5
    needs_tokenizer: bool = False
    tokenizer_hint: str | None = None
    hub: str | None = None
    hub_files: str = ""
    licence: str = "mit"
