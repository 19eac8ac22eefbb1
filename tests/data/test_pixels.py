"""Deep grey through the training images' range, and large images in bounded memory."""

import io

import numpy as np
import pytest
from PIL import Image

from vpt.data import pixels
from vpt.data.images import read_image
from vpt.data.pixels import choose_range, decode, fits
from vpt.data.survey import survey_images

RNG = np.random.default_rng(0)
GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    buffer.seek(0)
    return buffer


def shades(image):
    return np.asarray(image)[..., 0]


KINDS = {  # the same picture, and the range of it
    "8 bits in 16": (GREY.astype(np.uint16), 255),
    "10 bits": (np.rint(GREY * (1023 / 255)).astype(np.uint16), 1023),
    "12 bits": (np.rint(GREY * (4095 / 255)).astype(np.uint16), 4095),
    "14 bits": (np.rint(GREY * (16383 / 255)).astype(np.uint16), 16383),
    "16 bits": (GREY.astype(np.uint16) * 257, 65535),
    "32-bit integers": (GREY.astype(np.int32) * 257, 65535),
    "floats to 1": (GREY.astype(np.float32) / 255, 1),
    "floats to 255": (GREY.astype(np.float32), 255),
    "floats to 65535": (GREY.astype(np.float32) * 257, 65535),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_picture_gives_the_same_shades(kind):
    array, full = KINDS[kind]
    _, found = decode(encoded(Image.fromarray(array), "TIFF"), grey=(0, 1))
    assert found == (0, array.max())
    grey = choose_range([found])
    assert grey == (0, full)
    image, _ = decode(encoded(Image.fromarray(array), "TIFF"), grey=grey)
    assert (shades(image) == GREY).all()


@pytest.mark.parametrize(
    ("found", "grey"),
    [
        ([], None),
        ([(30, 900), (20, 3999), (0, 17)], (0, 4095)),  # one range for all
        ([(0, 4096)], (0, 16383)),
        ([(-0.02, 1.04)], (0, 1)),  # interpolation overshoots
        ([(-3.0, 262.5)], (0, 255)),
        ([(0, 256)], (0, 1023)),  # whole numbers do not
        ([(-1024, 3071), (-1000, 900)], (-1024, 3071)),  # Hounsfield units
        ([(-2.5, 3.1)], (-2.5, 3.1)),  # standardised
        ([(0, 100_000)], (0, 100_000)),
        ([(0, 0)], (0, 1)),
        ([(-5, -5)], (-5, -4)),
    ],
    ids=str,
)
def test_range_of_training_images(found, grey):
    assert choose_range(found) == grey


def test_a_range_maps_its_ends_to_0_and_255_and_clips():
    units = Image.fromarray(np.array([[-2000, -1024, 1024, 3071, 4000]], np.int32))
    image, _ = decode(encoded(units, "TIFF"), grey=(-1024, 3071))
    assert shades(image).tolist() == [[0, 0, 128, 255, 255]]


@pytest.mark.parametrize("kind", ["RGB", "L"])
def test_images_of_8_bits_have_no_range(kind):
    image = Image.fromarray(np.stack([GREY] * 3, -1)).convert(kind)
    found, values = decode(encoded(image, "PNG"), grey=(0, 4095))
    assert values is None
    assert (shades(found) == GREY).all()


def test_what_fits_a_range():
    assert fits((0, 4095), (0, 4095)) and fits((7, 7), (0, 4095)) and fits((0, 0), (0, 4095))
    assert not fits((0, 4096), (0, 4095)) and not fits((-1, 9), (0, 255))
    assert not fits((0.0, 1.0), (0, 4095))  # another scale: all of it is black


def test_images_that_are_all_dark_are_of_another_scale(tmp_path):
    for name, scale in (("a", 1), ("b", 4)):
        Image.fromarray(GREY.astype(np.uint16) * scale).save(tmp_path / f"{name}.png")
    paths, said = sorted(tmp_path.iterdir()), []
    survey_images(paths[:1]).through((0, 4095), said.append)
    assert said.pop().startswith("1 of 1 images do not fit the training images' grey values")
    survey_images(paths).through((0, 4095), said.append)  # one of them is not
    assert said == []


def test_survey_says_what_does_not_fit(tmp_path):
    arrays = {"a": GREY.astype(np.uint16), "b": GREY.astype(np.uint16) * 20, "c": GREY}
    for name, array in arrays.items():
        Image.fromarray(array).save(tmp_path / f"{name}.png")
    Image.fromarray(GREY.astype(np.float32) - 9).save(tmp_path / "d.tif")
    paths = sorted(tmp_path.iterdir())
    survey, said = survey_images(paths), []
    assert list(survey.grey.values()) == [(0, 255), (0, 5100), (-9, 246)]
    assert survey.through((-9, 5100), said.append).readable == paths
    assert said == []
    assert survey.through((0, 4095), said.append).readable == paths
    assert said.pop() == (
        "2 of 4 images do not fit the training images' grey values, 0 to 4095: "
        f"first {paths[1]}, of 0 to 5100"
    )
    assert survey.through(None, said.append).readable == paths[:3]  # -9 needs a range
    assert said.pop().startswith("2 of 4 images have more than 8 bits")


# A size that is small here stands for what is large in memory.
@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(pixels, "KEPT_PIXELS", 64 * 64)
    monkeypatch.setattr(pixels, "MAX_PIXELS", 4 * 64 * 64)
    monkeypatch.setattr(pixels, "_STRIP_PIXELS", 1000)
    monkeypatch.setattr(pixels, "_LARGE_PIXELS", 1000)


def gradient(width, height):
    ramp = np.add.outer(np.linspace(0, 127, height), np.linspace(0, 127, width))
    return Image.fromarray(ramp.astype(np.uint8))


def near(found, expected, most=4):
    assert found.size == expected.size
    assert np.abs(np.asarray(found).astype(int) - np.asarray(expected.convert("RGB"))).max() <= most


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "BMP", "PPM", "GIF"])
def test_large_images_are_averaged(small, kind):
    image = gradient(128, 120)
    near(decode(encoded(image, kind))[0], image.reduce(2))


@pytest.mark.parametrize("mode", ["1", "P", "RGBA", "LA", "CMYK", "I;16", "F"])
def test_large_images_of_every_mode(small, mode):
    image = gradient(101, 127)
    if mode == "I;16":
        stored = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    elif mode == "F":
        stored = Image.fromarray(np.asarray(image).astype(np.float32) / 255)
    else:
        stored = image.convert("RGB").convert(mode)
    expected = image if mode in {"I;16", "F"} else stored.convert("RGB")
    near(decode(encoded(stored, "TIFF"))[0], expected.reduce(2), most=6)


def test_large_images_are_turned_upright(small):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be rotated by 90° clockwise
    image = gradient(128, 100)
    for kind in ("PNG", "JPEG", "TIFF", "WEBP"):
        found = decode(encoded(image, kind, exif=exif))[0]
        near(found, image.transpose(Image.Transpose.ROTATE_270).reduce(2), most=8)


@pytest.mark.parametrize(("side", "found"), [(64, 64), (65, 33), (256, 64), (512, 64), (1000, 63)])
def test_jpeg_is_decoded_at_a_scale(small, side, found):
    image = decode(encoded(gradient(side, side), "JPEG"))[0]
    assert image.size == (found, found)


def test_jpeg_2000_is_decoded_at_a_scale(small):
    image = gradient(512, 512)
    near(decode(encoded(image, "JPEG2000"))[0], image.reduce(8), most=8)


def test_a_level_of_a_pyramid_is_read(small):
    levels = [gradient(400, 400), Image.new("L", (60, 20)), *(gradient(s, s) for s in (50, 25))]
    file = encoded(levels[0], "TIFF", save_all=True, append_images=levels[1:])
    near(decode(file)[0], levels[2])


def test_pages_of_a_document_are_no_levels(small):
    pages = [gradient(128, 128), gradient(64, 100), gradient(128, 128)]
    file = encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    near(decode(file)[0], pages[0].reduce(2))


@pytest.mark.parametrize(
    "file",
    [
        encoded(gradient(129, 128), "PNG"),
        encoded(gradient(129, 128), "TIFF"),
        encoded(gradient(129, 128), "JPEG", progressive=True),  # coefficients of all of it
    ],
    ids=["png", "tiff", "progressive"],
)
def test_what_is_too_large_to_decode_is_refused(small, file):
    with pytest.raises(ValueError, match=r"16,512 pixels to decode, more than 16,384: save it"):
        decode(file)


def test_slides_above_pillows_limit_are_read(tmp_path, recwarn):
    """182 megapixels of one bit, which Pillow refuses, and of a JPEG."""
    path = tmp_path / "slide.png"
    Image.new("1", (13500, 13500), 1).save(path, compress_level=1)
    image = read_image(path)
    assert image.size == (6750, 6750)
    assert image.getextrema() == ((255, 255),) * 3
    assert not recwarn.list


def test_a_png_of_400_megapixels_is_refused_before_it_is_decoded(tmp_path):
    path = tmp_path / "big.png"
    Image.new("1", (20000, 20000)).save(path, compress_level=1)
    found = survey_images([path])
    assert "400,000,000 pixels to decode, more than 268,435,456" in found.broken[path]
