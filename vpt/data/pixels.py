"""Pixels of an image file as RGB: deep grey through one range, large images in bounded memory."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from threading import Lock
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

Range = tuple[float, float]  # lowest and highest grey value

MAX_PIXELS = 2**28  # decoded for one image at most: 1 GiB, for Pillow has 4 bytes a pixel
KEPT_PIXELS = 2**26  # larger images are reduced to these
_LARGE_PIXELS = 2**24  # threads decode one image of more at a time
_LARGE = Lock()
_STRIP_PIXELS = 2**22  # converted at a time

_ORIENTATION = 0x0112
_FULL = (1, 255, 1023, 4095, 16383, 65535)  # floats of 0–1, then 8 to 16 bits
_OVERSHOOT = 0.1  # of float values: interpolation goes beyond the values that it is of

Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit stops genuine slides: MAX_PIXELS is ours


def decode(
    file: BinaryIO,
    least: int | None = None,
    grey: Range | None = None,
    formats: Sequence[str] | None = None,
) -> tuple[Image.Image, Range | None]:
    """The image as RGB, and of grey with more than 8 bits (else None) its lowest and highest value.

    Upright by its EXIF orientation, transparency on white. An image of more than KEPT_PIXELS is
    reduced to them: JPEG and JPEG 2000 are decoded at a scale, of a TIFF pyramid a level is, and
    others are decoded whole and averaged.

    Args:
        file: opened for reading bytes.
        least: decode a JPEG at the smallest of its scales that leaves so many pixels a side.
        grey: the values that become 0 and 255, others are clipped; None: 0 and 65535, or of floats
            within 0–1 those, and no other value is allowed.
        formats: Pillow's names of those to try; None: all.

    Raises:
        ValueError: more than MAX_PIXELS to decode; grey values that are not allowed.
        Exception: anything, for decoders raise anything.
    """
    # No path: Pillow then maps a TIFF with an EXIF orientation with its sides swapped.
    with Image.open(file, formats=formats) as opened:
        check_pixels(_scale(opened, least))
        with _LARGE if opened.width * opened.height > _LARGE_PIXELS else nullcontext():
            opened.load()
            found = _extrema(opened) if _is_deep(opened) else None
            if found and grey is None:
                grey = _default_range(found)
            image = _rgb(opened, grey)
            orientation = opened.getexif().get(_ORIENTATION, 1)
    image.getexif()[_ORIENTATION] = orientation
    ImageOps.exif_transpose(image, in_place=True)
    return image, found


def check_pixels(number: int) -> None:
    """Refuses to decode so many pixels.

    Raises:
        ValueError: more than MAX_PIXELS.
    """
    if number > MAX_PIXELS:
        raise ValueError(
            f"{number:,} pixels to decode, more than {MAX_PIXELS:,}: save it smaller, or as a "
            "baseline JPEG, which is decoded at a scale"
        )


def choose_range(found: Iterable[Range]) -> Range | None:
    """The grey range of training images, from the lowest and highest value of each.

    From 0 to the most that floats of 0–1, 8, 10, 12, 14 or 16 bits hold, the first that holds all
    values; where none does, as with Hounsfield units, from the lowest value to the highest. None
    where no image has more than 8 bits.
    """
    found = list(found)
    if not found:
        return None
    low, high = min(low for low, _ in found), max(high for _, high in found)
    slack = _OVERSHOOT if isinstance(high, float) else 0
    if low >= -slack * high:
        for full in _FULL:
            if high <= (1 + slack) * full:
                return 0, full
    return low, max(high, low + 1)


def fits(values: Range, grey: Range) -> bool:
    """False if grey values are outside a range, or so low in it that all of them become black."""
    (low, high), (first, last) = values, grey
    black = low < high <= first + (last - first) / 255
    return first <= low and high <= last and not black


def _scale(opened: Image.Image, least: int | None) -> int:
    """Have a large image's decoder give fewer pixels, where it can; how many it holds."""
    width, height = opened.size
    scales = (scale for scale in (1, 2, 4) if width * height <= scale**2 * KEPT_PIXELS)
    scale = next(scales, 8)
    if least or scale > 1:
        opened.draft(None, (least, least) if least else (width // scale, height // scale))
    if scale > 1 and opened.format == "TIFF":
        _seek_level(opened)
    if scale > 1 and opened.format == "JPEG2000":
        opened.reduce = scale.bit_length() - 1
        return width * height // scale**2
    if "progressive" in opened.info:  # its decoder holds the whole image's coefficients
        return width * height
    return opened.width * opened.height


def _seek_level(opened: Image.Image) -> None:
    """Choose the level of a TIFF pyramid that is largest within KEPT_PIXELS, if it has one.

    Levels are pages of the first one's proportions.
    """
    width, height = opened.size
    levels = {}
    for page in range(1, opened.n_frames):
        opened.seek(page)
        pixels = opened.width * opened.height
        alike = math.isclose(opened.width / opened.height, width / height, rel_tol=0.01)
        if alike and KEPT_PIXELS // 64 <= pixels <= KEPT_PIXELS:
            levels[pixels] = page
    opened.seek(levels[max(levels)] if levels else 0)


def _rgb(image: Image.Image, grey: Range | None) -> Image.Image:
    """RGB of at most KEPT_PIXELS, by averaging; strip by strip, so that memory stays bounded."""
    factor = math.ceil(math.sqrt(image.width * image.height / KEPT_PIXELS))
    if factor == 1:
        return _convert(image, grey)
    small = Image.new("RGB", (-(-image.width // factor), -(-image.height // factor)))
    for top, strip in _strips(image, factor):
        small.paste(_convert(strip, grey).reduce(factor), (0, top // factor))
    return small


def _strips(image: Image.Image, factor: int = 1) -> Iterator[tuple[int, Image.Image]]:
    """(row, strip) from the top, of heights that `factor` divides."""
    rows = max(_STRIP_PIXELS // image.width // factor, 1) * factor
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _convert(image: Image.Image, grey: Range | None) -> Image.Image:
    if _is_deep(image):
        image = _grey8(image, grey)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        image = white
    return image.convert("RGB")


def _is_deep(image: Image.Image) -> bool:
    return image.mode.startswith(("I", "F"))  # I, I;16, I;16B, F


def _grey8(image: Image.Image, grey: Range) -> Image.Image:
    # Pillow's own conversion to 8 bits clips at 255, which turns a 16-bit scan white. The range is
    # the same for all images (not each one's own maximum), so that brightness stays comparable.
    low, high = grey
    shades = np.empty((image.height, image.width), np.uint8)
    for top, strip in _strips(image):
        values = (np.asarray(strip).astype(np.float64) - low) * 255 / (high - low)
        shades[top : top + strip.height] = np.rint(values.clip(0, 255))
    return Image.fromarray(shades)


def _extrema(image: Image.Image) -> Range:
    arrays = (np.asarray(strip) for _, strip in _strips(image))
    values = [value.item() for array in arrays for value in (array.min(), array.max())]
    if not all(map(math.isfinite, values)):
        raise ValueError("grey values that are no finite numbers")
    return min(values), max(values)


def _default_range(found: Range) -> Range:
    low, high = found
    full = (
        1 if isinstance(high, float) and high <= 1 else 65535
    )  # float files hold 0–1 or 16-bit values
    if not (low >= 0 and high <= full):
        raise ValueError(f"grey values {low:g} to {high:g} are not within 0 to 65535")
    return 0, full
