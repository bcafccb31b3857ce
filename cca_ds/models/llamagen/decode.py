"""Code after code in raster order, for LlamaGen, with a cache of keys and values.

Legend: B images, R rows of the batch (B, or 2 B with the unconditional half after the conditional one), L codes per
image, S = L slots of the cache, V vocabulary, D width, H heads, C channels of a head, padded as attention takes them.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cca_ds.models.base import DrawCodes
from cca_ds.models.llamagen.model import LlamaGen
from cca_ds.ops.attention import one_query_attention, padded_channels
from cca_ds.ops.cuda_graphs import GraphCache, has_graphs

Cache = list[tuple[Tensor, Tensor]]  # per layer: keys and values, each [R, H, S, C]

GRAPH_SPANS = 4  # CUDA graphs have fixed shapes: one for each quarter of the slots


def sample_raster(
    model: LlamaGen,
    labels_B: Tensor,
    scales: Sequence[float],
    uniforms_BL: Tensor,
    draw: DrawCodes,
    conditioning_B: Tensor | None = None,
    cuda_graphs: bool = False,
) -> Tensor:
    """Codes [B, L] int64, one sampling step a code; arguments as in `models.base.Generate`.

    The unconditional half runs from the first code until the last guided one, and not at all when none is.
    """
    batch, length = uniforms_BL.shape
    guided_until = max((step + 1 for step, scale in enumerate(scales) if scale), default=0)
    if guided_until:
        labels_B = torch.cat([labels_B, torch.full_like(labels_B, model.null_class)])
        conditioning_B = None if conditioning_B is None else conditioning_B.repeat(2)
    x_RD = model.condition(labels_B, conditioning_B)
    cache = new_cache(model, len(labels_B), x_RD.device, x_RD.dtype)
    decode = _GraphedStep(model, cache) if cuda_graphs and has_graphs(x_RD) else _EagerStep(model, cache)
    codes_BL = torch.empty(batch, length, dtype=torch.int64, device=x_RD.device)
    for step in range(length):
        if step == guided_until and guided_until:
            decode = decode.keep_rows(batch)
            x_RD = x_RD[:batch]
        logits_RV = decode(x_RD, step)
        uncond_BV = logits_RV[batch:] if step < guided_until else None
        codes_B = draw(logits_RV[:batch], uncond_BV, scales[step], uniforms_BL[:, step])
        codes_BL[:, step] = codes_B
        if step + 1 < length:
            x_RD = model.tok_embeddings(codes_B if step >= guided_until else codes_B.repeat(2))
    return codes_BL


def new_cache(model: LlamaGen, rows: int, device: torch.device, dtype: torch.dtype) -> Cache:
    """Keys and values of every layer; a head's slots are contiguous, so that the live ones are a view."""
    config = model.config
    shape = (rows, config.n_head, config.sequence_length, padded_channels(config.head_dim))
    return [
        (torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype))
        for _ in range(config.n_layer)
    ]


def _run(model: LlamaGen, x_RD: Tensor, table_12: Tensor, attend: Callable[..., Tensor]) -> Tensor:
    """One position through the blocks and the head: [R, D] -> logits [R, V].

    `attend(layer, q, k, v)`, each [R, H, 1, C], writes k and v into the layer's cache and returns the mixed values.
    """
    channels = model.config.head_dim
    x_R1D = x_RD.unsqueeze(1)
    for index, layer in enumerate(model.layers):
        q_RH1C, k_RH1C, v_RH1C = layer.attention.qkv(layer.attention_norm(x_R1D), table_12)
        mixed_RH1C = attend(index, q_RH1C, k_RH1C, v_RH1C)[..., :channels]
        x_R1D = x_R1D + layer.attention.wo(mixed_RH1C.transpose(1, 2).flatten(2))
        x_R1D = x_R1D + layer.feed_forward(layer.ffn_norm(x_R1D))
    return model.output(model.norm(x_R1D)).squeeze(1)


class _EagerStep:
    """A decoding step that writes one slot and attends to the live slots only, as views of the cache."""

    def __init__(self, model: LlamaGen, cache: Cache) -> None:
        self.model, self.cache = model, cache
        self.table, self.scale = model.rotary(cache[0][0].device), model.config.head_dim**-0.5

    def keep_rows(self, rows: int) -> "_EagerStep":
        """The step without the unconditional half, on the first rows of the same cache."""
        return _EagerStep(self.model, [(keys[:rows], values[:rows]) for keys, values in self.cache])

    def __call__(self, x_RD: Tensor, step: int) -> Tensor:
        """Embedded input [R, D] of position `step` -> logits [R, V] of code `step`."""

        def attend(layer: int, q_RH1C: Tensor, k_RH1C: Tensor, v_RH1C: Tensor) -> Tensor:
            keys_RHSC, values_RHSC = self.cache[layer]
            keys_RHSC[:, :, step] = k_RH1C[:, :, 0]
            values_RHSC[:, :, step] = v_RH1C[:, :, 0]
            live = slice(0, step + 1)
            return one_query_attention(q_RH1C, keys_RHSC[:, :, live], values_RHSC[:, :, live], self.scale)

        return _run(self.model, x_RD, self.table[step : step + 1], attend)


class _GraphedStep:
    """The same step with fixed shapes: the position is a tensor, and a mask hides the later slots.

    On a GPU it is recorded as a CUDA graph once per quarter of the slots, and replayed.
    """

    def __init__(self, model: LlamaGen, cache: Cache) -> None:
        self.model, self.cache = model, cache
        keys_RHSC = cache[0][0]
        self.table, self.scale = model.rotary(keys_RHSC.device), model.config.head_dim**-0.5
        self.slots_S = torch.arange(keys_RHSC.shape[2], device=keys_RHSC.device)
        self.step_1 = torch.zeros(1, dtype=torch.int64, device=keys_RHSC.device)
        self.x_RD = torch.empty(len(keys_RHSC), model.config.dim, device=keys_RHSC.device, dtype=keys_RHSC.dtype)
        self.graphs = GraphCache()

    def keep_rows(self, rows: int) -> "_GraphedStep":
        """The step without the unconditional half, on the first rows of the same cache."""
        return _GraphedStep(self.model, [(keys[:rows], values[:rows]) for keys, values in self.cache])

    def __call__(self, x_RD: Tensor, step: int) -> Tensor:
        """Embedded input [R, D] of position `step` -> logits [R, V] of code `step`."""
        self.x_RD.copy_(x_RD)
        self.step_1.fill_(step)
        part = -(-len(self.slots_S) // GRAPH_SPANS)
        span = min((step // part + 1) * part, len(self.slots_S))
        return self.graphs.run(span, lambda: self._run(span), x_RD.device)

    def _run(self, span: int) -> Tensor:
        live_1S = self.slots_S[None, :span] <= self.step_1

        def attend(layer: int, q_RH1C: Tensor, k_RH1C: Tensor, v_RH1C: Tensor) -> Tensor:
            keys_RHSC, values_RHSC = self.cache[layer]
            keys_RHSC.index_copy_(2, self.step_1, k_RH1C)
            values_RHSC.index_copy_(2, self.step_1, v_RH1C)
            spanned = (keys_RHSC[:, :, :span], values_RHSC[:, :, :span])
            return one_query_attention(q_RH1C, *spanned, self.scale, live_1S)

        return _run(self.model, self.x_RD, self.table.index_select(0, self.step_1), attend)
