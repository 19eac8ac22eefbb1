"""MMRL and MMRL++ beyond their reference numbers."""

import pytest
import torch
from families import MODELS, timm_clip, timm_model
from timm.models.vision_transformer import VisionTransformer
from tiny import attach, clip, images, vit

import vpt
from vpt.errors import InputError


@pytest.mark.parametrize("beta", [0.6, 1.0])
@pytest.mark.parametrize("names", [["cat", "dog"], ["a", "bird of paradise", "cat", "x y", "dog"]])
def test_texts_share_what_stands_before_the_words(beta, names):
    model = attach(
        clip(layers=4).double(), "mmrlpp", class_names=names, beta=beta, first_block=2, dim=8
    ).double()
    results = []
    for exact in (False, True):
        model.backbone.exact_tokens = exact
        features = model.text_features()
        model.zero_grad()
        features.square().sum().backward()
        grads = [p.grad.clone() for n, p in model.text_maps.named_parameters()]
        results.append([features.detach(), *grads, model.representations.grad.clone()])
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-9, atol=1e-9)


def test_mmrl_is_the_case_of_maps_apart_that_overwrite():
    one, other = attach(clip(layers=3), "mmrl", dim=8), attach(clip(layers=3), "mmrlpp", beta=1)
    assert {n.split(".")[-1] for n in other.tunable_parameters()} >= {"left", "right"}
    same = attach(clip(layers=3), "mmrlpp", rank=None, projection_rank=None, beta=1.0, dim=8)
    same.load_state_dict(one.artifact_tensors(), strict=False)
    assert torch.equal(same.eval()(images()), one.eval()(images()))


def test_the_new_branch_starts_at_the_towers_own_projection():
    model = attach(clip(), "mmrlpp").eval()
    frozen = model.own_projection
    assert torch.equal(frozen, model.backbone.model.visual.proj)
    assert torch.equal(model.projection(frozen), frozen)


def test_on_a_timm_tower_the_class_token_is_read_as_the_tower_does():
    model = attach(timm_clip(timm_model(VisionTransformer, num_classes=0), embed_dim=32), "mmrl")
    inputs = images(size=model.backbone.preprocess.image_size)
    teacher = model.frozen_columns(inputs)["teacher"]
    torch.testing.assert_close(teacher, model.backbone(inputs), rtol=1e-4, atol=1e-5)


def test_towers_without_a_class_token_or_a_linear_projection_are_refused():
    with pytest.raises(InputError, match="mmrl needs a CLIP"):
        vpt.attach(vit(), "mmrl", class_names=["a", "b"])
    with pytest.raises(InputError, match="read at its class token and projected") as caught:
        attach(MODELS["clip_average"](), "mmrl")
    assert "\n" not in str(caught.value)
