"""Many tasks in one batch: as one by one, whatever their methods, neighbours and order."""

import functools
import threading

import pytest
import tiny
import torch
from torch import nn

import vpt
from vpt import methods
from vpt.backbones._flow import Flow

same = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
BACKBONES = {"vit": tiny.vit, "clip": tiny.clip}
CLASSES = [["cat", "dog"], tiny.NAMES, ["a", "b", "c", "d", "e"]]


def artefact(backbone, method, path, number=0, names=None, **options):
    """A prompt of `method` that nothing is at its start in, other for each number."""
    names = names or CLASSES[number % len(CLASSES)]
    model = tiny.attach(backbone, method, class_names=names, **options)
    labels = torch.arange(2 * len(names)) % len(names)
    pictures = tiny.images(len(labels), seed=number).to(model.backbone.device)
    if model.solved:
        with torch.no_grad():
            features = model.features(pictures)
        model.solve(features, labels)
    generator = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for parameter in model.tunable_parameters().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return vpt.save(model, path / f"{method}-{number}.safetensors")


def alone(backbone, path, image):
    return vpt.load(path, backbone).fold()(image[None])[0].detach()


@pytest.fixture(scope="module", params=BACKBONES)
def everything(request, tmp_path_factory):
    """A backbone, and three artefacts of every method on it: two alike, one of other options."""
    folder, backbone = tmp_path_factory.mktemp(request.param), BACKBONES[request.param]()
    backbone = vpt.backbones.adapt(backbone)
    names = [m for m, kind in tiny.pairs(request.param)]
    paths = {}
    for method in names:
        for number in (0, 3, 1):
            paths[f"{method}-{number}"] = artefact(backbone, method, folder, number)
    for count, layers in ((3, [1]), (5, [0])):
        name = f"vpt_deep-{9 + count}"
        paths[name] = artefact(
            backbone, "vpt_deep", folder, 9 + count, num_tokens=count, layers=layers
        )
    paths["vpt_shallow-9"] = artefact(backbone, "vpt_shallow", folder, 9, gated=True)
    return backbone, paths


def make(backbone, paths, **options):
    bank = vpt.PromptBank(backbone, **options)
    for name, path in paths.items():
        bank.add(name, path)
    return bank


def test_every_method_in_one_batch_is_as_by_itself(everything):
    backbone, paths = everything
    bank = make(backbone, paths)
    assert {name.rpartition("-")[0] for name in bank} <= set(methods.names())
    pictures = tiny.images(len(paths))
    for names in (list(paths), list(reversed(paths))):
        with torch.no_grad():
            together = bank(pictures, names)
        for name, image, logits in zip(names, pictures, together, strict=True):
            same(logits, alone(backbone, paths[name], image), msg=lambda m, n=name: f"{n}: {m}")


def test_each_method_beside_its_like_is_as_by_itself(everything):
    backbone, paths = everything
    bank = make(backbone, paths)
    pictures = tiny.images(5)
    for method in {name.rpartition("-")[0] for name in paths}:
        names = [f"{method}-{number}" for number in (0, 3, 3, 0, 3)]
        if names[0] in paths and names[1] in paths:
            for name, image, logits in zip(names, pictures, bank(pictures, names), strict=True):
                same(logits, alone(backbone, paths[name], image))


def test_neighbours_change_nothing(everything):
    backbone, paths = everything
    bank = make(backbone, paths)
    pictures = tiny.images(len(paths))
    together = bank(pictures, list(paths))
    for name, image, logits in zip(paths, pictures, together, strict=True):
        same(logits, bank(image[None], [name])[0])
