"""The FID Inception network of 2015, as the ADM evaluator and torch-fidelity use it, without torchvision.

`mixed_6/conv` of the original graph is the 1x1 branch of its third convolving 17 x 17 block, `Mixed_6d` in
the PyTorch weights (mixed, mixed_1, mixed_2 are 5b to 5d, mixed_3 is 6a), after its ReLU. The keys are those
of torch- fidelity's weights file (converted from the graph inception-2015-12-05), which is loaded strictly.
Peculiar to this network: averages leave the padding out, the last block pools by maximum, there are 1,008
classes, and images are resized as TensorFlow 1 did.

B images, C channels, H height, W width.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from cca_ds.ops.exact_convolutions import exact_convolutions
from cca_ds.untrusted import not_a_file

WEIGHTS_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"

INPUT_SIZE = 299
POOL_FEATURES = 2048
SPATIAL_CHANNELS = 7
SPATIAL_FEATURES = SPATIAL_CHANNELS * 17 * 17
CLASSES = 1008


class InceptionWeightsError(ValueError):
    """The weights file is missing or not the FID network's."""


class InceptionOutput(NamedTuple):
    """What the metrics take of a batch of images, all float32."""

    pool_BD: torch.Tensor  # [B, 2048], before the classifier
    spatial_BS: torch.Tensor  # [B, 2023]: 17 x 17 positions of 7 channels, channels last
    probabilities_BK: torch.Tensor  # [B, 1008], softmax of the logits without their bias, as in ADM


class Conv(NamedTuple):
    """One convolution of a block: the name it has in the weights, and its shape."""

    name: str
    channels: int
    kernel: int | tuple[int, int] = 1
    stride: int = 1


Fork = tuple[Conv, ...]  # convolutions of one input, side by side
Branch = tuple[Conv | Fork, ...]


class ConvNormReLU(nn.Module):
    """Convolution without bias, batch normalisation, ReLU."""

    def __init__(self, inputs: int, shape: Conv, padding: int | tuple[int, ...] | None = None):
        super().__init__()
        kernel = shape.kernel if isinstance(shape.kernel, tuple) else (shape.kernel, shape.kernel)
        if padding is None:  # blocks keep the size, or halve it without padding
            padding = tuple(side // 2 for side in kernel) if shape.stride == 1 else 0
        self.conv = nn.Conv2d(inputs, shape.channels, kernel, shape.stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(shape.channels, eps=1e-3)

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        return functional.relu(self.bn(self.conv(images_BCHW)), inplace=True)


class Mixed(nn.Module):
    """Branches side by side, then a pooling branch; its outputs one after another along the channels."""

    def __init__(self, inputs: int, branches: Iterable[Branch], pool: str, pool_channels: int):
        super().__init__()
        self.branches, self.pool, self.pooled = tuple(branches), pool, pool_channels > 0
        for branch in self.branches:
            width = inputs
            for step in branch:
                fork = (step,) if isinstance(step, Conv) else step
                for conv in fork:
                    self.add_module(conv.name, ConvNormReLU(width, conv))
                width = sum(conv.channels for conv in fork)
        if self.pooled:
            self.branch_pool = ConvNormReLU(inputs, Conv("branch_pool", pool_channels))

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        outputs = [self._run(branch, x_BCHW) for branch in self.branches]
        if self.pool == "average":
            pooled = functional.avg_pool2d(x_BCHW, 3, stride=1, padding=1, count_include_pad=False)
        elif self.pool == "maximum":
            pooled = functional.max_pool2d(x_BCHW, 3, stride=1, padding=1)
        else:
            pooled = functional.max_pool2d(x_BCHW, 3, stride=2)
        return torch.cat([*outputs, self.branch_pool(pooled) if self.pooled else pooled], dim=1)

    def _run(self, branch: Branch, x_BCHW: torch.Tensor) -> torch.Tensor:
        for step in branch:
            fork = (step,) if isinstance(step, Conv) else step
            sides = [self.get_submodule(conv.name)(x_BCHW) for conv in fork]
            x_BCHW = sides[0] if len(sides) == 1 else torch.cat(sides, dim=1)
        return x_BCHW


class InceptionFID(nn.Module):
    """Images [B, 3, H, W] uint8 of any size -> `InceptionOutput`. Frozen and in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNormReLU(3, Conv("", 32, 3, stride=2))
        self.Conv2d_2a_3x3 = ConvNormReLU(32, Conv("", 32, 3), padding=0)
        self.Conv2d_2b_3x3 = ConvNormReLU(32, Conv("", 64, 3))
        self.Conv2d_3b_1x1 = ConvNormReLU(64, Conv("", 80))
        self.Conv2d_4a_3x3 = ConvNormReLU(80, Conv("", 192, 3), padding=0)
        self.Mixed_5b = _block_35(192, pool_channels=32)
        self.Mixed_5c = _block_35(256, pool_channels=64)
        self.Mixed_5d = _block_35(288, pool_channels=64)
        self.Mixed_6a = _halve_to_17(288)
        self.Mixed_6b = _block_17(128)
        self.Mixed_6c = _block_17(160)
        self.Mixed_6d = _block_17(160)
        self.Mixed_6e = _block_17(192)
        self.Mixed_7a = _halve_to_8(768)
        self.Mixed_7b = _block_8(1280, pool="average")
        self.Mixed_7c = _block_8(2048, pool="maximum")
        self.fc = nn.Linear(POOL_FEATURES, CLASSES)
        self.requires_grad_(False)
        self.eval()

    @torch.no_grad()
    @exact_convolutions()
    def forward(self, images_BCHW: torch.Tensor) -> InceptionOutput:
        if images_BCHW.dtype != torch.uint8 or images_BCHW.ndim != 4 or images_BCHW.shape[1] != 3:
            shape = list(images_BCHW.shape)
            raise ValueError(f"images of {images_BCHW.dtype} {shape}: uint8 [B, 3, H, W] is needed")
        x = (resize_like_tensorflow(images_BCHW.float(), INPUT_SIZE) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(functional.max_pool2d(x, 3, stride=2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(functional.max_pool2d(x, 3, stride=2))))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        spatial_BCHW = self.Mixed_6d.branch1x1(x)[:, :SPATIAL_CHANNELS]
        x = self.Mixed_7a(self.Mixed_6e(self.Mixed_6d(x)))
        pool_BD = self.Mixed_7c(self.Mixed_7b(x)).mean(dim=(2, 3))
        probabilities_BK = (pool_BD @ self.fc.weight.T).softmax(dim=1)
        return InceptionOutput(pool_BD, spatial_BCHW.permute(0, 2, 3, 1).flatten(1), probabilities_BK)


def load_inception(weights: str | Path | None, device: str | torch.device = "cpu") -> InceptionFID:
    """The network with the weights of a local file.

    Raises InceptionWeightsError, one line, when the file is missing or its keys or shapes are not the
    network's.
    """
    reason = None if weights is None else not_a_file(Path(weights))
    if weights is None or reason:
        found = f"--inception_weights {weights}: {reason}" if reason else "no --inception_weights given"
        raise InceptionWeightsError(
            f"{found}; download {WEIGHTS_URL} and check that its sha256 is {WEIGHTS_SHA256} (sha256sum FILE)"
        )
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
        network = InceptionFID()
        network.load_state_dict(state, strict=True)
    except Exception as error:  # torch raises half a dozen types for a file that is not what it should be
        reason = " ".join(str(error).split())[:200]
        raise InceptionWeightsError(
            f"--inception_weights {weights}: not the FID network's weights ({reason}); "
            f"get {WEIGHTS_URL}, sha256 {WEIGHTS_SHA256}"
        ) from error
    return network.to(device)


def resize_like_tensorflow(images_BCHW: torch.Tensor, size: int) -> torch.Tensor:
    """Bilinear resize of float images to [B, C, size, size], sampling at index * (old / new).

    TensorFlow 1's `resize_bilinear` with corners not aligned; no anti-aliasing, the last row and column
    repeat.
    """
    wide_BCHW = _interpolate(images_BCHW, size)
    return _interpolate(wide_BCHW.transpose(2, 3), size).transpose(2, 3)


def _interpolate(x_BCHW: torch.Tensor, size: int) -> torch.Tensor:
    """Along the last dimension."""
    length = x_BCHW.shape[-1]
    # float32 as in TensorFlow: the weights of the two neighbours carry its rounding
    position_W = torch.arange(size, dtype=torch.float32, device=x_BCHW.device) * (length / size)
    lower_W = position_W.long()
    weight_W = position_W - lower_W
    lower_BCHW, upper_BCHW = x_BCHW[..., lower_W], x_BCHW[..., (lower_W + 1).clamp(max=length - 1)]
    return lower_BCHW + (upper_BCHW - lower_BCHW) * weight_W


def _block_35(inputs: int, pool_channels: int) -> Mixed:
    branches = (
        (Conv("branch1x1", 64),),
        (Conv("branch5x5_1", 48), Conv("branch5x5_2", 64, 5)),
        (Conv("branch3x3dbl_1", 64), Conv("branch3x3dbl_2", 96, 3), Conv("branch3x3dbl_3", 96, 3)),
    )
    return Mixed(inputs, branches, "average", pool_channels)


def _halve_to_17(inputs: int) -> Mixed:
    double = (Conv("branch3x3dbl_1", 64), Conv("branch3x3dbl_2", 96, 3), Conv("branch3x3dbl_3", 96, 3, stride=2))
    return Mixed(inputs, ((Conv("branch3x3", 384, 3, stride=2),), double), "halve", 0)


def _block_17(inner: int) -> Mixed:
    column, row = (7, 1), (1, 7)
    seven = (Conv("branch7x7_1", inner), Conv("branch7x7_2", inner, row), Conv("branch7x7_3", 192, column))
    double = (
        Conv("branch7x7dbl_1", inner),
        Conv("branch7x7dbl_2", inner, column),
        Conv("branch7x7dbl_3", inner, row),
        Conv("branch7x7dbl_4", inner, column),
        Conv("branch7x7dbl_5", 192, row),
    )
    return Mixed(768, ((Conv("branch1x1", 192),), seven, double), "average", 192)


def _halve_to_8(inputs: int) -> Mixed:
    three = (Conv("branch3x3_1", 192), Conv("branch3x3_2", 320, 3, stride=2))
    seven = (
        Conv("branch7x7x3_1", 192),
        Conv("branch7x7x3_2", 192, (1, 7)),
        Conv("branch7x7x3_3", 192, (7, 1)),
        Conv("branch7x7x3_4", 192, 3, stride=2),
    )
    return Mixed(inputs, (three, seven), "halve", 0)


def _block_8(inputs: int, pool: str) -> Mixed:
    three = (Conv("branch3x3_1", 384), _cross("branch3x3_2"))
    double = (Conv("branch3x3dbl_1", 448), Conv("branch3x3dbl_2", 384, 3), _cross("branch3x3dbl_3"))
    return Mixed(inputs, ((Conv("branch1x1", 320),), three, double), pool, 192)


def _cross(name: str) -> Fork:
    """A row and a column of three, side by side."""
    return (Conv(f"{name}a", 384, (1, 3)), Conv(f"{name}b", 384, (3, 1)))
