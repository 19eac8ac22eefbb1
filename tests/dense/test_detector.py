"""Detectors: bare and prompted maps, folding, learning, artefacts, and what they refuse."""

import numpy as np
import pytest
import timm
import torch
from scenes import CLASSES, draw, write_voc
from tiny import vit

from vpt import backbones
from vpt.config import load_run
from vpt.data.boxes import read_boxes
from vpt.dense import artefact
from vpt.dense.canvas import Canvas, choose_canvas
from vpt.dense.config import DenseTrainConfig, DetectHeadConfig
from vpt.dense.detection import Detection
from vpt.dense.detector import Detector, Objects
from vpt.dense.diagnose import diagnose, matchable
from vpt.dense.fit import fit
from vpt.dense.images import CanvasImages, Flip, MapSource
from vpt.dense.metrics import detection_metrics
from vpt.dense.pyramid import Maps, attach
from vpt.errors import InputError
from vpt.methods.base import Method

CANVAS = Canvas(160, 128)
SMALL = DetectHeadConfig(channels=32, convs=1)
STEPS = 150  # that overfit four pictures
METHODS = ["random_prompts", "vpt_deep", "vpt_shallow", "bias_tuning", "lora", "full_finetune"]


def detector(method="vpt_deep", model=None, **options):
    torch.manual_seed(0)
    made = attach(backbones.adapt(model or vit()), method, CLASSES, options)
    return Detector(Maps(made, None, (CANVAS.height, CANVAS.width)), CLASSES, SMALL).eval()


def images(count=2):
    return torch.randn(count, 3, CANVAS.height, CANVAS.width, generator=torch.manual_seed(1))


def targets(count=2):
    boxes = torch.tensor([[10.0, 10, 40, 44], [80, 60, 110, 100]])
    return [Objects(boxes, torch.tensor([0, 1]), torch.ones(2))] * count


def same(one, other):
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_prompts_that_are_nothing_leave_the_bare_maps(method):
    model, bare = detector(method), detector("head_only")
    own, frozen = model.maps(images()), bare.maps(images())
    assert own.shape == frozen.shape == (2, 64, 16, 20)
    if method == "random_prompts":
        assert not torch.allclose(own, frozen, atol=1e-3)
    elif "vpt" in method:
        assert not torch.allclose(own, frozen, atol=1e-3)
        gated = detector(method, gated=True)
        torch.testing.assert_close(gated.maps(images()), frozen, rtol=1e-5, atol=1e-5)
    else:
        torch.testing.assert_close(own, frozen, rtol=1e-5, atol=1e-5)


def test_bare_maps_are_the_models_own():
    model = vit()
    own = detector("head_only", model).maps(images())
    wide = timm.models.vision_transformer.VisionTransformer(
        img_size=(128, 160), patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5
    )
    resampled = {k: v for k, v in model.state_dict().items() if k != "pos_embed"}
    grid = model.pos_embed[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, (16, 20), mode="bicubic", antialias=True)
    pos = torch.cat([model.pos_embed[:, :1], grid.flatten(2).mT], 1)
    wide.load_state_dict(resampled | {"pos_embed": pos})
    maps = wide.eval().forward_intermediates(images(), norm=False, intermediates_only=True)
    normed = [torch.nn.functional.layer_norm(m.permute(0, 2, 3, 1), (32,)) for m in maps]
    torch.testing.assert_close(own, torch.cat(normed, -1).permute(0, 3, 1, 2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["head_only", *METHODS])
def test_steps_train_what_maps_depend_on_and_a_folded_model_finds_the_same(method):
    model = detector(method)
    source = MapSource(model.maps, Drawn())
    before = {name: tensor.clone() for name, tensor in model.artifact_tensors().items()}
    config = DenseTrainConfig(steps=3, batch_size=2, warmup_steps=0, method_lr=1e-2)
    records = fit(model, source, lambda index, flip: targets(1)[0], config, "horizontal")
    assert set(records[-1]) >= {"step", "loss", "classification", "bbox_regression", "seconds"}
    moved = {n for n, t in model.artifact_tensors().items() if not torch.equal(t, before[n])}
    assert any(name.startswith("fcos.backbone") for name in moved)
    assert any(name.startswith("fcos.head") for name in moved)
    frozen = method in {"head_only", "random_prompts"}
    assert model.maps.frozen == frozen
    assert any(name.startswith("maps.") for name in moved) != frozen
    assert not any("method.head" in name for name in before)  # the read-out of classes
    with torch.no_grad():
        for one, other in zip(model(images()), model.fold()(images()), strict=True):
            same(one, other)


class Drawn(list):
    """Noise in the place of image files."""

    def __init__(self):
        super().__init__(range(2))

    def batch(self, indices, flips=None):
        flips = flips or [Flip()] * len(indices)
        noise = images()[list(indices)]
        return torch.stack([n.flip(f.axes) for n, f in zip(noise, flips, strict=True)])


def test_kept_maps_are_the_computed_ones():
    model = detector("random_prompts")
    flips = [Flip(True), Flip(False, True)]
    source = MapSource(model.maps, Drawn())
    first, again = (source.batch([0, 1], flips) for _ in range(2))
    with torch.no_grad():
        computed = model.maps(Drawn().batch([0, 1], flips))
    torch.testing.assert_close(first, computed, rtol=1e-4, atol=1e-5)
    assert torch.equal(first, again)


def test_four_drawn_pictures_are_learned(tmp_path):
    data = read_boxes(write_voc(tmp_path, {"train": draw(4), "test": draw(1)}))
    train, kind, model = data.parts["train"], Detection(), detector("bias_tuning")
    pictures = CanvasImages(train.images, CANVAS, model.maps.method.backbone)
    config = DenseTrainConfig(steps=STEPS, lr=3e-3)
    boxes = kind.targets(train, CANVAS, torch.device("cpu"))
    fit(model, MapSource(model.maps, pictures), boxes, config, "both")
    found = kind.outputs(model, pictures, train)
    metrics = detection_metrics(found, train, CLASSES, 0.5, 100)
    assert metrics["ap50"] > 0.9, metrics


def test_boxes_turn_with_their_image(tmp_path):
    data = read_boxes(write_voc(tmp_path, {"train": draw(2), "test": draw(1)}))
    train, model = data.parts["train"], detector("head_only")
    pictures = CanvasImages(train.images, CANVAS, model.maps.method.backbone)
    boxes = Detection().targets(train, CANVAS, torch.device("cpu"))
    for flip in (Flip(), Flip(True), Flip(False, True), Flip(True, True)):
        (image,) = pictures.batch([0], [flip])
        background = image[:, 0, 0]
        for left, top, right, bottom in boxes(0, flip).boxes.round().int().tolist():
            inside = image[:, top:bottom, left:right]
            assert (inside[:, 8:-8, 8:-8] - background[:, None, None]).abs().amax(0).min() > 0.1


def test_an_artefact_is_the_detector_and_the_backbone_is_checked(tmp_path):
    model = detector("vpt_deep")
    model.threshold = 0.31
    path = artefact.save(model, tmp_path / "boxes.safetensors", "vpt_deep", {})
    loaded = artefact.load(path, vit())
    assert (loaded.threshold, loaded.class_names, loaded.maps.size) == (0.31, CLASSES, (128, 160))
    with torch.no_grad():
        for one, other in zip(model(images()), loaded(images()), strict=True):
            same(one, other)
    names = set(model.artifact_tensors())
    assert not any("backbone.model" in name for name in names)
    with pytest.raises(InputError, match="fingerprint"):
        artefact.load(path, vit(seed=1))
    import vpt

    with pytest.raises(InputError, match="its kind is detect"):
        vpt.load(path, backbone=vit())
    model = vpt.attach(vit(), num_classes=2)
    with pytest.raises(InputError, match="a classifier"):
        artefact.load(vpt.save(model, tmp_path / "classes.safetensors"), vit())


def test_the_shared_backbone_stays_as_it_is():
    model = vit()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    detector("full_finetune", model)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert model.patch_embed.img_size == (32, 32)


def test_what_puts_nothing_into_maps_is_refused():
    swin = timm.create_model("swin_tiny_patch4_window7_224", img_size=64, window_size=2)
    with pytest.raises(InputError, match="several widths"):
        detector("head_only", swin)
    with pytest.raises(InputError, match="changes pixels"):
        detector("pixel_prompts")
    made = attach(backbones.adapt(vit()), "head_only", CLASSES, {})
    with pytest.raises(InputError, match="from 0 to 1"):
        Maps(made, [2], (128, 160))


def test_a_read_out_of_one_class_and_own_layers():
    made = attach(backbones.adapt(vit()), "vpt_deep", ["cell"], {})
    maps = Maps(made, [1], (128, 160))
    assert maps.width == 32 and isinstance(made, Method)
    found = Detector(maps, ["cell"], SMALL).eval()(images())
    assert all((each.labels == 0).all() for each in found)


def test_the_canvas_keeps_aspects():
    backbone = backbones.adapt(vit())
    assert choose_canvas(backbone, [(640, 480)], 320) == (320, 240)  # multiples of 16
    assert choose_canvas(backbone, [(640, 480), (480, 640)], 320) == (320, 320)
    assert choose_canvas(backbone, [(640, 490)], None) == (320, 256)
    canvas = Canvas(320, 256)
    assert canvas.fitted((640, 480)) == (320, 240) and canvas.fitted((100, 400)) == (64, 256)
    mask = np.arange(12).reshape(3, 4)
    assert canvas.place_mask(mask, -1)[:240, :320].max() == 11
    clip = backbones.load("tiny_clip")
    assert choose_canvas(clip, [(640, 480)], None) == (32, 32)
    with pytest.raises(InputError, match="32 pixels alone"):
        choose_canvas(clip, [(640, 480)], 64)


def test_small_boxes_that_no_place_can_match_are_said(tmp_path):
    data = read_boxes(write_voc(tmp_path, {"train": draw(6), "test": draw(1)}))
    train = data.parts["train"]
    train.boxes[:] = [np.vstack([[[20, 20, 22, 22]], b]).astype(np.float32) for b in train.boxes]
    train.labels[:] = [np.concatenate([[0], each]) for each in train.labels]
    found = matchable(train, CANVAS, 16, 2)
    assert found[0] < 0.7 and found[1] == 1
    _, lines = diagnose(train, CANVAS, 16, CLASSES, fixed=False)
    assert lines[0].startswith("boxes that no place of the pyramid can match at 160 px: disc ")
    assert "would do" in lines[0]
    assert matchable(train, Canvas(640, 512), 16, 2)[0] == 1


def test_a_classifiers_configuration_is_another_kind():
    with pytest.raises(InputError, match="kind"):
        load_run("detect", ["data.root=x"])
