"""Tiny models, images, loaders and the command line in this process, for all tests."""

import sys
import zlib
from functools import cache

import numpy as np
import open_clip
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

import vpt
from vpt import cli, methods
from vpt.data.images import Samples
from vpt.data.loaders import make_loader

NAMES = ["tabby cat", "dog", "red_panda"]


def vit(seed=0, **kwargs):
    torch.manual_seed(seed)
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    model = VisionTransformer(**{**settings, "num_classes": 5, **kwargs})
    return perturb(model)


def clip(seed=0, embed_dim=16, width=32, layers=2):
    torch.manual_seed(seed)
    model = open_clip.CLIP(
        embed_dim=embed_dim,
        vision_cfg={
            "image_size": 32,
            "patch_size": 8,
            "width": width,
            "layers": layers,
            "head_width": width // 2,
        },
        text_cfg={"context_length": 24, "width": 16, "heads": 2, "layers": layers},
    )
    return perturb(model)


def perturb(model):
    """No parameter stays at a value, such as 0, that would hide a mistake."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def fixed(model):
    """Give `model` weights that no machine or version changes: integers drawn by name."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = np.random.RandomState(zlib.crc32(name.encode())).randint(
                -64, 65, parameter.shape
            )
            norm = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(torch.tensor(drawn / 128 + norm) if parameter.dim() else 2.0)
    return model.eval()


def images(count=3, seed=1, size=32):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def attach(backbone, method="vpt_deep", **options):
    """Always the same draws; classes are NAMES unless `options` say others."""
    torch.manual_seed(0)
    if "num_classes" not in options:
        options.setdefault("class_names", NAMES)
    return vpt.attach(backbone, method, **options)


@cache
def needs_clip(method):
    try:
        attach(vit(), method)
    except vpt.InputError as error:
        assert "needs a CLIP" in str(error), error
        return True
    return False


def pairs(*kinds):
    """(method, kind) of every method with each of `kinds` that it takes; `clip` is a CLIP."""
    return [(m, kind) for m in methods.names() for kind in kinds if takes(m, kind)]


def takes(method, kind):
    return kind == "clip" or not needs_clip(method)


def solved(method):
    """A method that no gradient step trains."""
    return methods.find(method).solved


def samples(labels, patients=None, *, pixels=None, part=None, seed=0):
    """Noise, or `pixels`, with these labels (N,) or (N, C), named by number and `part`."""
    labels = np.asarray(labels, dtype=np.float32 if np.ndim(labels) == 2 else np.int64)
    if pixels is None:
        noise = np.random.default_rng(seed)
        pixels = noise.integers(0, 256, (len(labels), 32, 32, 3), dtype=np.uint8)
    names = [f"{part}/{index}" if part else str(index) for index in range(len(labels))]
    return Samples(pixels, labels, names, patients)


def loader(model, data, batch_size=8, train=True, **options):
    """Batches of `data` for `model`, shuffled unless `train` is False."""
    return make_loader(data, model.backbone.preprocess, batch_size, train=train, **options)


def write_image(path, label=0, seed=0, size=(40, 36), mode="RGB"):
    """A noisy image whose colour tells its label."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng([label, seed]).integers(0, 90, (size[1], size[0], 3))
    noise[..., label % 3] += 150
    Image.fromarray(noise.astype(np.uint8)).convert(mode).save(path)
    return path


def write_folder(root, classes=("cat", "dog"), count=5):
    for label, name in enumerate(classes):
        for index in range(count):
            write_image(root / name / f"secret{index}.png", label, index)
    return root


def vpt_cli(capfd, monkeypatch, *arguments):
    """Exit code, stdout and stderr of `vpt ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["vpt", *map(str, arguments)])
    capfd.readouterr()
    try:
        cli.main()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    captured = capfd.readouterr()
    return code, captured.out, captured.err
