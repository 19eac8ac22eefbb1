"""One set of grey images, stored in several ways: the same result; what does not fit is said."""

import json
from functools import partial

import numpy as np
import pytest
from PIL import Image
from tiny import vpt_cli

from vpt import artifact

FAST = ["backbone.name=tiny_clip", "data.shots=4", "train.epochs=1", "train.min_steps=0"]
STORED = {
    "8": lambda grey: grey,
    "12": lambda grey: np.rint(grey * (4095 / 255)).astype(np.uint16),
    "float": lambda grey: grey.astype(np.float32),
}


@pytest.fixture(scope="module")
def pictures():
    """Noise around a class's own brightness: a classifier must see absolute values."""
    rng = np.random.default_rng(0)
    return {
        f"{name}/{i:02d}": rng.normal(mean, 45, (32, 32)).clip(0, 255).astype(np.uint8)
        for name, mean in (("dark", 100), ("bright", 120))
        for i in range(12)
    }


def write(root, pictures, stored):
    for name, grey in pictures.items():
        path = root / f"{name}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(STORED[stored](grey)).save(path)
    return root


@pytest.fixture
def cli(capfd, monkeypatch):
    return partial(vpt_cli, capfd, monkeypatch)


def train(cli, folder, root):
    code, _, err = cli("train", "linear_probe", *FAST, f"data.root={root}", f"out={folder}")
    assert code == 0, err
    return json.loads((folder / "result.json").read_text()), err


def probabilities(out):
    return [json.loads(line)["probabilities"]["dark"] for line in out.splitlines()]


def test_the_same_images_give_the_same_result(tmp_path, cli, pictures):
    results, predicted = {}, {}
    for stored in STORED:
        root = write(tmp_path / stored, pictures, stored)
        results[stored], err = train(cli, tmp_path / f"run{stored}", root)
        path = tmp_path / f"run{stored}" / "prompt.safetensors"
        known = artifact.read(path)[1]["preprocess"]
        full = {"8": None, "12": 4095, "float": 255}[stored]
        assert known.get("grey_range") == (full and [0, full])
        assert ("grey_range" in known) == (full is not None)  # 8 bits: as artefacts always were
        assert (f"values from 0 to {full}" in err) == (full is not None)
        code, out, err = cli("predict", "--json", path, root)
        assert (code, err) == (0, "")
        predicted[stored] = probabilities(out)
        code, out, err = cli("eval", path, f"data.root={root}")
        assert code == 0, err
        assert f"{results[stored]['accuracy']:.4f}" in out
    for stored in ("12", "float"):
        assert predicted[stored] == predicted["8"]
        for key in ("accuracy", "auroc", "ece", "macro_f1"):
            assert results[stored][key] == results["8"][key], key


def test_images_outside_the_range_are_said(tmp_path, cli, pictures):
    root = write(tmp_path / "12", pictures, "12")
    odd = np.full((32, 32), 300, np.uint16)
    odd[0] = 5000
    Image.fromarray(odd).save(root / "dark/zz.tif")
    _, err = train(cli, tmp_path / "run", write(tmp_path / "float", pictures, "float"))
    assert "do not fit" not in err
    artefact = tmp_path / "run" / "prompt.safetensors"
    line = "do not fit the training images' grey values, 0 to 255: first"
    code, out, err = cli("predict", artefact, root)
    assert code == 0 and len(out.splitlines()) == 25
    assert f"25 of 25 images {line}" in err and err.count("\n") == 1
    code, _, err = cli("explain", artefact, root / "dark/zz.tif", "--out", tmp_path / "explained")
    assert code == 0 and f"1 of 1 images {line} {root / 'dark/zz.tif'}, of 300 to 5000" in err
    code, _, err = cli("eval", artefact, "--all", f"data.root={root}")
    assert code == 0 and f"25 of 25 images {line}" in err


def test_values_that_no_training_image_explains_are_refused_before_training(
    tmp_path, cli, pictures
):
    root = tmp_path / "data"
    write(root / "train", pictures, "8")
    write(root / "test", {name: grey for name, grey in pictures.items() if "00" in name}, "8")
    Image.fromarray(np.full((8, 8), -1000, np.int32)).save(root / "test/dark/hu.tif")
    run = tmp_path / "run"
    code, _, err = cli("train", "linear_probe", *FAST, f"data.root={root}", f"out={run}")
    assert code == 1
    assert "hu.tif (grey values -1000 to -1000 are not within 0 to 65535)" in err
    assert not run.exists()
    # among the training images they are a range of their own
    Image.fromarray(np.full((8, 8), -1000, np.int32)).save(root / "train/dark/hu.tif")
    code, _, err = cli(
        "train", "linear_probe", *FAST, "data.shots=null", f"data.root={root}", f"out={run}"
    )
    assert code == 0 and "values from -1000 to -999" in err
