"""Contexts of the methods with prompts in both towers: words, depths, and what refuses."""

import pytest
import torch
from families import build, siglip_tokens
from tiny import NAMES, clip, images

import vpt
from vpt.errors import InputError
from vpt.methods import _text, mmrlpp

WORDS = "a photo of a"


def attach(method, backbone=None, **options):
    torch.manual_seed(0)
    return vpt.attach(backbone or clip(), method, class_names=NAMES, **options)


@pytest.mark.parametrize("method", ["ivlp", "maple"])
@pytest.mark.parametrize("num_tokens", [1, 4, 6])
def test_words_start_the_context_and_the_rest_of_them_stays(method, num_tokens):
    """One text block, so that the text's deep prompts do not matter."""
    backbone = clip()
    depth = {"ivlp": {"text_depth": 1}, "maple": {"depth": 1}}[method]
    model = attach(method, backbone, num_tokens=num_tokens, init=WORDS, **depth)
    plain = attach("coop", backbone, init=WORDS)
    assert model.context.shape == (num_tokens, 16)
    known = min(num_tokens, 4)
    assert torch.equal(model.context[:known], plain.context[:known])
    if num_tokens <= 4:
        torch.testing.assert_close(model.text_features(), plain.text_features())
    else:
        with torch.no_grad():
            plain = attach("coop", backbone, num_tokens=num_tokens)
            plain.context.copy_(model.context)
        torch.testing.assert_close(model.text_features(), plain.text_features())


@pytest.mark.parametrize(
    ("method", "options"),
    [("ivlp", {"text_depth": 50, "image_depth": 50}), ("maple", {"depth": 50})],
)
def test_depths_are_capped_at_the_towers(method, options):
    model = attach(method, **options)
    assert model.text_prompts.shape == (1, 2, 16)
    assert model.prompts.shape == (2, 2, 32)
    assert model(images()).isfinite().all()


def test_random_contexts_and_depths_of_one():
    model = attach("ivlp", init=None, num_tokens=3, text_depth=1, image_depth=1, num_image_tokens=5)
    assert model.context.shape == (3, 16)
    assert model.text_prompts is None
    assert model.prompts.shape == (1, 5, 32)
    model = attach("maple", init=None, depth=1)
    assert model.text_prompts is None
    assert len(model.couplings) == 1
    assert model.prompts.shape == (1, 2, 32)


def test_a_fixed_text_is_zero_shots():
    """VPT on CLIP: `ivlp` with `text_depth=0`."""
    backbone = clip()
    model = attach("ivlp", backbone, text_depth=0, init="art of the")
    assert model.context is None
    assert model.tunable_parameters().keys() == {"prompts"}
    fixed = attach("zero_shot", backbone, templates=["art of the {}."])
    found = torch.nn.functional.normalize(model.text_features(), dim=-1)
    torch.testing.assert_close(found, fixed.text_features())
    with pytest.raises(InputError, match=r"text_depth=0 .* give its words as method.init"):
        attach("ivlp", backbone, text_depth=0, init=None)


@pytest.mark.parametrize("method", ["ivlp", "maple"])
def test_a_shared_prefix_is_the_plain_path(method):
    """With words that stay after the context, in float64."""
    model = attach(method, num_tokens=2, init=WORDS).double()
    found = []
    for model.backbone.exact_tokens in (False, True):
        assert model.shares_prefix() != model.backbone.exact_tokens
        model.zero_grad()
        logits = model(images().double())
        logits.square().sum().backward()
        found.append([logits.detach(), *(p.grad for p in model.tunable_parameters().values())])
    for one, other in zip(*found, strict=True):
        atol = 1e-9 * other.abs().max().item()
        torch.testing.assert_close(one, other, rtol=1e-9, atol=atol)


@pytest.mark.parametrize(
    ("method", "options", "tower_name"),
    [
        ("coop", {}, "clip"),
        ("coop", {"class_specific": True}, "clip"),
        ("coop", {"position": "middle"}, "clip"),
        ("coop", {}, "siglip_clip"),
        ("cocoop", {}, "clip"),
        ("cocoop", {}, "siglip_clip"),
        ("promptsrc", {}, "clip"),
        ("mmrlpp", {}, "clip"),
    ],
)
def test_many_texts_run_in_parts_and_again_in_backward(method, options, tower_name, monkeypatch):
    """In parts of 2 texts: the same outputs and gradients, of fewer activations kept."""
    names = [f"{word} cat" if number % 2 else word for number, word in enumerate("abcdefgh")]
    results, kept = [], []
    for chunk in (1024, 2):
        for module, name in ((_text, "CHUNK"), (_text, "WHOLE"), (mmrlpp, "CHUNK")):
            monkeypatch.setattr(module, name, chunk)
        torch.manual_seed(0)
        tower = build(tower_name).double()
        tokens = siglip_tokens if tower_name == "siglip_clip" else None
        model = vpt.attach(tower, method, class_names=names, tokenizer=tokens, **options).double()
        features = torch.randn(2, model.backbone.feature_dim).double()
        saved = {}

        def pack(tensor, saved=saved):
            saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            texts = model.text_features(features)
        kept.append(sum(saved.values()))
        texts.square().sum().backward()
        named = model.tunable_parameters().items()
        grads = {n: p.grad for n, p in named if p.grad is not None}
        results.append({"texts": texts.detach(), **grads})
        with torch.no_grad():
            torch.testing.assert_close(model.text_features(features), texts)
    assert results[0].keys() == results[1].keys()
    assert len(results[0]) > 1
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor, rtol=1e-9, atol=1e-9)
    assert kept[1] < 0.6 * kept[0]
