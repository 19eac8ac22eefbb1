"""Prompts as keys and values against prompts as tokens: outputs and gradients, in float64."""

import copy
import functools

import families
import pytest
import torch
from families import MODELS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import vpt
from vpt import backbones
from vpt.backbones.base import Rows

LAYERS = [None, [0], [0, 1], [1], [0, 2]]


def randomize(model):
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


@functools.cache
def build(name):
    return randomize(MODELS[name]())


@functools.cache
def clip():
    return randomize(families.clip(text={"layers": 3, "ls_init_value": 0.5}))


@functools.cache
def knows_rows(name):
    return backbones.adapt(build(name)).knows_rows


def images(count=2):
    return torch.randn(count, 3, 32, 32, dtype=torch.float64)


def outcomes(model, run):
    """Outputs and gradients of the fast and of the plain path."""
    results = []
    for exact_tokens in (False, True):
        model.backbone.exact_tokens = exact_tokens
        model.zero_grad()
        torch.manual_seed(1)  # the same dropout
        output = run(model)
        output.square().sum().backward()
        gradients = [p.grad for p in model.tunable_parameters().values() if p.grad is not None]
        results.append([output.detach(), *gradients])
    return results


def assert_equal(model, run, relative=1e-9):
    fast, plain = outcomes(model, run)
    assert len(fast) == len(plain) > 1
    for one, other in zip(fast, plain, strict=True):
        atol = relative * other.abs().max().item()
        torch.testing.assert_close(one, other, rtol=relative, atol=atol)


@pytest.mark.parametrize("layers", LAYERS, ids=str)
@pytest.mark.parametrize("name", filter(knows_rows, MODELS))
def test_every_family(name, layers):
    model = vpt.attach(build(name), "vpt_deep", num_classes=3, num_tokens=4, layers=layers)
    model.double()
    assert_equal(model, lambda m: m(images()))


@pytest.mark.parametrize("name", filter(knows_rows, MODELS))
def test_every_family_in_float32(name):
    model = vpt.attach(MODELS[name](), "vpt_deep", num_classes=3, num_tokens=4)
    assert_equal(model, lambda m: m(images().float()), relative=1e-5)


def test_coop_in_float32():
    for method in ("coop", "cocoop"):
        model = vpt.attach(families.clip(), method, class_names=["cat", "a xylophone"])
        assert_equal(model, lambda m: m(images().float()), relative=1e-5)


def test_against_attention_that_is_not_fused():
    backbone = copy.deepcopy(build("vit"))
    for block in backbone.blocks:
        block.attn.fused_attn = False
    model = vpt.attach(backbone, "vpt_deep", num_classes=3, num_tokens=4).double()
    assert_equal(model, lambda m: m(images()))


def test_families_with_other_blocks_are_few():
    others = {name for name in MODELS if not knows_rows(name)}
    assert others == {"clip_qk_norm", "eva_grouped_heads", "eva_post_norm"} & MODELS.keys()


@pytest.mark.parametrize("options", [{"dropout": 0.5}, {"project": 5}, {"position": "append"}])
@pytest.mark.parametrize("method", ["vpt_shallow", "vpt_deep"])
@pytest.mark.parametrize("name", ["vit", "clip", "beit", "dinov3", "swin_padded", "swinv2"])
def test_methods_and_options(name, method, options):
    model = vpt.attach(build(name), method, num_classes=3, **options).double().train()
    assert_equal(model, lambda m: m(images()))


@given(tokens=st.integers(1, 9), batch=st.integers(1, 3), classes=st.integers(2, 4))
@settings(deadline=None, max_examples=15, suppress_health_check=list(HealthCheck))
def test_shapes(tokens, batch, classes):
    model = vpt.attach(build("vit"), "vpt_deep", num_classes=classes, num_tokens=tokens).double()
    assert_equal(model, lambda m: m(images(batch)))


@given(
    names=st.lists(
        st.lists(st.sampled_from(["cat", "ox", "xylophone", "a"]), min_size=1, max_size=6).map(
            " ".join
        ),
        min_size=2,
        max_size=6,
        unique=True,
    ),
    tokens=st.integers(1, 5),
)
@settings(deadline=None, max_examples=20, suppress_health_check=list(HealthCheck))
def test_shared_prefix(names, tokens):
    model = vpt.attach(clip(), "coop", class_names=names, num_tokens=tokens).double()
    assert model.shares_prefix()
    assert_equal(model, lambda m: m.text_features())


def test_one_text():
    """A single class is nothing to classify, but a text all the same."""
    model = vpt.attach(clip(), "coop", class_names=["cat", "a dog"], num_tokens=2).double()
    model.suffixes = nn.ModuleList([model.backbone.text.pack(model.tokens[1:], 2)])
    alone = model.encode(model.context[None])[0]
    model.backbone.exact_tokens = True
    torch.testing.assert_close(alone, model.text_features()[1:], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_prefix_for_each_image(batch):
    names = ["cat", "ox", "a xylophone"]
    model = vpt.attach(clip(), "cocoop", class_names=names).double()
    assert_equal(model, lambda m: m(images(batch)))


def test_other_texts_take_the_plain_path():
    for options in ({"class_specific": True}, {"position": "middle"}, {"position": "front"}):
        model = vpt.attach(clip(), "coop", class_names=["cat", "ox"], num_tokens=4, **options)
        assert not model.shares_prefix()


def test_a_fault_in_the_rows_would_be_seen():
    model = vpt.attach(build("vit"), "vpt_deep", num_classes=3, num_tokens=4).double()
    rows = model.backbone.rows
    model.backbone.rows = lambda index, prompts: Rows(
        *(1.0001 * r for r in rows(index, prompts)[:2])
    )
    with pytest.raises(AssertionError):
        assert_equal(model, lambda m: m(images()))
