"""Crops equal those of an independent rewrite of the two original programs; each bad image gives one reason."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from cca_ds.data.crops import CropSettings, UnreadableImage, allow_large_images, crop_function, decode_image

SIZES = [(500, 375), (375, 500), (64, 64), (70, 301), (333, 334), (2000, 1200), (563, 1000), (1124, 1124)]


def picture(width, height, mode="RGB", seed=0):
    """A smooth random picture with noise, so that a shifted or mirrored crop differs."""
    draw = np.random.default_rng(seed)
    coarse = draw.integers(0, 256, (9, 7, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    noisy = np.clip(smooth + draw.integers(-20, 21, smooth.shape), 0, 255)
    return Image.fromarray(noisy.astype(np.uint8)).convert(mode)


def content(image, form="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


# ------------------------------------------------- an independent rewrite, on PIL images, as torchvision does it


def adm_square(image, size):
    while image.size[0] >= 2 * size and image.size[1] >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), resample=Image.BOX)
    shorter = min(image.size)
    target = tuple(round(side * (size / shorter)) for side in image.size)
    image = image.resize(target, resample=Image.BICUBIC)
    left, upper = (target[0] - size) // 2, (target[1] - size) // 2
    return image.crop((left, upper, left + size, upper + size))


def torchvision_five(image, size):
    width, height = image.size
    upper, left = round((height - size) / 2.0), round((width - size) / 2.0)
    boxes = [
        (0, 0, size, size),
        (width - size, 0, width, size),
        (0, height - size, size, height),
        (width - size, height - size, width, height),
        (left, upper, left + size, upper + size),
    ]
    return [np.asarray(image.crop(box)) for box in boxes]


def original_ten_crops(image, size, crop_range):
    square = adm_square(image, int(size * crop_range))
    return torchvision_five(square, size) + torchvision_five(ImageOps.mirror(square), size)


def torchvision_resize(image, size):
    width, height = image.size
    if width < height:
        return image.resize((size, int(size * height / width)), Image.LANCZOS)
    return image.resize((int(size * width / height), size), Image.LANCZOS)


# --------------------------------------------------------------------------------------------------- the tests


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("size", [64, 96])
def test_ten_crops_equal_llamagens(shape, size):
    image = picture(*shape)
    crops = crop_function(CropSettings("ten_crop", size, (1.1, 1.05)))(image, 0)
    assert crops.dtype == np.uint8 and crops.shape == (20, size, size, 3)
    expected = original_ten_crops(image, size, 1.1) + original_ten_crops(image, size, 1.05)
    np.testing.assert_array_equal(crops, np.stack(expected))


@pytest.mark.parametrize(("size", "squares"), [(256, [281, 268]), (384, [422, 403])])
def test_squares_have_the_originals_sizes(size, squares):
    """int(256 * 1.1) = 281 and so on: the far corner of the square is in the fourth crop."""
    image = picture(600, 600)
    crops = crop_function(CropSettings("ten_crop", size, (1.1, 1.05)))(image, 0)
    for number, side in enumerate(squares):
        square = np.asarray(adm_square(image, side))
        np.testing.assert_array_equal(crops[10 * number + 3][-1, -1], square[-1, -1])
        np.testing.assert_array_equal(crops[10 * number + 5][0, 0], square[0, -1])  # the mirrored half


def test_mirrored_half_is_the_mirror_image():
    crops = crop_function(CropSettings("ten_crop", 64, (1.25,)))(picture(120, 90), 0)  # 80: no odd margin
    mirror_of = [1, 0, 3, 2, 4]  # the upper left of the mirrored square is the upper right, mirrored
    np.testing.assert_array_equal(crops[5:], crops[mirror_of][:, :, ::-1])


@pytest.mark.parametrize("shape", SIZES[:6])
def test_random_crops_are_windows_of_vars_resize(shape):
    image, size = picture(*shape), 64
    settings = CropSettings("random", size, (1.125,), crops_per_image=6, seed=3)
    crops = crop_function(settings)(image, 17)
    resized = np.asarray(torchvision_resize(image, 72))
    windows = np.lib.stride_tricks.sliding_window_view(resized, (size, size, 3))[:, :, 0]
    assert min(windows.shape[:2]) == 9
    for crop in crops:
        assert (windows == crop).all(axis=(2, 3, 4)).sum() == 1
    np.testing.assert_array_equal(crops, crop_function(settings)(image, 17))
    assert not np.array_equal(crops, crop_function(settings)(image, 18))
    fewer = CropSettings("random", size, (1.125,), crops_per_image=2, seed=3)
    np.testing.assert_array_equal(crops[:2], crop_function(fewer)(image, 17))


def test_random_crops_are_uniform_over_positions():
    image = picture(64, 64)  # resized to 72: 9 x 9 places
    settings = CropSettings("random", 64, (1.125,), crops_per_image=4000, seed=1)
    crops = crop_function(settings)(image, 0)
    resized = np.asarray(torchvision_resize(image, 72))
    place = {resized[y, x : x + 8].tobytes(): (y, x) for y in range(9) for x in range(9)}
    assert len(place) == 81
    places = [place[crop[0, :8].tobytes()] for crop in crops]
    counts = np.unique(places, axis=0, return_counts=True)[1]
    assert len(counts) == 81
    chi_squared = ((counts - 4000 / 81) ** 2 / (4000 / 81)).sum()
    assert chi_squared < 125  # 80 degrees of freedom: passed by 999 of 1000 fair draws


def test_flips_mirror_about_half_of_the_random_crops():
    image = picture(72, 72)
    crops = crop_function(CropSettings("random", 64, (1.125,), crops_per_image=200, flip=True))(image, 0)
    straight, mirrored = (
        np.lib.stride_tricks.sliding_window_view(np.asarray(version), (64, 64, 3))[:, :, 0].reshape(81, -1)
        for version in (image, ImageOps.mirror(image))
    )
    flipped = 0
    for crop in crops:
        is_straight, is_mirrored = (bool((found == crop.ravel()).all(1).any()) for found in (straight, mirrored))
        assert is_straight != is_mirrored
        flipped += is_mirrored
    assert 70 < flipped < 130


def test_one_centre_crop():
    image = picture(300, 200)
    crops = crop_function(CropSettings("none", 64))(image, 0)
    np.testing.assert_array_equal(crops, np.asarray(adm_square(image, 64))[None])
    assert crop_function(CropSettings("none", 8, mode="L"))(picture(20, 30, "L"), 0).shape == (1, 8, 8, 1)


@pytest.mark.parametrize(("mode", "form"), [("L", "PNG"), ("1", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("RGBA", "PNG"),
                                            ("CMYK", "JPEG"), ("RGB", "JPEG"), ("YCbCr", "JPEG")])  # fmt: skip
def test_eight_bit_modes_become_rgb(mode, form):
    encoded = content(picture(40, 30, mode), form)
    image, was = decode_image(encoded, "RGB", 90)
    assert was == ("RGB" if mode == "YCbCr" else mode)
    assert image.mode == "RGB" and image.size == (40, 30)
    np.testing.assert_array_equal(np.asarray(image), np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB")))


@pytest.fixture(scope="module")
def hundred_megapixels():
    return content(Image.new("1", (12500, 8000)))


def bad_images():
    jpeg = content(picture(200, 200), "JPEG")
    sixteen = Image.fromarray(np.full((20, 20), 40000, dtype=np.uint16))
    return {
        "zero bytes": (b"", "zero bytes"),
        "text": (b"<html>404</html>", "not an image that Pillow reads"),
        "truncated jpeg": (jpeg[: len(jpeg) // 2], "truncated"),
        "truncated png": (content(picture(90, 90))[:-4000], "truncated|broken|incomplete"),
        "truncated header": (jpeg[:12], "."),
        "16 bits": (content(sixteen), "8 bits"),
        "strip": (content(Image.new("L", (6000, 2))), "6000 x 2 is too elongated"),
    }


def test_orientation_is_followed_where_it_is_asked_for():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    jpeg = content(picture(240, 120), "JPEG", exif=exif)
    assert decode_image(jpeg, "RGB", 90.0)[0].size == (240, 120)  # as the originals read it
    assert decode_image(jpeg, "RGB", 90.0, upright=True)[0].size == (120, 240)
    settings = CropSettings("none", 64)
    assert "upright" not in settings.as_dict() and dataclasses.replace(settings, upright=True).as_dict()["upright"]


@pytest.mark.parametrize("name", bad_images())
def test_bad_images_give_one_line(name):
    encoded, message = bad_images()[name]
    with pytest.raises(UnreadableImage, match=message) as caught:
        decode_image(encoded, "RGB", 90)
    assert "\n" not in str(caught.value)


def test_a_hundred_megapixels_are_refused_before_they_are_decoded(hundred_megapixels, monkeypatch):
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded"))
    with pytest.raises(UnreadableImage, match=r"12500 x 8000 = 100 megapixels, more than 90 \(--max_megapixels\)"):
        decode_image(hundred_megapixels, "RGB", 90)


def test_a_hundred_megapixels_are_decoded_when_allowed(hundred_megapixels):
    allow_large_images()
    image, _ = decode_image(hundred_megapixels, "L", 101)
    assert crop_function(CropSettings("none", 64, mode="L"))(image, 0).shape == (1, 64, 64, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ten_crop", 64), "crop_ranges is empty"),
        (("random", 64, (1.1, 1.05)), "one range"),
        (("ten_crop", 64, (0.9,)), "below 1"),
    ],
)
def test_settings_that_do_not_fit_the_kind_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        CropSettings(*arguments)
