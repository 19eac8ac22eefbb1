"""Works of `vpt bench speed` with prompts in both of CLIP's towers."""

import open_clip
import torch
from torch import Tensor

from vpt import methods
from vpt.bench.speed import Work, _all_positions, _device, _images, _names
from vpt.losses.cross_entropy import CrossEntropy
from vpt.methods.base import Batch

CHUNK = 100  # classes whose 77 positions the reference form holds at once


def clip_works(small: bool = False) -> list[Work]:
    """Deep text prompts, and whole steps of PromptSRC, with random weights."""
    torch.manual_seed(0)
    text = {"width": 64, "heads": 2, "layers": 3} if small else {}
    image = {"image_size": 32, "width": 64, "head_width": 32, "layers": 3} if small else {}
    patches = (16, 8) if small else (32, 16)
    towers = [
        open_clip.CLIP(64 if small else 512, {**image, "patch_size": patch}, text).to(_device())
        for patch in patches
    ]
    counts = (6, 230) if small else (100, 200, 1000)
    kinds = ("ViT-B/32", "ViT-B/16")
    return [
        _deep_text(towers[0], counts[0], f"{kinds[0]}'s tower"),
        *(_promptsrc_step(towers[1], classes, kinds[1]) for classes in counts),
    ]


def _deep_text(clip: open_clip.CLIP, classes: int, tower: str) -> Work:
    options = {"num_tokens": 4, "text_depth": 9}
    model = methods.attach(clip, "ivlp", class_names=_names(classes), **options)

    def step(features: Tensor) -> list[Tensor]:
        model.zero_grad()
        features.square().mean().backward()
        return [features.detach(), model.context.grad, model.text_prompts.grad]

    return Work(
        f"deep text prompts, {tower}, {classes} classes, M=4",
        engine=lambda: step(model.text_features()),
        tokens=lambda: step(_all_positions(model)),
    )


def _promptsrc_step(clip: open_clip.CLIP, classes: int, tower: str, batch: int = 4) -> Work:
    """A training step; the reference runs the frozen image tower in each, and ours has its column.

    Both have the teacher's texts computed before. The reference's texts run forward and backward
    CHUNK classes at a time, each once, so that 1,000 of them fit into memory.
    """
    names = _names(classes)
    model = methods.attach(clip, "promptsrc", class_names=names, templates=["a photo of a {}."])
    images, loss = _images(batch, model), CrossEntropy(model.target)
    labels = torch.arange(batch, device=images.device) % classes
    with torch.no_grad():
        cached, given = model.frozen_columns(images), model.text_features()
        model.step(Batch(images, labels, cached), loss)  # which keeps the teacher's texts

    def backward(columns: dict[str, Tensor]) -> Tensor:
        model.zero_grad()
        step = model.step(Batch(images, labels, columns), loss)
        step.total.backward()
        return step.logits.detach()

    def results(logits: Tensor) -> list[Tensor]:
        return [logits, *(p.grad for p in model.tunable_parameters().values())]

    def tokens() -> list[Tensor]:
        texts, model.backbone.exact_tokens = given.clone().requires_grad_(), True
        with torch.no_grad():
            columns = model.frozen_columns(images)
        model.text_features = lambda features=None: texts
        logits = backward(columns)
        del model.text_features
        model.backbone.exact_tokens = False
        for start in range(0, classes, CHUNK):
            part = slice(start, start + CHUNK)
            _all_positions(model, part).backward(texts.grad[part])
        return results(logits)

    return Work(
        f"PromptSRC step, {tower}, {classes} classes, batch {batch}",
        engine=lambda: results(backward(cached)),
        tokens=tokens,
        bare=lambda: [model.backbone(images)],
    )
