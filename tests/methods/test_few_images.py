"""Methods on cached features where classes are unbalanced or missing, and templates chosen."""

import numpy as np
import pytest
import torch
from tiny import NAMES, attach, clip, images, loader, samples
from torch.nn import functional as F

import vpt
from vpt import methods
from vpt.methods._templates import Templates

CACHED = [
    name
    for name in methods.names()
    if issubclass(methods.find(name), Templates) or name in {"coop", "kgcoop", "prograd"}
]
TEMPLATES = ["a photo of a {}.", "art of the {}.", "{} X X."]
FEATURES = torch.randn(9, 16, generator=torch.Generator().manual_seed(3))
LABELS = torch.tensor([0, 1, 2, 2, 0, 1, 1, 2, 2])


@pytest.mark.parametrize("names", [NAMES, NAMES[:2]])
@pytest.mark.parametrize("method", CACHED)
def test_unbalanced_images_and_a_class_without_any(tmp_path, method, names):
    backbone = clip()
    model = attach(backbone, method, class_names=[*names, "unseen thing"])
    labels = np.arange(3 + len(names)) % len(names)
    data = samples(np.sort(np.maximum(labels, 1) - 1 if len(names) > 2 else labels))
    config = {"epochs": 3, "lr": 1e-3, "schedule": "constant"}
    vpt.fit(model, loader(model, data, 64), config=config)
    logits = model.eval()(images())
    assert logits.shape == (3, len(names) + 1) and logits.isfinite().all()
    assert all(tensor.isfinite().all() for tensor in model.artifact_tensors().values())
    again = vpt.load(vpt.save(model, tmp_path / "prompt.safetensors"), backbone)
    assert torch.equal(again(images()), logits)


@pytest.mark.parametrize("method", ["tip_adapter", "ss_text", "ss_text_plus"])
def test_in_closed_form_the_order_of_images_makes_no_difference(method):
    model, other = attach(clip(), method), attach(clip(), method)
    order = torch.randperm(len(LABELS))
    model.solve(FEATURES, LABELS)
    other.solve(FEATURES[order], LABELS[order])
    torch.testing.assert_close(other(images()), model(images()))


def test_tip_adapter_has_as_many_keys_as_images(tmp_path):
    backbone = clip()
    model = attach(backbone, "tip_adapter", alpha=2.0, beta=3.0)
    texts = F.normalize(model.class_embeddings, dim=-1)
    given = F.normalize(images(4).flatten(1)[:, :16], dim=-1)
    scale = backbone.logit_scale.exp()
    torch.testing.assert_close(model.logits(given), scale * given @ texts.T)
    model.solve(FEATURES, LABELS)
    affinity = given.numpy() @ F.normalize(FEATURES, dim=-1).numpy().T
    cache = np.exp(-3 * (1 - affinity)) @ np.eye(3)[LABELS]
    expected = (scale * given @ texts.T).detach().numpy() + 2 * cache
    np.testing.assert_allclose(model.logits(given).detach().numpy(), expected, rtol=1e-4)
    again = vpt.load(vpt.save(model, tmp_path / "prompt.safetensors"), backbone)
    assert again.keys.shape == (9, 16)
    model.solve(FEATURES[:4], LABELS[:4])
    assert len(model.keys) == len(model.values) == 4


def losses(model, texts):
    """Mean cross-entropy of each template alone, from the formula."""
    features = F.normalize(FEATURES, dim=-1)
    scale = model.backbone.model.logit_scale.exp()
    logits = [scale * features @ F.normalize(texts[:, t], dim=-1).T for t in range(texts.shape[1])]
    return [F.cross_entropy(each, LABELS).item() for each in logits]


@pytest.mark.parametrize("choose", ["best", "weighted"])
def test_templates_are_chosen_on_the_training_images(tmp_path, choose):
    backbone = clip()
    model = attach(backbone, "zero_shot", templates=TEMPLATES, choose=choose)
    plain = attach(backbone, "zero_shot", templates=TEMPLATES)
    torch.testing.assert_close(model(images()), plain(images()))
    alone = losses(model, model.template_embeddings)
    model.solve(FEATURES, LABELS)
    weights = model.template_weights
    found = model.target.loss(model.logits(FEATURES), LABELS).item()
    assert weights.sum().item() == pytest.approx(1) and (weights >= 0).all()
    if choose == "best":
        assert weights.tolist() == [float(loss == min(alone)) for loss in alone]
        assert found == pytest.approx(min(alone), rel=1e-5)
    else:
        assert found <= min(alone) + 1e-4
        uniform = model._weighted(torch.full((3,), 1 / 3))
        assert found < model.target.loss(model.similarities(FEATURES, uniform), LABELS)
    path = vpt.save(model, tmp_path / "prompt.safetensors")
    assert torch.equal(vpt.load(path, backbone)(images()), model(images()))
    renamed = vpt.load(path, backbone, class_names=["owl", "cow"])
    assert torch.equal(renamed.template_weights, weights)
    torch.testing.assert_close(renamed.fold()(images()), renamed(images()))


def test_templates_of_findings_are_chosen_too():
    names = ["mass", "nodule"]
    model = attach(
        clip(),
        "zero_shot",
        class_names=names,
        multilabel=True,
        templates=TEMPLATES,
        choose="best",
    )
    labels = torch.tensor([[1, 0], [0, 0], [1, 1]])
    model.solve(FEATURES[:3], labels)
    texts = model.template_embeddings
    alone = []
    for template in range(3):
        cosines = model.backbone.similarity(FEATURES[:3], texts[:, template])
        logits = cosines[:, :2] - cosines[:, 2:]
        alone.append(F.binary_cross_entropy_with_logits(logits, labels.float()).item())
    assert model.template_weights.argmax().item() == int(np.argmin(alone))


def test_ss_text_learns_findings_and_their_absence():
    model = attach(clip(), "ss_text", class_names=["mass", "nodule"], multilabel=True)
    labels = torch.tensor([[1, 0], [0, 0], [1, 1]])
    start = model.prototypes.clone()
    model.solve(FEATURES[:3], labels)
    features = F.normalize(FEATURES[:3], dim=-1)
    scale = model.backbone.model.logit_scale.exp()
    truth = torch.tensor([[1.0, 0, 0, 1], [0, 0, 1, 1], [1, 1, 0, 0]])
    torch.testing.assert_close(model.prototypes, start + scale * truth.T @ features)


def test_text_norms_are_those_of_clip():
    """Learning rates and penalties depend on them."""
    model = attach(clip(), "clap")
    norms = model.class_embeddings.norm(dim=-1)
    assert norms.mean().item() == pytest.approx(9, rel=1e-4)
    plain = attach(clip(), "zero_shot")
    torch.testing.assert_close(model.eval()(images()), plain(images()))
