"""CLIP-LoRA and CLIP-SVD: changes of both towers' weights, each by its formula."""

import copy

import numpy as np
import pytest
import torch
from families import MODELS, timm_clip, timm_model
from timm.models.vision_transformer import VisionTransformer
from tiny import attach, clip, images, perturb

import vpt
from vpt.errors import InputError
from vpt.methods import _changed

TOWERS = {
    "clip": clip,
    "custom_text": lambda: perturb(MODELS["clip_custom_text"]()),
    "timm": lambda: perturb(timm_clip(timm_model(VisionTransformer, num_classes=0), embed_dim=32)),
}
METHODS = ["clip_lora", "clip_svd"]


def weights(model):
    """Name → weight of the frozen layers that the methods change, in the towers' order."""
    ends = ("attn.in_proj_weight", "attn.qkv.weight", "attn.out_proj.weight", "attn.proj.weight")
    ends += tuple(f"mlp.{n}.weight" for n in ("fc1", "fc2", "c_fc", "c_proj"))
    named = {n: p for n, p in model.named_parameters() if n.endswith(ends)}
    images = {n: p for n, p in named.items() if n.startswith("visual.")}
    return images, {n: p for n, p in named.items() if n not in images}


def by_hand(method, model, names):
    """Changed weights, by NumPy, of the layers `names` → frozen weight."""
    changed = {}
    changes = [model.image_changes, model.text_changes]
    for side, layers in zip(changes, names, strict=True):
        if method == "clip_lora":
            layers = {n: w for n, w in layers.items() if "in_proj" in n or "qkv" in n}
        assert len(side) == len(layers)
        for change, (name, weight) in zip(side, layers.items(), strict=True):
            parts = 3 if "in_proj" in name or "qkv" in name else 1
            pieces = np.split(weight.detach().double().numpy(), parts)
            for number, piece in enumerate(pieces):
                if method == "clip_lora":
                    a, b = (t[number].detach().double().numpy() for t in (change.A, change.B))
                    pieces[number] = piece + 6 / np.sqrt(3) * b @ a
                else:
                    left, values, right = np.linalg.svd(piece, full_matrices=False)
                    values = values + change.differences[number].detach().numpy()
                    pieces[number] = left @ np.diag(values) @ right
            changed[name] = torch.from_numpy(np.concatenate(pieces)).float()
    return changed


@pytest.mark.parametrize("kind", TOWERS)
@pytest.mark.parametrize("method", METHODS)
def test_the_formula(kind, method):
    backbone = TOWERS[kind]()
    state = copy.deepcopy(backbone.state_dict())
    options = {"rank": 3, "alpha": 6} if method == "clip_lora" else {}
    model = attach(backbone, method, **options).eval()
    inputs = images(size=model.backbone.preprocess.image_size)
    bare = attach(backbone, "zero_shot").backbone
    torch.testing.assert_close(model.features(inputs), bare(inputs), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        for parameter in model.tunable_parameters().values():
            parameter.add_(0.3 * torch.randn_like(parameter))
    other = TOWERS[kind]()
    other.load_state_dict(state | by_hand(method, model, weights(backbone)))
    expected = attach(other, "zero_shot")
    for form in (model, model.fold()):
        torch.testing.assert_close(form(inputs), expected(inputs), rtol=1e-4, atol=1e-3)
    assert (model(inputs) - attach(backbone, "zero_shot")(inputs)).abs().max() > 1e-2
    assert all(torch.equal(state[k], v) for k, v in backbone.state_dict().items())


def test_dropout_is_on_the_input_of_the_change_alone():
    model = attach(clip(), "clip_lora", dropout=0.5)
    model.train()
    start = model.features(images())  # B is 0
    torch.testing.assert_close(start, model.eval().features(images()))
    with torch.no_grad():
        for change in model.image_changes:
            change.B.normal_()
    assert torch.equal(model.features(images()), model.features(images()))
    model.train()
    assert not torch.equal(model.features(images()), model.features(images()))
    change, x = model.image_changes[0], torch.randn(2000, 32)
    weight = torch.zeros(96, 32)
    means = torch.stack([change(x, weight, None) for _ in range(200)]).mean(0)
    error = (means - x @ change.delta().T).norm() / means.norm()
    assert error < 0.15  # its mean is the change itself


@pytest.mark.parametrize("method", METHODS)
def test_many_classes_run_again_in_backward(method, monkeypatch):
    model = attach(clip(), method).eval().double()
    with torch.no_grad():
        for parameter in model.tunable_parameters().values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    grads = []
    for chunk in (256, 2):
        monkeypatch.setattr(_changed, "CHUNK", chunk)
        model.zero_grad()
        model.text_features().square().sum().backward()
        grads.append([p.grad.clone() for p in model.text_changes.parameters()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_other_towers_are_refused(method):
    with pytest.raises(InputError, match=f"{method} finds no attention that it knows") as caught:
        vpt.attach(MODELS["eva02_clip"](), method, class_names=["a", "b"])
    assert "\n" not in str(caught.value)
