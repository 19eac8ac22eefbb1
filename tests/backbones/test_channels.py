"""Models of one channel: they train on grey images, are saved, and give the same again."""

import numpy as np
import pytest
import tiny
import torch
from families import FAMILIES, timm_model
from PIL import Image
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg

import vpt
from vpt import backbones
from vpt.errors import InputError

METHODS = sorted({method for method, _ in tiny.pairs("vit")})
CONFIG = {"epochs": 1, "precision": "fp32"}


def grey(seed=0):
    return tiny.vit(seed, in_chans=1)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_is_saved(method, tmp_path):
    model = tiny.attach(grey(), method)
    data = tiny.samples(np.arange(9) % 3)
    vpt.fit(model, tiny.loader(model, data), config=CONFIG)
    vpt.save(model, tmp_path / "grey.safetensors")
    again = vpt.load(tmp_path / "grey.safetensors", grey())
    batch = next(iter(tiny.loader(model, data, train=False)))[0]
    assert batch.shape == (8, 1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(again(batch), model(batch))
        torch.testing.assert_close(again.fold()(batch), model(batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["eva02", "beit", "siglip", "relpos", "naflex"])
def test_other_families(name):
    if name == "naflex":
        cfg = NaFlexVitCfg(patch_size=8, embed_dim=32, depth=3, num_heads=2)
        model = NaFlexVit(cfg, img_size=32, in_chans=1)
    else:
        kind, options = FAMILIES[name]
        model = timm_model(kind, **options, in_chans=1)
    assert backbones.adapt(tiny.perturb(model)).preprocess.channels == 1


def test_pixels_are_pillows_grey_with_the_mean_of_the_means():
    preprocess = backbones.adapt(grey()).preprocess
    own = backbones.adapt(tiny.vit()).preprocess
    assert preprocess.mean == (pytest.approx(sum(own.mean) / 3),)
    assert preprocess.std == (pytest.approx(sum(own.std) / 3),)
    colours = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(colours).convert("L")) / 255.0
    batch = preprocess.normalize(torch.from_numpy(colours))
    found = batch * preprocess.std[0] + preprocess.mean[0]
    assert np.abs(found[0].numpy() - expected).max() < 1 / 255
    assert type(preprocess).from_dict(preprocess.to_dict()) == preprocess


def test_images_of_other_channels_are_refused():
    model = tiny.attach(grey())
    with pytest.raises(InputError, match=r"shape \(3, 3, 32, 32\), but .* takes \(B, 1, height"):
        model(tiny.images())
    with pytest.raises(InputError, match=r"shape \(3, 32, 32\), but .* takes \(B, 3, height"):
        tiny.attach(tiny.vit())(tiny.images()[0])


def test_models_of_other_channels_are_refused():
    with pytest.raises(InputError, match="takes 4×32×32 images"):
        vpt.attach(tiny.vit(in_chans=4), num_classes=2)
