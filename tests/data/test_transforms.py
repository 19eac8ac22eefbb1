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
@pytest.mark.parametrize("size", [224, (64, 64)])
def test_same_as_open_clip(resize_mode, size):
    cfg = {"size": size, "resize_mode": resize_mode, "interpolation": "bicubic"}
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


def test_crops_have_8_to_100_percent_of_the_area():
    augment = augmentation("crop", Preprocess(**VALUES))
    rows, columns = np.mgrid[:200, :200].astype(np.uint8)
    image = np.stack([rows, columns, columns], -1)
    areas = []
    for seed in range(300):
        augment.set_random_seed(seed)
        crop = augment(image=image)["image"].astype(int)
        height, width = (
            np.ptp(crop[..., :2], axis=(0, 1)) / 200 * 32 / 31
        )  # ends are pixels' middles
        areas.append(height * width)
    assert 0.07 < min(areas) < 0.12
    assert max(areas) > 0.9
    assert np.mean(areas) == pytest.approx(0.5, abs=0.05)  # uniform, but large ones may not fit
