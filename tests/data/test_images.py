import io
import itertools
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from vpt.data.images import Samples, array_to_image, read_image
from vpt.data.survey import check_images
from vpt.errors import InputError

GREY = np.arange(0, 256, dtype=np.uint8).reshape(16, 16)
RGB = np.stack([GREY, GREY.T, 255 - GREY], axis=-1)


def saved(path, image, **options):
    image.save(path, **options)
    return path


def encoded(image, kind="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(path):
    image = read_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


def test_rgb_and_grey_are_exact(tmp_path):
    assert (pixels(saved(tmp_path / "a.png", Image.fromarray(RGB))) == RGB).all()
    assert (pixels(saved(tmp_path / "b.png", Image.fromarray(GREY))) == GREY[..., None]).all()
    bits = Image.fromarray(GREY).convert("1")
    assert (pixels(saved(tmp_path / "c.png", bits)) == np.asarray(bits)[..., None] * 255).all()


@pytest.mark.parametrize(
    ("kind", "order"),
    [("png", "<u2"), ("png", ">u2"), ("tif", "<u2"), ("tif", ">u2"), ("pgm", "<u2")],
)
def test_16_bit_grey_is_scaled_from_its_full_range(tmp_path, kind, order):
    wide = (GREY.astype(np.uint16) * 257).astype(order)
    path = saved(tmp_path / f"a.{kind}", Image.fromarray(wide))
    assert (pixels(path) == GREY[..., None]).all()


def test_32_bit_and_float_grey(tmp_path):
    wide = Image.fromarray(GREY.astype(np.int32) * 257)
    assert (pixels(saved(tmp_path / "a.tif", wide)) == GREY[..., None]).all()
    for scale in (1 / 255, 257):  # 0–1, and 16-bit values
        image = Image.fromarray(GREY.astype(np.float32) * np.float32(scale))
        assert (pixels(saved(tmp_path / "b.tif", image)) == GREY[..., None]).all()


@pytest.mark.parametrize("value", [-1024.0, 70000.0, float("nan")])
def test_grey_values_of_unknown_range_are_refused(tmp_path, value):
    path = saved(tmp_path / "hu.tif", Image.fromarray(np.full((2, 2), value, dtype=np.float32)))
    with pytest.raises(InputError, match=r"hu.tif: not an image that can be read \(grey values"):
        read_image(path)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_composited_on_white(tmp_path, mode):
    image = Image.new("RGBA", (2, 1), (10, 10, 10, 0))
    image.putpixel((1, 0), (10, 10, 10, 255))
    found = pixels(saved(tmp_path / "a.png", image.convert(mode)))
    assert found.tolist() == [[[255] * 3, [10] * 3]]


def test_palettes_with_and_without_transparency(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([9, 0, 0, 0, 9, 0])
    image.putpixel((1, 0), 1)
    assert pixels(saved(tmp_path / "a.png", image)).tolist() == [[[9, 0, 0], [0, 9, 0]]]
    assert pixels(saved(tmp_path / "b.gif", image)).tolist() == [[[9, 0, 0], [0, 9, 0]]]
    found = pixels(saved(tmp_path / "c.png", image, transparency=0))
    assert found.tolist() == [[[255] * 3, [0, 9, 0]]]


def test_cmyk_jpeg_has_the_colours_of_its_rgb(tmp_path):
    red = Image.new("RGB", (16, 16), (220, 30, 30))
    path = saved(tmp_path / "a.jpg", red.convert("CMYK"), quality=100)
    assert np.abs(pixels(path).astype(int) - [220, 30, 30]).max() <= 4


@pytest.mark.parametrize(
    ("suffix", "dtype"),
    [("jpg", "u1"), ("webp", "u1"), *itertools.product(["png", "tif"], ["u1", "<u2", ">u2"])],
)
def test_exif_orientation_is_applied(tmp_path, suffix, dtype):
    white = np.iinfo(dtype).max
    image = Image.fromarray(np.repeat([[0, 0, white], [0, 0, 0]], 16, axis=1).astype(dtype))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90° clockwise
    path = saved(tmp_path / f"a.{suffix}", image, exif=exif)
    found = pixels(path)[8::16, :, 0] // 128
    assert found.tolist() == [[0, 0], [0, 0], [0, 1]]


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "bmp", "webp", "tif"])
def test_one_pixel(tmp_path, suffix):
    path = saved(tmp_path / f"a.{suffix}", Image.new("RGB", (1, 1), "white"))
    assert pixels(path).shape == (1, 1, 3)
    check_images([path])


def bomb():
    header = struct.pack(">IIBBBBB", 40000, 40000, 8, 2, 0, 0, 0)
    png = encoded(Image.new("RGB", (1, 1)), "PNG")
    chunk = b"IHDR" + header
    return png[:8] + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + png[33:]


BAD = {
    "missing": None,
    "empty": b"",
    "text": b"not an image",
    "truncated jpeg": encoded(Image.fromarray(RGB).resize((99, 99)))[:-100],
    "truncated png": encoded(Image.effect_noise((32, 32), 50), "PNG")[:500],
    "header only": encoded(Image.fromarray(RGB))[:20],
    "bomb": bomb(),
}


@pytest.mark.parametrize("content", BAD.values(), ids=BAD.keys())
def test_unreadable_files_are_named_in_one_line(tmp_path, content):
    path = tmp_path / "bad.jpg"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(
        InputError, match=r"bad.jpg: not an image that can be read \(.+\): repl"
    ) as caught:
        read_image(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"1 of 1 images can't be read: .*bad.jpg \("):
        check_images([path])


def test_the_reason_does_not_repeat_the_path(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_text("text")
    with pytest.raises(InputError, match=r"a.jpg: .* read \(no known image format\): replace"):
        read_image(path)


def test_a_folder_is_not_an_image(tmp_path):
    with pytest.raises(InputError, match="not an image"):
        read_image(tmp_path)


def test_check_images_names_three_and_counts(tmp_path):
    good = saved(tmp_path / "good.jpg", Image.fromarray(RGB))
    bad = [tmp_path / f"{i}.jpg" for i in range(5)]
    seen = []
    with pytest.raises(InputError, match="5 of 6 images can't be read") as caught:
        check_images([good, *bad], progress=lambda done, total: seen.append((done, total)))
    assert str(bad[2]) in str(caught.value) and str(bad[3]) not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert seen == [(i, 6) for i in range(1, 7)]
    with pytest.raises(InputError, match=r"2\.jpg \(No such file or directory\), …: replace"):
        check_images(bad)
    check_images([good])


def test_arrays():
    assert (np.asarray(array_to_image(RGB)) == RGB).all()
    for grey in (GREY, GREY[..., None]):
        assert (np.asarray(array_to_image(grey)) == GREY[..., None]).all()
    for wrong in (RGB.astype(np.float32), RGB[..., :2], GREY[0]):
        with pytest.raises(InputError, match="expects uint8"):
            array_to_image(wrong)


@pytest.mark.parametrize(("least", "side"), [(None, 256), (200, 256), (40, 64), (32, 32), (1, 32)])
def test_jpeg_is_decoded_at_the_smallest_scale_that_is_enough(tmp_path, least, side):
    path = saved(tmp_path / "a.jpg", Image.fromarray(RGB).resize((256, 256)))
    assert read_image(path, least).size == (side, side)
    assert read_image(saved(tmp_path / "a.png", Image.open(path)), least).size == (256, 256)


def test_samples_join():
    parts = [
        Samples(
            np.full((2, 4, 4), i, np.uint8), np.array([i, 0]), [f"{i}a", f"{i}b"], [f"p{i}"] * 2
        )
        for i in (1, 2)
    ]
    both = parts[0].join(parts[1])
    assert both.names == ["1a", "1b", "2a", "2b"] and both.patients == ["p1", "p1", "p2", "p2"]
    assert both.labels.tolist() == [1, 0, 2, 0]
    assert both.images[:, 0, 0].tolist() == [1, 1, 2, 2]


def test_samples_take_and_read(tmp_path):
    paths = [saved(tmp_path / f"{i}.png", Image.fromarray(GREY + i)) for i in range(3)]
    files = Samples(paths, np.arange(3), ["a", "b", "c"], ["p", "q", "r"]).take([2, 0])
    array = Samples(np.stack([GREY, GREY + 1, GREY + 2]), np.arange(3), ["a", "b", "c"]).take(
        [2, 0]
    )
    for samples in (files, array):
        assert len(samples) == 2
        assert samples.labels.tolist() == [2, 0] and samples.names == ["c", "a"]
        assert (np.asarray(samples.read(0))[..., 0] == GREY + 2).all()
    assert files.patients == ["r", "p"] and array.patients is None
    assert len(files.take([])) == len(array.take([])) == 0
