"""Layouts are found by file, also one's own: recognised, read and trained on."""

import importlib
import inspect
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny import vpt_cli, write_image

from vpt import resources
from vpt.config import DataConfig
from vpt.data import layouts
from vpt.data.cards import load_card
from vpt.data.sources import open_source
from vpt.errors import InputError

PUBLISHED = [
    "digits",
    "fgvc",
    "notebook",
    "vtab",
    "zhou",
]  # only their cards can say how they are read
LINES = '''"""A list `labels.txt` of lines PART FILE CLASS."""

from pathlib import Path

from vpt.data.cards import Card
from vpt.data.images import samples_of
from vpt.data.layouts import Read

ROOT = "folder"


def recognise(root: Path) -> bool:
    return (root / "labels.txt").is_file()


def read(root: Path, card: Card) -> Read:
    rows = [line.split() for line in (root / "labels.txt").read_text().splitlines()]
    names = sorted({name for _, _, name in rows})
    files = {part: [(file, names.index(name)) for p, file, name in rows if p == part]
             for part in ("train", "test")}
    return names, {part: samples_of(root, listed) for part, listed in files.items()}
'''


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Puts a layout, a module of that name and text, beside the package's."""
    folder = tmp_path / "own"
    folder.mkdir()
    monkeypatch.setattr(layouts, "__path__", [*layouts.__path__, str(folder)])
    added = []

    def add(name, text=LINES):
        (folder / f"{name}.py").write_text(text)
        importlib.invalidate_caches()
        added.append(name)

    yield add
    for name in added:
        sys.modules.pop(f"{layouts.__name__}.{name}", None)


@pytest.fixture
def listed(tmp_path):
    """Images of two classes in one folder, with their list."""
    root = tmp_path / "listed"
    lines = []
    for part, count in (("train", 3), ("test", 4)):
        for label, name in enumerate(("cat", "dog")):
            for i in range(count):
                file = write_image(root / "images" / f"{part}{i}{name}.png", label, i)
                lines.append(f"{part} {file.relative_to(root)} {name}\n")
    (root / "labels.txt").write_text("".join(lines))
    return root


@pytest.mark.parametrize("name", layouts.names())
def test_every_layout_says_what_its_root_is_and_leaves_other_files_alone(tmp_path, name):
    layout = layouts.find(name)
    assert layout.__doc__
    assert layout.ROOT in {None, "folder"} or layout.ROOT.startswith(".")
    assert list(inspect.signature(layout.recognise).parameters) == ["root"]
    assert list(inspect.signature(layout.read).parameters) == ["root", "card"]
    (tmp_path / "file.zip").touch()
    assert layout.recognise(tmp_path / "file.zip") is False


def test_the_shared_modules_are_no_layouts():
    assert {load_card(name).layout for name in resources.names("datasets")} <= {*layouts.names()}
    assert not [name for name in layouts.names() if name.startswith("_")]
    assert (Path(layouts.__file__).parent / "_files.py").is_file()


@pytest.mark.parametrize(
    ("file", "name"), [("a.csv", "csv"), ("b.CSV", "csv"), ("a.npz", "npz"), ("c.NPZ", "npz")]
)
def test_files_are_recognised_by_their_suffix_and_folders_are_not(tmp_path, file, name):
    (tmp_path / file).touch()
    assert layouts.recognise(tmp_path / file) == name
    (tmp_path / "x" / file).mkdir(parents=True)
    assert layouts.recognise(tmp_path / "x" / file) == "folder"


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_only_a_card_explains_needs_the_name_of_one(tmp_path, name):
    for file in ("split_zhou_X.json", "train800.txt", "val200.txt", "test.txt", "train.json",
                 "val.json", "test.json"):  # fmt: skip
        (tmp_path / file).touch()
    assert layouts.recognise(tmp_path) == "folder"
    if name not in {"digits", "notebook"}:
        with pytest.raises(InputError, match=f"no '{name}' in datasets/"):
            open_source(DataConfig(root=tmp_path, name=name))


def test_an_own_layout_is_recognised_before_folder_and_read(own, listed):
    write_image(listed / "more" / "x.png")  # a folder of class folders, too
    assert open_source(DataConfig(root=listed)).name == "folder"
    own("lines")
    source = open_source(DataConfig(root=listed))
    assert (source.name, source.card.layout) == ("lines", "lines")
    assert source.class_names == ["cat", "dog"]
    assert source.parts["train"].labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert source.parts["test"].names[0] == "images/test0cat.png"
    (listed / "labels.txt").unlink()
    assert open_source(DataConfig(root=listed)).name == "folder"


def test_an_own_layout_is_found_by_name(own, listed, tmp_path, monkeypatch):
    named = {"root": listed, "name": "lines"}
    with pytest.raises(InputError, match="no 'lines' in datasets/"):
        open_source(DataConfig(**named))
    own("lines")
    assert open_source(DataConfig(**named)).class_names == ["cat", "dog"]
    with pytest.raises(InputError, match="no 'lines' in datasets/"):
        open_source(DataConfig(root=tmp_path, name="lines"))  # it has no such layout

    shutil.copytree(resources.folder("datasets"), tmp_path / "datasets")
    card = (tmp_path / "datasets/folder.yaml").read_text()
    card = card.replace("layout: folder", "layout: lines\nmedical: true")
    (tmp_path / "datasets/scans.yaml").write_text(card)
    monkeypatch.setattr(resources, "_PACKAGE", tmp_path)
    source = open_source(DataConfig(root=listed, name="scans"))
    assert (source.name, source.card.layout, source.medical) == ("scans", "lines", True)


def test_two_layouts_that_recognise_a_root_are_told_apart_by_name(own, listed):
    own("lines")
    own("rows")
    with pytest.raises(
        InputError, match=r"listed: has the layouts lines and rows: give data\.name=NAME"
    ):
        open_source(DataConfig(root=listed))
    assert open_source(DataConfig(root=listed, name="rows")).name == "rows"


def test_an_own_layout_of_a_file_counts_among_those_that_are_known(own, tmp_path):
    text = LINES.replace('"folder"', '".lst"').replace('(root / "labels.txt").is_file()', "False")
    own("lines", text)
    (tmp_path / "x.zip").touch()
    with pytest.raises(InputError, match=r"not a folder, \.csv or \.lst or \.npz: unpack it"):
        open_source(DataConfig(root=tmp_path / "x.zip"))


def test_an_own_layout_is_trained_on_and_evaluated(own, listed, tmp_path, capfd, monkeypatch):
    own("lines")
    run = tmp_path / "run"
    fast = ["backbone.name=tiny_clip", "data.shots=2", f"data.root={listed}", f"out={run}"]
    code, _, err = vpt_cli(capfd, monkeypatch, "train", "linear_probe", *fast)
    assert code == 0, err
    result = json.loads((run / "result.json").read_text())
    assert (result["data"], result["num_test"]) == ("lines", 8)
    code, out, err = vpt_cli(capfd, monkeypatch, "eval", run / "prompt.safetensors")
    assert code == 0, err
    assert f"{result['accuracy']:.4f}" in out


def test_a_notebook_holds_the_digits_in_ink():
    """Every page is light, lines and ink on it, and darkest where the digit is brightest."""
    pages, digits = (open_source(DataConfig(name=name)) for name in ("notebook_digits", "digits"))
    ours, theirs = pages.parts["all"], digits.parts["all"]
    assert ours.images.shape == (1797, 32, 32, 3)
    assert ours.names == theirs.names
    assert (ours.labels == theirs.labels).all()
    assert ours.images.reshape(1797, -1).mean(1).min() > 128
    ink = 255 - ours.images.min(-1).reshape(1797, 8, 4, 8, 4).mean((2, 4))
    same = [
        np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(ink, theirs.images, strict=True)
    ]
    assert np.mean(same) > 0.9
