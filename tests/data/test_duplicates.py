import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from vpt.config import DataConfig
from vpt.data.duplicates import find_duplicates
from vpt.data.fewshot import Split, split_shots
from vpt.data.images import Samples
from vpt.data.sources import open_source
from vpt.errors import InputError

RNG = np.random.default_rng(0)
PICTURES = [
    Image.fromarray(RNG.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize(size, 3)
    for size in [(400, 300), (128, 96), (64, 48), (32, 24)] * 3
]
COPIES = {
    "same": lambda image, path: image.save(path.with_suffix(".png")),
    "jpeg": lambda image, path: image.save(path.with_suffix(".jpg"), quality=50),
    "half": lambda image, path: image.reduce(2).save(path.with_suffix(".png")),
    "double": lambda image, path: ImageOps.scale(image, 2).save(path.with_suffix(".jpg")),
}


def files(folder):
    paths = sorted(folder.iterdir())
    return Samples(paths, np.zeros(len(paths), np.int64), [path.name for path in paths])


def arrays(part, images):
    return Samples(
        images, np.zeros(len(images), np.int64), [f"{part}/{i}" for i in range(len(images))]
    )


@pytest.fixture
def train(tmp_path):
    folder = tmp_path / "train"
    folder.mkdir()
    for i, picture in enumerate(PICTURES):
        picture.save(folder / f"{i:02d}.png")
    return files(folder)


@pytest.mark.parametrize("kind", COPIES)
def test_copies_are_found(tmp_path, train, kind):
    folder = tmp_path / "test"
    folder.mkdir()
    for i, picture in enumerate(PICTURES):
        COPIES[kind](picture, folder / f"{i:02d}")
    pairs = find_duplicates(Split(train, None, files(folder), ""))
    assert {pair.test[:2]: pair.train[:2] for pair in pairs} == {
        f"{i:02d}": f"{i:02d}" for i in range(len(PICTURES))
    }
    bits = [pair.bits for pair in pairs]
    assert bits == sorted(bits) and (kind != "same" or set(bits) == {0})


def test_other_pictures_are_not_and_validation_counts_as_seen(train):
    one, other = train.take(range(0, 12, 2)), train.take(range(1, 12, 2))
    assert find_duplicates(Split(one, None, other, "")) == []
    assert len(find_duplicates(Split(one, other, other, ""))) == 6


def test_calibration_is_held_against_training_and_seen_before_the_test(train):
    one, other = train.take(range(0, 12, 2)), train.take(range(1, 12, 2))
    assert len(find_duplicates(Split(one, None, other, "", calibration=one))) == 6
    assert len(find_duplicates(Split(one, None, other, "", calibration=other))) == 6
    assert find_duplicates(Split(one.take([0, 1]), None, other, "", one.take([2, 3]))) == []


def test_arrays():
    images = RNG.integers(0, 256, (20, 28, 28), dtype=np.uint8)
    copied = np.concatenate([RNG.integers(0, 256, (5, 28, 28), dtype=np.uint8), images[[7]]])
    pairs = find_duplicates(Split(arrays("train", images), None, arrays("test", copied), ""))
    assert pairs == [("test/5", "train/7", 0)]


def test_blank_images_are_copies_of_nothing():
    grey = np.full((2, 28, 28), 7, np.uint8)
    some = np.concatenate([RNG.integers(0, 256, (3, 28, 28), dtype=np.uint8), grey])
    parts = arrays("train", some), arrays("test", some)
    pairs = find_duplicates(Split(parts[0], None, parts[1], ""))
    assert [pair.test for pair in pairs] == ["test/0", "test/1", "test/2"]
    assert find_duplicates(Split(arrays("train", grey), None, parts[1], "")) == []
    assert find_duplicates(Split(parts[0], None, arrays("test", grey), "")) == []


def test_small_pictures_that_resemble_each_other_are_not_copies():
    source = open_source(DataConfig(name="digits"))
    assert find_duplicates(split_shots(source, 16, seed=1)) == []


def test_an_image_that_cannot_be_read_is_named(tmp_path, train):
    train.images[3].write_bytes(b"")
    with pytest.raises(InputError, match=r"03\.png: not an image"):
        find_duplicates(Split(train, None, train, ""))


@pytest.mark.skipif("VPT_REAL_DATA" not in os.environ, reason="VPT_REAL_DATA is not set")
@pytest.mark.parametrize(("name", "count"), [("breastmnist", 39), ("pneumoniamnist", 0)])
def test_real_medmnist(name, count):
    source = open_source(DataConfig(root=Path(os.environ["VPT_REAL_DATA"]) / f"{name}.npz"))
    assert len(find_duplicates(split_shots(source, None, seed=1))) == count
