"""Masks: files, learning, metrics by hand, borders, and a run from files to predictions."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from scenes import draw
from tiny import vit, vpt_cli

from vpt import backbones
from vpt.data.masks import read_masks
from vpt.dense import artefact
from vpt.dense.canvas import Canvas
from vpt.dense.config import DenseTrainConfig, SegmentHeadConfig, load_dense
from vpt.dense.fit import fit
from vpt.dense.images import CanvasImages, MapSource
from vpt.dense.instances import border, objects_of
from vpt.dense.mask_metrics import Masked, mask_metrics, upper_bound
from vpt.dense.pyramid import Maps, attach
from vpt.dense.run import run
from vpt.dense.segmentation import Segmentation
from vpt.dense.segmenter import Segmenter
from vpt.errors import InputError

CANVAS = Canvas(160, 128)


def write_masks(root, kind="class", parts=None):
    """images/PART and masks/PART of drawn pictures: discs are 1, squares 2; or instances."""
    for part, pictures in (parts or {"train": draw(6), "test": draw(3, seed=2)}).items():
        for folder in ("images", "masks"):
            (root / folder / part).mkdir(parents=True)
        for number, (picture, _) in enumerate(pictures):
            pixels = np.asarray(picture).astype(int)
            mask = 1 * (pixels[..., 0] > 128) + 2 * (pixels[..., 1] > 128)
            if kind == "instance":
                from scipy import ndimage

                mask = ndimage.label(mask > 0)[0]
            picture.save(root / "images" / part / f"{number}.png")
            whole = Image.fromarray(mask.astype(np.uint16 if kind == "instance" else np.uint8))
            whole.save(root / "masks" / part / f"{number}.png")
    return root


def segmenter(method="bias_tuning", instances=False):
    torch.manual_seed(0)
    made = attach(backbones.adapt(vit()), method, ["disc", "square"], {})
    maps = Maps(made, None, (CANVAS.height, CANVAS.width))
    names = ["cell"] if instances else ["disc", "square"]
    return Segmenter(maps, names, SegmentHeadConfig(channels=32), instances).eval()


@pytest.mark.parametrize("kind", ["class", "instance"])
def test_drawn_masks_are_learned_and_kept(tmp_path, kind):
    data = read_masks(write_masks(tmp_path / "data", kind), kind)
    train, model = data.parts["train"], segmenter(instances=kind == "instance")
    pictures = CanvasImages(train.images, CANVAS, model.maps.method.backbone)
    task, config = Segmentation(), DenseTrainConfig(steps=160, lr=3e-3, warmup_steps=5)
    targets = task.targets(train, CANVAS, torch.device("cpu"))
    fit(model, MapSource(model.maps, pictures), targets, config, "both")
    metrics = task.metrics(model, task.outputs(model, pictures, train), train)
    assert metrics["dice"] > 0.85, metrics
    assert metrics["iou"] < metrics["dice"] <= metrics["upper_bound"] + 0.02
    if kind == "instance":
        assert metrics["ap50"] > 0.8 and metrics["counting_error"] < 0.5
    path = artefact.save(model, tmp_path / "a.safetensors", "bias_tuning", {})
    loaded = artefact.load(path, vit())
    images = torch.randn(2, 3, 128, 160)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), model(images), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model.fold()(images), model(images), rtol=1e-4, atol=1e-4)


def test_overlaps_by_hand():
    truth = [np.array([[1, 1, 0, 0]]), np.array([[2, 0, 255, 0]])]
    found = [Masked(np.array([[1, 0, 0, 0]]), None, np.empty(0)),
             Masked(np.array([[0, 0, 1, 0]]), None, np.empty(0))]  # fmt: skip
    metrics = mask_metrics(found, truth, ["a", "b"], "class", None)
    assert metrics["per_class"]["a"]["dice"] == pytest.approx(2 / 3)  # 255 does not count
    assert metrics["per_class"]["b"]["dice"] == 0
    assert metrics["iou"] == 0.25
    nothing = mask_metrics(found[1:], [np.zeros((1, 4), int)], ["a", "b"], "class", None)
    assert nothing["per_class"]["b"]["dice"] is None  # nowhere: no value, not 0 or 1


def test_objects_are_matched_by_their_pixels():
    truth = np.zeros((8, 8), int)
    truth[:4, :4], truth[5:, 5:] = 3, 9
    numbers = np.zeros((8, 8), int)
    numbers[:4, :4], numbers[5:, :2] = 1, 2
    found = [Masked((numbers > 0).astype(int), numbers, np.array([0.9, 0.8]))]
    metrics = mask_metrics(found, [truth], ["cell"], "instance", None)
    assert metrics["ap50"] == pytest.approx(51 / 101)  # one of two, at full precision
    assert metrics["counting_error"] == 0 and metrics["objects"] == 2


def test_touching_objects_have_a_border_and_come_apart_again():
    numbers = np.zeros((20, 30), np.int32)
    numbers[4:16, 4:15], numbers[4:16, 15:26] = 1, 2
    edge = border(numbers)
    assert edge[8, 14] and edge[8, 15] and not edge[8, 8] and not edge[4, 5]
    classes = np.where(numbers > 0, 1 + edge, 0)
    again, scores = objects_of(classes, np.ones(classes.shape))
    assert np.array_equal(again, numbers) and scores.tolist() == [1, 1]
    assert objects_of(np.zeros((4, 4), int), np.ones((4, 4)))[1].size == 0


def test_the_bound_falls_with_the_stride():
    checks = np.indices((128, 160)).sum(0) // 6 % 2
    canvas, names = Canvas(160, 128), ["cell"]
    bounds = [upper_bound([checks], canvas, stride, names, "class") for stride in (1, 2, 8)]
    assert bounds[0] > 0.99 and bounds[0] > bounds[1] > bounds[2]


def test_masks_that_do_not_fit_are_refused(tmp_path):
    root = write_masks(tmp_path / "a")
    (root / "masks/train/0.png").unlink()
    with pytest.raises(InputError, match="no one mask of this name"):
        read_masks(root, "class")
    Image.new("L", (9, 9)).save(root / "masks/train/0.png")
    with pytest.raises(InputError, match="mend it"):
        read_masks(root, "class")
    Image.new("RGB", (160, 128)).save(root / "masks/train/0.png")
    with pytest.raises(InputError, match="in colours"):
        read_masks(root, "class")
    with pytest.raises(InputError, match="1 names, but masks 2 classes"):
        read_masks(write_masks(tmp_path / "b"), "class", ["one"])
    with pytest.raises(InputError, match="no images/"):
        read_masks(tmp_path / "a" / "masks", "class")
    with pytest.raises(InputError, match=r"data\.masks is missing"):
        load_dense("segment", ["data.root=x"])


def test_white_masks_are_class_one(tmp_path):
    root = write_masks(tmp_path)
    for path in root.glob("masks/*/*.png"):
        Image.fromarray((np.asarray(Image.open(path)) > 0).astype(np.uint8) * 255).save(path)
    data = read_masks(root, "class")
    assert data.class_names == ["1"] and data.parts["train"].mask(0).max() == 1
    assert "255 is class 1" in data.notes[0]


def test_from_masks_to_predictions(tmp_path, capfd, monkeypatch):
    cli = partial(vpt_cli, capfd, monkeypatch)
    root, folder = write_masks(tmp_path / "cells"), tmp_path / "run"
    keys = ["backbone.name=tiny_clip", "train.steps=4", "segment.channels=32", f"data.root={root}"]
    keys += ["data.masks=class", "data.classes=[disc,square]", f"out={folder}"]
    code, _, err = cli("train", "segment", *keys, "method.name=vpt_deep")
    assert code == 0, err
    metrics = json.loads((folder / "result.json").read_text())
    assert {"dice", "dice_interval", "iou", "upper_bound", "num_test", "shots_per"} <= set(metrics)
    assert set(metrics["per_class"]) == {"disc", "square"}
    code, out, err = cli("eval", folder / "prompt.safetensors")
    assert code == 0 and f"dice                 {metrics['dice']:.4f}" in out
    picture, drawn = root / "images/test/0.png", tmp_path / "found"
    code, out, err = cli("predict", folder / "prompt.safetensors", picture, "--out", drawn)
    assert code == 0, err
    assert "disc " in out and Image.open(drawn / "0001-0-mask.png").size == (160, 128)
    again = run(load_dense(str(folder / "config.yaml")), resume=True, log=print)
    assert again == metrics
