"""Bad input through the command line: one line that names the culprit, exit code 1, no files."""

import os
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import vit, vpt_cli, write_folder, write_image

import vpt

TRAIN = [
    "train",
    "vpt_deep",
    "backbone.name=tiny_clip",
    "data.shots=2",
    "train.epochs=2",
    "train.min_steps=0",
]
NOTES = (
    "data: ",
    "backbone: ",
    "method: ",
    "trained in ",
    "testing on ",
)  # what a run says on its way


@pytest.fixture
def refused(tmp_path, capfd, monkeypatch):
    """Runs a command that must fail; gives its one line."""
    monkeypatch.chdir(tmp_path)

    def check(*arguments, code=1):
        found, out, err = vpt_cli(capfd, monkeypatch, *arguments)
        assert found == code, err
        assert out == ""
        *notes, last = err.splitlines()
        assert all(note.startswith(NOTES) for note in notes), err
        assert last.startswith("vpt: "), err
        assert not (tmp_path / "run").exists()
        assert not (tmp_path / "runs").exists()
        return last

    return check


@pytest.fixture
def images(tmp_path):
    return write_folder(tmp_path / "pets")


def missing(root):
    pass


def empty(root):
    root.mkdir()


def only_empty_classes(root):
    (root / "cat").mkdir(parents=True)
    (root / "dog").mkdir()


def empty_class(root):
    write_folder(root)
    (root / "bird").mkdir()


def images_without_classes(root):
    write_image(root / "a.png")


def one_class(root):
    write_folder(root, ["cat"])


def none_left_to_test(root):
    write_folder(root, count=2)


def truncated_jpeg(root):
    write_folder(root)
    path = write_image(root / "cat" / "bad.jpg", size=(200, 200))
    path.write_bytes(path.read_bytes()[:2000])


def text_as_jpeg(root):
    write_folder(root)
    (root / "cat" / "bad.jpg").write_text("hello")


def empty_png(root):
    write_folder(root)
    (root / "cat" / "bad.png").write_bytes(b"")


def broken_png(root):
    write_folder(root)
    path = write_image(root / "cat" / "bad.png")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


def train_and_test_differ(root):
    write_folder(root / "train")
    write_folder(root / "test", ["cat", "bird"])


def test_alone(root):
    write_folder(root / "test")


test_alone.__test__ = False


@pytest.mark.parametrize(
    ("make", "culprits"),
    [
        (missing, ["data.root=", "no such file or folder"]),
        (empty, ["no class folders", "one folder a class"]),
        (only_empty_classes, ["cat", "without images"]),
        (empty_class, ["bird", "without images"]),
        (images_without_classes, ["move them into one folder a class"]),
        (one_class, ["only one class", "'cat'"]),
        (none_left_to_test, ["the test part is empty"]),
        (truncated_jpeg, ["cat/bad.jpg", "replace or remove"]),
        (text_as_jpeg, ["cat/bad.jpg", "replace or remove"]),
        (empty_png, ["cat/bad.png", "replace or remove"]),
        (broken_png, ["cat/bad.png", "replace or remove"]),
        (train_and_test_differ, ["bird", "dog"]),
        (test_alone, ["test/", "train/"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_folders(tmp_path, refused, make, culprits):
    make(tmp_path / "data")
    line = refused(*TRAIN, f"data.root={tmp_path / 'data'}", "out=run")
    for culprit in culprits:
        assert culprit in line


@pytest.mark.parametrize(
    ("text", "culprits"),
    [
        ("path,age\na.png,7\n", ["line 1", "'label'"]),
        ("path,label\nnowhere.png,cat\n", ["line 2", "nowhere.png", "no such file"]),
        ("path,label,split\na.png,cat,trian\n", ["line 2", "'trian'"]),
        ("", ["line 1", "'path'"]),
        ("path,label\na.png,\n", ["line 2", "label is empty"]),
        ("path,label\na.png,cat\na.png,dog\n", ["line 3", "already in line 2"]),
    ],
)
def test_csv(tmp_path, refused, text, culprits):
    write_image(tmp_path / "a.png")
    (tmp_path / "labels.csv").write_text(text)
    line = refused(*TRAIN, "data.root=labels.csv", "out=run")
    for culprit in ["labels.csv", *culprits]:
        assert culprit in line


def test_npz(tmp_path, refused):
    (tmp_path / "scans.npz").write_bytes(b"PK\x03\x04 cut")
    assert "scans.npz: not a whole .npz" in refused(*TRAIN, "data.root=scans.npz", "out=run")
    np.savez(tmp_path / "scans.npz", images=np.zeros((2, 8, 8), np.uint8))
    assert "no train_images among images" in refused(*TRAIN, "data.root=scans.npz", "out=run")


def test_other_files_are_no_data(tmp_path, refused):
    (tmp_path / "pets.zip").write_bytes(b"PK")
    assert "pets.zip" in refused(*TRAIN, "data.root=pets.zip", "out=run")
    assert "data.root=PATH" in refused(*TRAIN, "out=run")


@pytest.mark.parametrize(
    ("override", "culprits"),
    [
        ("data.shot=2", ["'data.shot'", "'data.shots'"]),
        ("trian.lr=1", ["'trian'", "'train'"]),
        ("method.num_token=2", ["'num_token'", "'num_tokens'"]),
        ("method.name=vpt_deeep", ["'vpt_deeep'", "'vpt_deep'"]),
        ("method.name=_tokens", ["'_tokens'"]),
        ("method.num_tokens=ten", ["num_tokens", "'ten'"]),
        ("method.num_tokens=0", ["num_tokens=0"]),
        ("method.dropout=1.5", ["dropout=1.5", "less than 1"]),
        ("method.layers=[0, 99]", ["method.layers=[0, 99]", "0 to "]),
        ("data.shots=two", ["data.shots", "'two'"]),
        ("data.shots=0", ["data.shots=0"]),
        ("data.shots=null", ["data.shots=NUMBER"]),
        ("train.epochs=0", ["train.epochs=0"]),
        ("train.lr=-1", ["train.lr=-1"]),
        ("train.seed=-1", ["train.seed=-1"]),
        ("train.batch_size=1.5", ["train.batch_size=1.5"]),
        ("data.classes=[a, b, c]", ["data.classes", "3 names", "2 classes"]),
        ("data.classes=[a, a]", ["data.classes", "a"]),
        ("data.classes=cat", ["data.classes", "list"]),
        ("data.templates=[photo]", ["data.templates", "'photo'"]),
        ("data.name=digitz", ["'digitz'", "'digits'"]),
        ("data.name=digits", ["data.root", "data.name=digits", "drop one"]),
        ("data.name=npz", ["expects a .npz file, not a folder"]),
        ("backbone.name=tiny_clp", ["backbone.name=tiny_clp", "'tiny_clip'"]),
        ("backbone.checkpoint=nowhere.pth", ["nowhere.pth"]),
        ("train.lr", ["'train.lr'", "key=value"]),
        ("method.init=a photo", ["'init'"]),
    ],
    ids=str,
)
def test_settings(refused, images, override, culprits):
    line = refused(*TRAIN, f"data.root={images}", "out=run", override)
    for culprit in culprits:
        assert culprit in line


@pytest.mark.parametrize(
    ("overrides", "culprits"),
    [
        (["method.num_tokens=40"], ["does not fit", "32 tokens"]),
        (["data.classes=[cat, " + "very " * 40 + "long]"], ["does not fit", "32 tokens"]),
        (["backbone.name=vit_tiny_patch16_224", "backbone.checkpoint=vit.pth"], ["coop", "CLIP"]),
    ],
    ids=["num_tokens", "class_name", "no_clip"],
)
def test_coop(tmp_path, refused, images, overrides, culprits):
    import timm

    torch.save(timm.create_model("vit_tiny_patch16_224").state_dict(), tmp_path / "vit.pth")
    settings = ["method.name=coop", f"data.root={images}", "out=run", *overrides]
    line = refused(*TRAIN, *settings)
    for culprit in culprits:
        assert culprit in line


@pytest.mark.parametrize("template", ["a {name}", "a photo", "{} and {}"])
def test_templates(refused, images, template):
    settings = ["method.name=zero_shot", f"data.root={images}", "out=run"]
    assert repr(template) in refused(*TRAIN, *settings, f"method.templates=['{template}']")


@pytest.mark.parametrize(
    ("config", "culprits"),
    [
        ("vpt_deeep", ["'vpt_deeep'", "'vpt_deep'"]),
        ("nowhere.yaml", ["nowhere.yaml", "no such file"]),
        ("broken.yaml", ["broken.yaml", "not YAML"]),
        ("list.yaml", ["list.yaml", "not a mapping"]),
        ("binary.yaml", ["binary.yaml", "not YAML"]),
    ],
)
def test_configs(tmp_path, refused, config, culprits):
    (tmp_path / "broken.yaml").write_text("a: [1,\nb: 2")
    (tmp_path / "list.yaml").write_text("- a")
    (tmp_path / "binary.yaml").write_bytes(os.urandom(64) + b"\xff\x00")
    line = refused("train", config)
    for culprit in culprits:
        assert culprit in line


def test_out_that_is_a_file(tmp_path, refused, images):
    (tmp_path / "taken").write_text("mine")
    for out in ("taken", "taken/run"):
        assert "taken" in refused(*TRAIN, f"data.root={images}", f"out={out}")
    assert (tmp_path / "taken").read_text() == "mine"


@pytest.mark.parametrize("what", ["method", "dataset", "things"])
def test_list_of_what_there_is_not(refused, what):
    assert f"vpt list {what}" in refused("list", what)


@pytest.fixture
def artefact(tmp_path):
    """Of a backbone that nothing can load by name: images are checked before it is needed."""
    model = vpt.attach(vit(), "vpt_deep", class_names=["cat", "dog"])
    return vpt.save(model, tmp_path / "pets.safetensors")


@pytest.mark.parametrize("command", [["eval"], ["export", "--onnx"]], ids=lambda words: words[0])
def test_a_backbone_without_a_name(tmp_path, refused, artefact, command):
    said = refused(*command, artefact)
    assert f"{artefact}: backbone.name is missing: give backbone.name=VALUE" in said


def note(path):
    path.write_text("hello")


def none(path):
    pass


@pytest.mark.parametrize(
    ("make", "name", "culprits"),
    [
        (note, "note.txt", ["note.txt", "replace or remove"]),
        (note, "note.png", ["note.png", "replace or remove"]),
        (none, "nowhere.png", ["nowhere.png"]),
        (empty, "album", ["album", "no images in this folder"]),
    ],
    ids=["text", "text_as_png", "missing", "empty_folder"],
)
@pytest.mark.parametrize("options", [[], ["--json"]], ids=["plain", "json"])
def test_predict(tmp_path, refused, artefact, make, name, culprits, options):
    make(tmp_path / name)
    line = refused("predict", *options, artefact, name)
    for culprit in culprits:
        assert culprit in line


@pytest.mark.parametrize("command", ["predict", "eval"])
@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        (lambda content: None, "no such artefact"),
        (lambda content: content[:-10], "truncated"),
        (lambda content: b"hello", "not a safetensors file"),
        (lambda content: content[:-1] + b"\xff", "changed since it was written"),
    ],
    ids=["missing", "truncated", "text", "tampered"],
)
def test_artefacts(tmp_path, refused, artefact, command, change, culprit):
    write_image(tmp_path / "ok.png")
    changed = change(artefact.read_bytes())
    artefact.unlink() if changed is None else artefact.write_bytes(changed)
    arguments = ["ok.png"] if command == "predict" else []
    line = refused(command, artefact, *arguments)
    assert culprit in line
    assert "pets.safetensors" in line


@pytest.mark.parametrize(
    "arguments",
    [["train"], ["predict", "x.safetensors"], ["eval"], ["frobnicate"], ["train", "a", "--what"]],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(tmp_path, capfd, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    code, out, err = vpt_cli(capfd, monkeypatch, *arguments)
    assert code == 2
    assert out == ""
    assert "Usage: vpt" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("batch", "epochs", "what"), [(1, 4, "loss"), (32, 4, "loss"), (32, 2, "logits")]
)
def test_nan_keeps_the_last_good_prompt(tmp_path, capfd, monkeypatch, images, batch, epochs, what):
    run = partial(vpt_cli, capfd, monkeypatch)
    settings = [f"data.root={images}", f"out={tmp_path / 'run'}", f"train.batch_size={batch}"]
    settings += ["train.folds=null", "method.head=probe"]
    code, _, err = run(*TRAIN, *settings, "train.lr=3e37", f"train.epochs={epochs}")
    assert code == 1
    last = err.splitlines()[-1]
    assert last.startswith(f"vpt: the {what} ")  # the very last step breaks the logits only
    assert "lower train.lr" in last
    assert "prompt.safetensors" in last
    assert not (tmp_path / "run" / "result.json").exists()
    vpt.load(tmp_path / "run" / "prompt.safetensors")
    code, _, err = run(*TRAIN, *settings)
    assert code == 1
    assert "interrupted" in err


def test_an_image_of_sixteen_bits_with_impossible_values_is_named(tmp_path, refused, images):
    Image.fromarray(np.full((8, 8), -5, np.int32)).save(images / "cat" / "bad.tif")
    assert "bad.tif" in refused(*TRAIN, f"data.root={images}", "out=run")
