import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from medmnist import INFO
from PIL import Image

from vpt.config import DataConfig
from vpt.data import sources
from vpt.data.cards import Card, load_card
from vpt.data.sources import open_source
from vpt.errors import InputError


def draw(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), "red").save(path)


def class_folders(root, classes, per_class=2):
    draw(*(root / name / f"{i}.png" for name in classes for i in range(per_class)))


def opened(root=None, **options):
    return open_source(DataConfig(root=root, **options))


def refused(match, root=None, **options):
    with pytest.raises(InputError, match=match) as caught:
        opened(root, **options)
    assert "\n" not in str(caught.value)


def test_needs_no_torch():
    code = "import vpt.data.cards, vpt.data.sources, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_digits():
    source = opened(name="digits")
    samples = source.parts["all"]
    assert source.class_names[:2] == ["zero", "one"] and len(source.class_names) == 10
    assert samples.images.shape == (1797, 8, 8) and samples.images.dtype == np.uint8
    assert np.unique(samples.images)[[0, 1, 7, 16]].tolist() == [0, 16, 112, 255]  # rounded
    assert samples.names[17] == "all/17" and samples.labels.dtype == np.int64
    refused("reads no files", Path("x"), name="digits")


# folder


def test_folder_of_classes(tmp_path):
    class_folders(tmp_path, ["b", "B c", "10", "9"])
    draw(tmp_path / "b/deeper/x.JPG", tmp_path / ".hidden/x.png", tmp_path / "__MACOSX/x.png")
    source = opened(tmp_path)
    assert (source.name, source.class_names) == ("folder", ["10", "9", "B c", "b"])
    samples = source.parts["all"]
    assert samples.names[-3:] == ["b/0.png", "b/1.png", "b/deeper/x.JPG"]
    assert samples.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 3]
    assert samples.images[0] == tmp_path / "10/0.png"


@pytest.mark.parametrize("val", ["val", "valid", "validation", "Val"])
def test_folder_of_parts(tmp_path, val):
    for part in ("train", val, "test"):
        class_folders(tmp_path / part, ["a", "b"])
    source = opened(tmp_path)
    assert set(source.parts) == {"train", "val", "test"}
    assert source.parts["val"].names[0] == f"{val}/a/0.png"


def test_train_without_test_has_no_split(tmp_path):
    class_folders(tmp_path / "train", ["a", "b"])
    assert opened(tmp_path).parts.keys() == {"all"}


def test_train_and_val_alone_hold_out_val(tmp_path):
    for part in ("train", "val"):
        class_folders(tmp_path / part, ["a", "b"])
    parts = opened(tmp_path).parts
    assert parts.keys() == {"train", "test"} and parts["test"].names[0] == "val/a/0.png"
    class_folders(tmp_path / "valid", ["a", "b"])
    refused("two folders for one part, train, val, valid", tmp_path)


def test_a_class_may_be_called_test(tmp_path):
    class_folders(tmp_path, ["control", "test"])
    assert opened(tmp_path).class_names == ["control", "test"]


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    class_folders(tmp_path / "x", ["a", "b"])
    assert opened(Path("~/x")).class_names == ["a", "b"]


def test_bad_folders(tmp_path):
    refused("data.root=.*nowhere: no such", tmp_path / "nowhere")
    refused("give data.root=PATH")
    (tmp_path / "flat").mkdir()
    refused("flat: no class folders", tmp_path / "flat")
    draw(tmp_path / "flat/1.png")
    refused("flat: the images lie directly in it", tmp_path / "flat")
    class_folders(tmp_path / "one", ["only"])
    refused("only one class, 'only'", tmp_path / "one")
    class_folders(tmp_path / "hole", ["a", "b"])
    (tmp_path / "hole/empty").mkdir()
    refused("hole/empty: class folder without images", tmp_path / "hole")
    class_folders(tmp_path / "differ/train", ["a", "b", "c"])
    class_folders(tmp_path / "differ/test", ["a", "b", "d"])
    refused("train and test differ: only one of them has c, d", tmp_path / "differ")
    class_folders(tmp_path / "tests/test", ["a", "b"])
    refused("test/ but no train/", tmp_path / "tests")
    draw(tmp_path / "file.png")
    refused("not a folder, .csv or .npz", tmp_path / "file.png")
    refused("name=folder expects a folder, not a .png", tmp_path / "file.png",
            name="folder")  # fmt: skip


# csv


def write_csv(root, text, images="abcd"):
    draw(*(root / f"{name}.png" for name in images))
    path = root / "labels.csv"
    path.write_bytes(text.encode())
    return path


def test_csv(tmp_path):
    other = tmp_path / "other/e.png"
    draw(other)
    text = f"\ufeffpath, label ,patient\r\na.png,cat,p1\r\n./b.png,dog,p2\r\n{other},cat,p1\r\n"
    path = write_csv(tmp_path / "here", text)
    source = opened(path)
    samples = source.parts["all"]
    assert (source.name, source.class_names) == ("csv", ["cat", "dog"])
    assert samples.names == ["a.png", "b.png", "../other/e.png"]
    assert samples.labels.tolist() == [0, 1, 0] and samples.patients == ["p1", "p2", "p1"]
    assert samples.read(2).size == (4, 4)


def test_csv_with_split_and_numbers(tmp_path):
    text = "path,label,split\na.png,10,train\nb.png,9,train\nc.png,9,val\nd.png,10,test\n"
    source = opened(write_csv(tmp_path, text))
    assert source.class_names == ["9", "10"]
    assert source.parts["train"].labels.tolist() == [1, 0]
    assert source.parts["test"].names == ["d.png"] and source.parts["val"].patients is None


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "line 1: no column 'path' in ''"),
        ("path;label\na.png;x\n", "line 1: no column 'path' in 'path;label'"),
        ("path,class\na.png,x\n", "line 1: no column 'label'"),
        ("path,label\n", "no line for training"),
        ("path,label\na.png,x\nnone.png,y\n", "line 3: none.png: no such file"),
        ("path,label\na.png,x\nb.png\n", "line 3: label is empty"),
        ("path,label\n,x\n", "line 2: path is empty"),
        ("path,label,split\na.png,x,tset\n", "line 2: split='tset'"),
        ("path,label,split\na.png,x,\n", "line 2: split=''"),
        ("path,label,split\na.png,x,test\n", "no line for training"),
        ("path,label,split\na.png,x,train\n./a.png,x,test\n", "line 3: a.png is already in line 2"),
        ("path,label,patient\na.png,x,\n", "line 2: patient is empty"),
    ],
)
def test_bad_csv(tmp_path, text, match):
    refused(f"labels.csv.*{match}", write_csv(tmp_path, text))


def test_csv_that_is_not_text(tmp_path):
    path = write_csv(tmp_path, "")
    path.write_bytes(b"path,label\n\xff\xfe,x\n")
    refused("not CSV in UTF-8", path)


# npz


def arrays(**changes):
    values = {}
    for part, count in (("train", 6), ("val", 2), ("test", 4)):
        values[f"{part}_images"] = np.zeros((count, 5, 5), np.uint8)
        values[f"{part}_labels"] = np.arange(count, dtype=np.uint8)[:, None] % 2
    values.update(changes)
    return {key: value for key, value in values.items() if value is not None}


def write_npz(path, **changes):
    np.savez(path, **arrays(**changes))
    return path


def test_npz(tmp_path):
    source = opened(write_npz(tmp_path / "mine.npz"))
    assert (source.name, source.class_names) == ("npz", ["0", "1"])
    assert source.parts["train"].labels.tolist() == [0, 1] * 3
    assert source.parts["test"].names == [f"test/{i}" for i in range(4)]
    without = write_npz(tmp_path / "b.npz", val_images=None, val_labels=None)
    assert opened(without).parts.keys() == {"train", "test"}


@pytest.mark.parametrize("stem", ["pneumoniamnist_224", "pneumoniamnist_64"])
def test_npz_takes_the_card_of_its_file_name(tmp_path, monkeypatch, stem):
    monkeypatch.setattr(sources, "_check_sums", lambda root, card: None)
    monkeypatch.setattr(sources, "_check_dump", lambda parts, card, where: None)
    source = opened(write_npz(tmp_path / f"{stem}.npz"))
    assert source.name == "pneumoniamnist" and source.class_names == source.card.classes
    assert opened(write_npz(tmp_path / "digits.npz")).name == "npz"


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"test_images": None}, "no test_images among test_labels, train_images"),
        ({"val_labels": None}, "no val_labels"),
        ({"train_images": np.zeros((6, 5, 5))}, r"train_images is float64 \(6, 5, 5\)"),
        ({"train_images": np.zeros((6, 5, 5, 4), np.uint8)}, r"train_images is uint8 \(6, 5, 5, 4"),
        ({"train_labels": np.zeros((6, 3), np.uint8)}, "parts have different numbers of columns"),
        (
            {"train_labels": np.full((6, 3), 2)},
            "train_labels has several columns: all must",
        ),
        (
            {"train_labels": np.zeros((5, 3), np.uint8)},
            "train_labels is uint8 .*must be 6 integers",
        ),
        ({"train_labels": np.zeros(5, np.uint8)}, "train_labels is uint8 .*must be 6 integers"),
        ({"train_labels": np.zeros(6)}, "train_labels is float64"),
        ({"train_labels": np.full(6, -1)}, "label -1: labels must count from 0"),
        ({"extra": np.array([object()])}, "not a whole .npz file of plain arrays"),
    ],
)
def test_bad_npz(tmp_path, changes, match):
    refused(match, write_npz(tmp_path / "x.npz", **changes))


def test_npz_that_is_none(tmp_path):
    path = write_npz(tmp_path / "x.npz")
    whole = path.read_bytes()
    for content in (b"", b"hello", whole[: len(whole) // 2]):
        path.write_bytes(content)
        refused("x.npz: not a whole .npz file", path)
    np.save(tmp_path / "y.npy", np.zeros(3))
    (tmp_path / "y.npy").rename(path)
    refused("x.npz: not a whole .npz file", path)


def test_the_medmnist_packages_download_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    refused("data.name=breastmnist needs data.root", name="breastmnist")
    (tmp_path / ".medmnist").mkdir()
    monkeypatch.setattr(sources, "_check_dump", lambda parts, card, where: None)
    monkeypatch.setattr(sources, "_check_sums", lambda root, card: None)
    for size, file in ((5, "breastmnist"), (9, "breastmnist_224"), (12, "bloodmnist_224")):
        images = {f"{part}_images": np.zeros((count, size, size), np.uint8)
                  for part, count in (("train", 6), ("val", 2), ("test", 4))}  # fmt: skip
        write_npz(tmp_path / f".medmnist/{file}.npz", **images)
    assert opened(name="breastmnist").parts["train"].images.shape == (6, 9, 9)


def test_a_download_that_was_cut_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".medmnist").mkdir()
    write_npz(tmp_path / ".medmnist/breastmnist_64.npz")
    refused("breastmnist_64.npz: checksum md5:.* differs from the published", name="breastmnist")


def test_sums_and_counts_are_those_of_the_medmnist_package():
    for name in (name for name in INFO if not name.endswith("3d")):
        card, published = load_card(name), INFO[name]
        assert card.num_images == published["n_samples"]
        assert card.checksums == {
            f"{name}{size}.npz": f"md5:{published[f'MD5{size}']}"
            for size in ("", "_64", "_128", "_224")
        }


@pytest.mark.skipif("VPT_REAL_DATA" not in os.environ, reason="VPT_REAL_DATA is not set")
@pytest.mark.parametrize(
    ("name", "counts"), [("breastmnist", [546, 78, 156]), ("pneumoniamnist", [4708, 524, 624])]
)
def test_real_medmnist(name, counts):
    source = opened(Path(os.environ["VPT_REAL_DATA"]) / f"{name}.npz")
    assert source.name == name and len(source.class_names) == 2
    assert [len(samples) for samples in source.parts.values()] == counts
    assert source.parts["train"].read(0).size == (28, 28)


# cards


CARD = Card(title="t", source="s", licence="l", get="get it there", layout="zhou", split="s",
            split_file="split_zhou_X.json", images="pics")  # fmt: skip


def use_card(monkeypatch, **changes):
    monkeypatch.setattr(sources, "load_card", lambda name: CARD.model_copy(update=changes))


def write_zhou(root, **changes):
    split = {
        "train": [["dog/1.png", 1, "big_dog"], ["cat/1.png", 0, "cat"]],
        "val": [["cat/2.png", 0, "cat"]],
        "test": [["dog/2.png", 1, "big_dog"]],
    }
    draw(*(root / "pics" / row[0] for part in split.values() for row in part))
    split.update(changes)
    (root / "split_zhou_X.json").write_text(json.dumps(split))


def test_zhou(tmp_path, monkeypatch):
    use_card(monkeypatch, num_classes=2)
    write_zhou(tmp_path)
    source = opened(tmp_path, name="x")
    assert source.class_names == ["cat", "big_dog"]
    assert source.parts["train"].names == ["pics/dog/1.png", "pics/cat/1.png"]
    assert source.parts["train"].labels.tolist() == [1, 0]
    assert source.parts["test"].read(0).size == (4, 4)


def test_bad_zhou(tmp_path, monkeypatch):
    use_card(monkeypatch)
    refused("name=x needs data.root=PATH: get it there", name="x")
    refused("no such file or folder: get it there", tmp_path / "none", name="x")
    refused("split_zhou_X.json: no such file: get it there", tmp_path, name="x")
    write_zhou(tmp_path, val=[["gone.png", 0, "cat"]])
    refused("1 files of the val list are missing, first pics/gone.png: get", tmp_path, name="x")
    write_zhou(tmp_path, train=[["dog/1.png", 3, "dog"]])
    refused("labels are not 0 to", tmp_path, name="x")
    write_zhou(tmp_path, train=[["dog/1.png"]])
    refused("split_zhou_X.json: not ", tmp_path, name="x")
    (tmp_path / "split_zhou_X.json").write_text("{")
    refused("split_zhou_X.json: not ", tmp_path, name="x")
    use_card(monkeypatch, num_classes=37)
    write_zhou(tmp_path)
    refused("2 classes, not 37: get it there", tmp_path, name="x")


def test_npz_with_several_labels_an_image(tmp_path):
    labels = {
        f"{part}_labels": np.eye(3, dtype=np.uint8)[np.arange(count) % 3]
        for part, count in (("train", 6), ("val", 2), ("test", 4))
    }
    path = write_npz(tmp_path / "x.npz", **labels)
    source = opened(path)
    assert source.target.name == "multilabel" and source.class_names == ["0", "1", "2"]
    assert source.parts["train"].labels.dtype == np.float32
    assert np.array_equal(source.parts["test"].labels, labels["test_labels"])
    turned = opened(path, classes=["2", "0", "1"])
    assert np.array_equal(turned.parts["test"].labels, labels["test_labels"][:, [2, 0, 1]])


def test_root_of_the_wrong_kind(tmp_path):
    path = write_npz(tmp_path / "x.npz")
    refused("name=folder expects a folder, not a .npz file", path, name="folder")
    refused("name=npz expects a .npz file, not a folder", tmp_path, name="npz")
    refused("name=csv expects a .csv file, not a .npz file", path, name="csv")


def test_checksums_of_what_is_there(tmp_path, monkeypatch):
    class_folders(tmp_path, ["a", "b"])
    archive = tmp_path / "x.zip"
    archive.write_bytes(b"content")
    right = "sha256:" + hashlib.sha256(b"content").hexdigest()
    use_card(monkeypatch, layout="folder", checksums={"x.zip": right, "absent.zip": right})
    assert opened(tmp_path, name="x").class_names == ["a", "b"]
    archive.write_bytes(b"damaged")
    refused("x.zip: checksum sha256:.* differs from the published sha256:", tmp_path, name="x")
    path = write_npz(tmp_path / "x.npz")
    use_card(monkeypatch, layout="npz", checksums={"x.npz": "md5:0", "x.zip": right})
    refused("x.npz: checksum md5:.* differs from the published md5:0: download", path, name="x")


def test_card_names_of_classes(tmp_path, monkeypatch):
    class_folders(tmp_path, ["n01", "n02"])
    use_card(monkeypatch, layout="folder", classes=["tench", "goldfish"])  # names for codes
    assert opened(tmp_path, name="x").class_names == ["tench", "goldfish"]
    use_card(monkeypatch, layout="folder", classes=["n02", "n01"])  # the folders' order counts
    assert opened(tmp_path, name="x").class_names == ["n01", "n02"]
    use_card(monkeypatch, layout="folder", classes=["n01", "cat"])
    refused("classes differ from the card's: cat, n02", tmp_path, name="x")


def test_configuration_overrides_the_card(tmp_path):
    class_folders(tmp_path, ["a", "b"])
    source = opened(tmp_path)
    assert (source.templates, source.augment) == (source.card.templates, source.card.augment)
    source = opened(tmp_path, classes=["x", "y"], templates=["the {}"], augment="crop")
    assert source.class_names == ["x", "y"]
    assert (source.templates, source.augment) == (["the {}"], "crop")
    refused("data.classes has 3 names, but the data has 2 classes", tmp_path, classes=["x"] * 3)
    for templates in (["a photo"], ["{} {}"], ["ok {}", "no"], []):
        refused("data.templates: .* needs {} once", tmp_path, templates=templates)
