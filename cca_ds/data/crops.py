"""From an image's bytes to its crops, equal to those of the two original programs.

Letters: S image size, C crops per image. Crops are uint8 arrays [C, S, S, channels], not yet scaled to [-1, 1].

- ten_crop: LlamaGen's extract_codes_c2i.py. For each range r: shrink and centre-crop to a square of int(r * S)
  (ADM's procedure, LlamaGen's dataset/augmentation.py), then the four corners and the centre, then the same
  five of the mirrored square. Ranges are concatenated: with [1.1, 1.05] there are twenty crops.
- random: VAR's utils/data.py. Shorter side to round(r * S) by Lanczos, then crops at random positions, here a
  fixed number of them; each position is drawn from (seed, image, crop).
- none: one centre crop by ADM's procedure.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

CORNERS_AND_CENTRE = 5
MOST_ELONGATED = 64  # ratio of the sides; a strip of 1 x 60,000 would be resized to gigabytes
EIGHT_BIT_MODES = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"}


class UnreadableImage(ValueError):
    """One image cannot be used; the message is the reason that the list of skipped images gives."""


@dataclass(frozen=True)
class CropSettings:
    """How images are cropped; equal settings give equal crops.

    Attributes:
        kind: "none", "ten_crop" or "random"; see the head of this file.
        image_size: side of a crop in pixels, S.
        ranges: r above; several for ten_crop, one for random, unused for none.
        crops_per_image, flip, seed: of random only; `flip` mirrors half of the crops, as VAR's --hflip does.
        mode: PIL's name of the crops' colours, "RGB" or "L".
        upright: turn images as their EXIF orientation says, which the originals do not.

    Raises:
        ValueError: ranges that do not fit the kind.
    """

    kind: str
    image_size: int
    ranges: tuple[float, ...] = ()
    crops_per_image: int = 1
    flip: bool = False
    seed: int = 0
    mode: str = "RGB"
    upright: bool = False

    def __post_init__(self) -> None:
        if self.kind == "ten_crop" and not self.ranges:
            raise ValueError("data.crop_ranges is empty: ten_crop needs ranges, e.g. data.crop_ranges=[1.1,1.05]")
        if self.kind == "random" and len(self.ranges) != 1:
            raise ValueError(f"data.crop_ranges={list(self.ranges)}: random crops take one range, e.g. [1.125]")
        if self.kind != "none" and any(r < 1.0 for r in self.ranges):
            raise ValueError(f"data.crop_ranges={list(self.ranges)}: a range below 1 is smaller than the image")

    @property
    def count(self) -> int:
        """Crops per image, C."""
        return {"none": 1, "ten_crop": 2 * CORNERS_AND_CENTRE * len(self.ranges), "random": self.crops_per_image}[
            self.kind
        ]

    def as_dict(self) -> dict:
        """The settings that this kind uses, for the manifest."""
        values = asdict(self) | {"ranges": list(self.ranges)}
        used = {"none": (), "ten_crop": ("ranges",), "random": ("ranges", "crops_per_image", "flip", "seed")}
        turned = ("upright",) if self.upright else ()  # as before the setting was there
        return {name: values[name] for name in ("kind", "image_size", "mode", *used[self.kind], *turned)}


def decode_image(content: bytes, mode: str, max_megapixels: float, upright: bool = False) -> tuple[Image.Image, str]:
    """Decode an image to `mode`, dropping alpha.

    Returns:
        The image, and the mode of the file.

    Raises:
        UnreadableImage: no bytes, no image, truncated, too large, or more than 8 bits a channel. The size is checked
            before pixels are decoded.
    """
    if not content:
        raise UnreadableImage("zero bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own, much lower, limit of pixels and odd EXIF blocks
            image = Image.open(io.BytesIO(content))
            megapixels = image.width * image.height / 1e6
            if megapixels > max_megapixels:
                raise UnreadableImage(
                    f"{image.width} x {image.height} = {megapixels:.0f} megapixels, more than {max_megapixels:g} "
                    "(--max_megapixels)"
                )
            if max(image.size) > MOST_ELONGATED * min(image.size):
                raise UnreadableImage(f"{image.width} x {image.height} is too elongated to crop a square from")
            if image.mode not in EIGHT_BIT_MODES:
                raise UnreadableImage(f"mode {image.mode} does not have 8 bits a channel")
            kind = image.mode
            return (ImageOps.exif_transpose(image) if upright else image).convert(mode), kind
    except UnreadableImage:
        raise
    except UnidentifiedImageError:
        raise UnreadableImage("not an image that Pillow reads") from None
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, zlib.error and more
        raise UnreadableImage(" ".join(f"{type(error).__name__}: {error}".split())) from error


def crop_function(settings: CropSettings) -> Callable[[Image.Image, int], np.ndarray]:
    """The function (image, index of the image) -> crops [C, S, S, channels] uint8."""
    return {"none": _centre_crop, "ten_crop": _ten_crops, "random": _random_crops}[settings.kind](settings)


def allow_large_images() -> None:
    """Switch off Pillow's limit of pixels, which is lower than that of `decode_image`."""
    Image.MAX_IMAGE_PIXELS = None


def centre_square(image: Image.Image, size: int) -> np.ndarray:
    """ADM's centre crop, [size, size, channels] uint8.

    The image is halved by a box filter while its shorter side is at least 2 * size, then resized bicubically.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    factor = size / min(image.size)
    width, height = round(image.width * factor), round(image.height * factor)
    pixels = _pixels(image.resize((width, height), Image.Resampling.BICUBIC))
    top, left = (height - size) // 2, (width - size) // 2
    return pixels[top : top + size, left : left + size]


def _centre_crop(settings: CropSettings) -> Callable[[Image.Image, int], np.ndarray]:
    return lambda image, index: centre_square(image, settings.image_size)[None]


def _ten_crops(settings: CropSettings) -> Callable[[Image.Image, int], np.ndarray]:
    size = settings.image_size

    def five(square: np.ndarray) -> list[np.ndarray]:
        far = len(square) - size
        middle = round(far / 2)  # rounds half to even, as torchvision's centre crop does
        corners = ((0, 0), (0, far), (far, 0), (far, far), (middle, middle))
        return [square[top : top + size, left : left + size] for top, left in corners]

    def crops(image: Image.Image, index: int) -> np.ndarray:
        found = []
        for crop_range in settings.ranges:
            square = centre_square(image, int(size * crop_range))
            found += five(square) + five(square[:, ::-1])
        return np.stack(found)

    return crops


def _random_crops(settings: CropSettings) -> Callable[[Image.Image, int], np.ndarray]:
    size = settings.image_size
    shorter = round(settings.ranges[0] * size)

    def crops(image: Image.Image, index: int) -> np.ndarray:
        straight = _pixels(_resize_shorter_side(image, shorter))
        mirrored = None
        found = np.empty((settings.count, size, size, straight.shape[2]), dtype=np.uint8)
        for number in range(settings.count):
            draw = np.random.default_rng((settings.seed, index, number))
            flipped = settings.flip and draw.random() < 0.5
            if flipped and mirrored is None:
                # mirrored before the resize, as in the original; afterwards it may differ by a grey level
                flip = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
                mirrored = _pixels(_resize_shorter_side(flip, shorter))
            pixels = mirrored if flipped else straight
            top, left = (int(draw.integers(0, side - size + 1)) for side in pixels.shape[:2])
            found[number] = pixels[top : top + size, left : left + size]
        return found

    return crops


def _resize_shorter_side(image: Image.Image, size: int) -> Image.Image:
    """torchvision's Resize(size) by Lanczos: the longer side is rounded down to a whole number of pixels."""
    short, long = min(image.size), max(image.size)
    longer = int(size * long / short)
    target = (size, longer) if image.width <= image.height else (longer, size)
    return image.resize(target, Image.Resampling.LANCZOS)


def _pixels(image: Image.Image) -> np.ndarray:
    """Pixels of an image, [height, width, channels] uint8."""
    pixels = np.asarray(image)
    return pixels if pixels.ndim == 3 else pixels[:, :, None]
