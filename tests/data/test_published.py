import json
import shutil

import numpy as np
import pytest
from PIL import Image

from vpt.config import DataConfig
from vpt.data import sources
from vpt.data.cards import load_card
from vpt.data.fewshot import split_shots
from vpt.data.sources import open_source
from vpt.errors import InputError

RNG = np.random.default_rng(0)
SIZES = {"train": 6, "val": 3, "test": 5}
LISTS = {"train": "train800", "val": "val200", "test": "test"}


@pytest.fixture
def small(monkeypatch):
    """Makes a card expect parts of SIZES, with `changes`; else the dump must be the full one."""

    def use(name, **changes):
        card = load_card(name).model_copy(update={"num_images": SIZES, **changes})
        monkeypatch.setattr(sources, "load_card", lambda name: card)
        return card

    return use


def draw(path, size=(32, 32)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(path)
    return path


def opened(root, name):
    return open_source(DataConfig(root=root, name=name, shots=None))


def refused(match, root, name):
    with pytest.raises(InputError, match=match) as caught:
        opened(root, name)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(load_card(name).get)


def write_vtab(root, classes=4, suffix="png", size=(32, 32), **lists):
    """The folder as it circulates: the 1,000 training images are there a second time."""
    both = []
    for part, stem in LISTS.items():
        rows = [(f"images/{stem}/{i:06d}.{suffix}", i % classes) for i in range(SIZES[part])]
        for file, _ in rows:
            draw(root / file, size)
        (root / f"{stem}.txt").write_text("".join(f"{file} {label}\n" for file, label in rows))
        if part != "test":
            both += [(file.replace(stem, "train800val200"), label) for file, label in rows]
    (root / "train800val200.txt").write_text("".join(f"{f} {label}\n" for f, label in both))
    for stem, text in lists.items():
        (root / f"{stem}.txt").write_text(text)
    return root


def test_vtab(tmp_path, small):
    small("vtab_kitti")
    source = opened(write_vtab(tmp_path), "vtab_kitti")
    assert {part: len(samples) for part, samples in source.parts.items()} == SIZES
    assert source.class_names == ["0", "1", "2", "3"]
    assert source.parts["train"].labels.tolist() == [0, 1, 2, 3, 0, 1]
    assert source.parts["test"].names[4] == "images/test/000004.png"
    assert source.parts["val"].read(0).size == (32, 32)


def test_vtab_takes_its_classes_from_the_card(tmp_path, small):
    card = small("vtab_svhn")
    assert opened(write_vtab(tmp_path), "vtab_svhn").class_names == card.classes


def test_vtab_trains_without_images_of_some_classes(tmp_path, small):
    small("vtab_sun397")
    source = opened(write_vtab(tmp_path), "vtab_sun397")
    split = split_shots(source, None, seed=1)
    assert [len(split.train), len(split.val), len(split.test)] == list(SIZES.values())
    with pytest.raises(InputError, match="class '4' has 0 images"):
        split_shots(source, 1, seed=1)


@pytest.mark.parametrize(
    ("lists", "match"),
    [
        ({"train800": "images/a.png\n"}, "train800.txt, line 1: 'images/a.png' is not a path and"),
        ({"val200": "images/a.png one\n"}, "val200.txt, line 1: .* is not a path and a label"),
        ({"test": "images/test/000000.png 4\n"}, "test.txt, line 1: .* and a label below 4"),
        ({"test": "images/none.png 0\n"}, "1 files of the test list are missing, first images/no"),
        ({"test": "images/val200/000000.png 0\n"}, "1 test images are in train or val, images/val"),
        ({"train800val200": "images/test/000000.png 0\n"}, "train800val200.txt: its labels are no"),
        ({"train800": "images/train800/000000.png 0\n", "train800val200": "a 0\nb 0\nc 1\nd 2\n"},
         "1 train images, not the published 6"),
    ],
)  # fmt: skip
def test_bad_vtab(tmp_path, small, lists, match):
    small("vtab_kitti")
    refused(match, write_vtab(tmp_path, **lists), "vtab_kitti")


def test_vtab_that_is_not_there(tmp_path):
    refused("no such file or folder", tmp_path / "cifar", "vtab_cifar100")
    refused("train800.txt: no such file", tmp_path, "vtab_cifar100")


def test_vtab_of_another_dump(tmp_path, small):
    refused("6 train images, not the published 800", write_vtab(tmp_path / "a"), "vtab_cifar100")
    small("vtab_cifar100")
    opened(tmp_path / "a", "vtab_cifar100")
    upscaled = write_vtab(tmp_path / "b", size=(224, 224))
    refused(
        "000000.png has .224, 224. pixels, the original images .32, 32", upscaled, "vtab_cifar100"
    )
    for suffix in ("jpg", "jpeg"):
        reencoded = write_vtab(tmp_path / suffix, suffix=suffix)
        refused(f"000000.{suffix} is a JPEG, which the original", reencoded, "vtab_cifar100")


def write_fgvc(root, folder):
    """VPT's JSON files, of class numbers that neither count from 0 nor follow each other."""
    for part, count in SIZES.items():
        files = {f"x{i % 2}/{part}{i}.jpg": (817, 1002)[i % 2] for i in range(count)}
        for file in files:
            draw(root / folder / file)
        (root / f"{part}.json").write_text(json.dumps(files))
    return root


@pytest.mark.parametrize("name", ["cub", "nabirds", "fgvc_flowers", "stanford_dogs", "fgvc_cars"])
def test_fgvc(tmp_path, small, name):
    card = small(name, num_classes=2)
    source = opened(write_fgvc(tmp_path, card.images), name)
    assert source.class_names == ["817", "1002"]
    assert {part: s.labels.tolist() for part, s in source.parts.items()} == {
        "train": [0, 1, 0, 1, 0, 1],
        "val": [0, 1, 0],
        "test": [0, 1, 0, 1, 0],
    }
    prefix = "" if card.images == "." else f"{card.images}/"
    assert source.parts["test"].names[0] == f"{prefix}x0/test0.jpg"


def test_fgvc_as_class_folders(tmp_path, small):
    small("cub", num_classes=2, num_images={"train": 2, "val": 2, "test": 2})
    for part in SIZES:
        for name in ("Auk", "Wren"):
            draw(tmp_path / part / name / "1.jpg")
    assert opened(tmp_path, "cub").class_names == ["Auk", "Wren"]
    shutil.rmtree(tmp_path / "val")
    refused("0 val images, not the published 2", tmp_path, "cub")


def test_bad_fgvc(tmp_path, small):
    refused("neither train.json nor train/", tmp_path, "cub")
    small("cub", num_classes=2)
    write_fgvc(tmp_path, "images")
    listed = json.loads((tmp_path / "val.json").read_text())
    for bad in ("[]", "{", '{"a.jpg": "wren"}'):
        (tmp_path / "val.json").write_text(bad)
        refused("val.json: not {", tmp_path, "cub")
    (tmp_path / "val.json").write_text(json.dumps(listed | {"x0/none.jpg": 817}))
    refused("1 files of the val list are missing, first images/x0/none.jpg", tmp_path, "cub")
    (tmp_path / "val.json").write_text(json.dumps({"x0/test0.jpg": 817}))
    refused("1 test images are in train or val, images/x0/test0.jpg", tmp_path, "cub")
    (tmp_path / "val.json").unlink()
    refused("val.json: no such file", tmp_path, "cub")


def test_number_of_classes(tmp_path, small):
    small("cub")
    refused("2 classes, not 200", write_fgvc(tmp_path, "images"), "cub")


def test_another_npz_under_a_card(tmp_path):
    path = tmp_path / "mine.npz"
    parts = {part: (np.zeros((n, 4, 4), np.uint8), np.arange(n) % 2) for part, n in SIZES.items()}
    np.savez(path, **{f"{part}_{key}": array for part, pair in parts.items()
                      for key, array in zip(("images", "labels"), pair, strict=True)})  # fmt: skip
    refused("6 train images, not the published 546", path, "breastmnist")
