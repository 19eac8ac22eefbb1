import json
import pickle

import numpy as np
import pytest
import timm
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from vpt.data.transforms import Preprocess, augmentation
from vpt.errors import InputError

RNG = np.random.default_rng(0)
IMAGES = [
    Image.fromarray(RNG.integers(0, 256, (*size, 3), dtype=np.uint8))
    for size in ((50, 71), (300, 260), (224, 224), (1, 1))
]
VALUES = {
    "image_size": 32,
    "interpolation": "bicubic",
    "crop_pct": 0.9,
    "crop_mode": "center",
    "mean": (0.5, 0.4, 0.3),
    "std": (0.2, 0.3, 0.25),
}


def assert_equal_transforms(preprocess, transform):
    crop = preprocess.crop()
    for image in IMAGES:
        array = crop(image)
        assert array.dtype == np.uint8 and array.shape == (preprocess.image_size,) * 2 + (3,)
        found = preprocess.normalize(torch.from_numpy(array))
        torch.testing.assert_close(found, transform(image), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [{}, {"crop_mode": "squash"}, {"crop_mode": "border"}, {"interpolation": "bilinear"}],
    ids=str,
)
def test_same_as_timm(changes):
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, depth=1)
    model.pretrained_cfg.update(changes)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    preprocess = Preprocess.from_timm(model)
    assert preprocess.crop_pct == 0.9
    assert_equal_transforms(preprocess, transform)


@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [224, (64, 64)])
def test_same_as_open_clip(resize_mode, size, interpolation):
    cfg = {"size": size, "resize_mode": resize_mode, "interpolation": interpolation}
    transform = image_transform_v2(PreprocessCfg(**cfg), is_train=False)
    assert_equal_transforms(Preprocess.from_open_clip(cfg), transform)


def test_model_made_with_another_size():
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, img_size=64, depth=1)
    assert Preprocess.from_timm(model).image_size == 64


def test_what_is_not_supported():
    model = timm.create_model("vit_tiny_patch16_224", img_size=(64, 32), depth=1)
    with pytest.raises(InputError, match="3×64×32 images"):
        Preprocess.from_timm(model)
    for cfg in ({"size": (32, 64)}, {"resize_mode": "longest"}):
        with pytest.raises(InputError, match="not supported"):
            Preprocess.from_open_clip(cfg)


def test_normalize_takes_batches():
    preprocess = Preprocess(**VALUES)
    batch = torch.from_numpy(RNG.integers(0, 256, (2, 5, 4, 3), dtype=np.uint8))
    found = preprocess.normalize(batch)
    assert found.shape == (2, 3, 5, 4) and found.dtype == torch.float32 and found.is_contiguous()
    expected = (batch[1, 2, 3].double() / 255 - torch.tensor([0.5, 0.4, 0.3])) / torch.tensor(
        [0.2, 0.3, 0.25]
    )
    torch.testing.assert_close(found[1, :, 2, 3].double(), expected, rtol=0, atol=1e-6)


def test_dict_and_back():
    preprocess = Preprocess(**VALUES)
    values = json.loads(json.dumps(preprocess.to_dict()))
    assert Preprocess.from_dict(values) == preprocess
    assert values.keys() == VALUES.keys()  # without a grey range, as it always was
    deep = Preprocess(**VALUES, grey_range=(0, 4095))
    assert deep.to_dict()["grey_range"] == [0, 4095]
    assert Preprocess.from_dict(json.loads(json.dumps(deep.to_dict()))) == deep
    with pytest.raises(InputError, match="preprocessing: unknown key 'crop'; did you mean"):
        Preprocess.from_dict({**values, "crop": 1})
    with pytest.raises(InputError, match="preprocessing: std is missing"):
        Preprocess.from_dict({k: v for k, v in values.items() if k != "std"})
    with pytest.raises(InputError, match="preprocessing: image_size='big'"):
        Preprocess.from_dict({**values, "image_size": "big"})


@pytest.mark.parametrize("kind", ["crop", "crop_flip"])
def test_augmentation(kind):
    augment = augmentation(kind, Preprocess(**VALUES))
    ramp = np.repeat(np.arange(0, 200, 2, dtype=np.uint8)[None, :, None], 60, axis=0)
    ramp = np.repeat(ramp, 3, axis=2)  # brighter to the right
    flipped, crops = 0, []
    for seed in range(40):
        augment.set_random_seed(seed)
        crop = augment(image=ramp)["image"]
        assert crop.shape == (32, 32, 3) and crop.dtype == np.uint8
        flipped += int(crop[0, 0, 0] > crop[0, -1, 0])
        crops.append(crop)
        augment.set_random_seed(seed)
        assert (augment(image=ramp)["image"] == crop).all()
    assert not all((crop == crops[0]).all() for crop in crops)
    assert 8 < flipped < 32 if kind == "crop_flip" else flipped == 0
    assert pickle.loads(pickle.dumps(augment))(image=ramp)["image"].shape == (32, 32, 3)


def drawn(augment, image, count):
    for seed in range(count):
        augment.set_random_seed(seed)
        yield augment(image=image)["image"].astype(float)


def test_crops_are_those_of_imagenet_training():
    """Areas spread over 8 to 100 % of the image, sides 3:4 to 4:3: torchvision's defaults."""
    image = np.zeros((250, 250, 3), np.uint8)
    image[..., 0], image[..., 1] = np.arange(250), np.arange(250)[:, None]
    sides = [  # brightness rises by one a pixel, so its slope in the crop is the enlargement
        ((crop[16, 24, 0] - crop[16, 8, 0]) * 2 / 250, (crop[24, 16, 1] - crop[8, 16, 1]) * 2 / 250)
        for crop in drawn(augmentation("crop", Preprocess(**VALUES)), image, 300)
    ]
    areas = np.array([width * height for width, height in sides])
    ratios = np.array([width / height for width, height in sides])
    assert 0.07 < areas.min() < 0.12
    assert 0.9 < areas.max() < 1.02
    assert np.histogram(areas, bins=4, range=(0.08, 1))[0].min() > 40
    assert 0.7 < ratios.min() < 0.8
    assert 1.25 < ratios.max() < 1.4


def test_crops_are_resized_by_cubic_interpolation():
    edge = np.full((24, 24, 3), 60, np.uint8)
    edge[:, 12:] = 180
    crops = list(drawn(augmentation("crop", Preprocess(**VALUES)), edge, 20))
    assert min(crop.min() for crop in crops) < 55  # it overshoots; linear does not
    assert max(crop.max() for crop in crops) > 185


def test_half_of_the_images_are_flipped():
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[:, None], (64, 64, 3)).copy()
    crops = drawn(augmentation("crop_flip", Preprocess(**VALUES)), ramp, 400)
    flipped = sum(crop[0, 0, 0] > crop[0, -1, 0] for crop in crops)
    assert 160 < flipped < 240
