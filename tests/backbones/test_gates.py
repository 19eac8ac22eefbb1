"""Gated prompts: a softmax of their own, times a gate that starts at 0."""

import pytest
import tiny
import torch
from families import MODELS, build
from torch import nn
from torch.nn import functional as F

import vpt
from vpt import backbones
from vpt.backbones._attention import attend
from vpt.backbones.base import LayerPrompts, Prompts, Rows
from vpt.errors import InputError

KNOWN = [name for name in MODELS if backbones.adapt(build(name)).knows_rows]


def images(count=2):
    return tiny.images(count).double()


def attach(name, method="vpt_deep", **options):
    return tiny.attach(build(name).double(), method, num_tokens=4, gated=True, **options).double()


def open_gates(model):
    torch.nn.init.uniform_(model.gates, -1, 1)
    return model


@pytest.mark.parametrize("method", ["vpt_deep", "vpt_shallow"])
@pytest.mark.parametrize("name", KNOWN)
def test_closed_gates_leave_the_backbone_as_it_is(name, method):
    model, x = attach(name, method), images()
    torch.testing.assert_close(model.features(x), model.backbone(x), rtol=1e-9, atol=1e-9)
    model(x).square().sum().backward()
    assert model.gates.grad.abs().min() > 0  # but they can open
    assert model.prompts.grad.abs().max() == 0
    open_gates(model)(x).square().sum().backward()
    assert model.prompts.grad.flatten(1).abs().amax(1).min() > 0


@pytest.mark.parametrize("scale", [None, 1.3])  # None: 1/√head_dim; SwinV2's is 1
def test_prompts_have_a_softmax_of_their_own(scale):
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 7, 8, dtype=torch.float64)
    prompt_key, prompt_value = torch.randn(2, 1, 4, 5, 8, dtype=torch.float64)
    bias = torch.randn(1, 4, 7, 7, dtype=torch.float64)

    def answers(k, v, bias=0):
        return (
            ((query @ k.mT * (scale or 8**-0.5) + bias).softmax(-1) @ v).transpose(1, 2).flatten(2)
        )

    gate = torch.tensor(0.3, dtype=torch.float64)
    rows = LayerPrompts(Rows(prompt_key, prompt_value), gate=gate)
    expected = answers(key, value, bias) + 0.3 * answers(prompt_key, prompt_value)
    torch.testing.assert_close(
        attend(query, key, value, rows, bias, scale), expected, rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("scale", [None, 1.3])
@pytest.mark.parametrize("queries", [3, 7, 12])
def test_prompts_among_the_tokens_see_all_and_are_seen_through_the_gate(queries, scale):
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 12, 8, dtype=torch.float64)
    bias, gate = torch.randn(1, 4, 7, 7, dtype=torch.float64), torch.tensor(0.3).double()
    tokens, prompts = slice(0, 7), slice(7, 12)
    rows = LayerPrompts(Rows(key[:, :, prompts], value[:, :, prompts]), gate=gate)
    parts = (part[:, :, tokens] for part in (query, key, value))
    seen = attend(query[:, :, prompts], key, value, scale=scale)
    expected = torch.cat([attend(*parts, rows, bias, scale), seen], 1)
    flowing = LayerPrompts(count=5, gate=gate)
    actual = attend(query[:, :, :queries], key, value, flowing, bias, scale)
    torch.testing.assert_close(actual, expected[:, :queries], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", KNOWN)
def test_gated_prompts_flow_through_the_blocks(name):
    # the last gate alone is open, so that only prompts which came through all blocks are seen
    model, x = attach(name, "vpt_shallow"), images()
    bare = model.features(x)
    assert len(model.gates) == model.backbone.num_layers
    with torch.no_grad():
        model.gates[-1] = 1.0
    assert (model.features(x) - bare).abs().max() > 1e-6
    torch.testing.assert_close(model.fold()(x), model(x), rtol=1e-9, atol=1e-9)
    one = model.backbone(x[:1], Prompts(model.prompts, model.layers, gates=model.gates))
    torch.testing.assert_close(model.features(x)[:1], one, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", KNOWN)
def test_one_gated_prompt_shifts_the_bias_of_the_projection(name):
    # a softmax over one key is 1, so its value goes to all tokens alike
    model = vpt.attach(build(name).double(), num_classes=3, num_tokens=1, gated=True)
    model, x, backbone = open_gates(model.double()), images(), model.backbone
    expected = model.features(x)
    attentions = [m for n, m in backbone.image_tower.named_modules() if n.endswith(".attn")]
    for index, attn in enumerate(attentions[: backbone.num_layers]):  # CoCa's pooler has one too
        if not isinstance(getattr(attn, "norm", nn.Identity()), nn.Identity):
            pytest.skip("a norm stands between attention and projection")
        out = attn.out_proj if hasattr(attn, "out_proj") else attn.proj
        prompt = model.prompts[index][..., : backbone.widths[index]]
        shift = model.gates[index] * backbone.rows(index, prompt).value.flatten()
        out.bias = nn.Parameter(F.linear(shift, out.weight, out.bias))
    torch.testing.assert_close(backbone(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", KNOWN)
def test_sets_of_each_sample_and_folded_ones(name):
    model, x = open_gates(attach(name)), images(3)
    sets = model.prompts[:, None] * torch.tensor([1.0, 0.5, 2.0])[None, :, None, None]
    together = model.backbone(x, Prompts(sets, model.layers, gates=model.gates))
    apart = [
        model.backbone(x[i : i + 1], Prompts(sets[:, i], model.layers, gates=model.gates))
        for i in range(3)
    ]
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.fold()(x), model(x), rtol=1e-9, atol=1e-9)


def test_folded_prompts_are_keys_and_values():
    folded = open_gates(attach("vit")).fold()
    constants = folded.image_prompts(images()).sets
    assert len(constants) == len(folded.layers)
    assert all(isinstance(constant, Rows) for constant in constants)


def test_checkpointing_gives_the_same_gradients():
    model, x = open_gates(attach("vit")), images()
    gradients = []
    for model.backbone.checkpointing in (False, True):
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append(model.prompts.grad.clone())
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_an_artefact_keeps_the_gates(tmp_path):
    model = open_gates(vpt.attach(tiny.vit(), num_classes=3, gated=True)).eval()
    loaded = vpt.load(vpt.save(model, tmp_path / "a.safetensors"), tiny.vit())
    torch.testing.assert_close(loaded(tiny.images()), model(tiny.images()))


def test_unknown_blocks_are_refused():
    model = tiny.vit()
    model.blocks[0].attn.__class__ = type("Own", (type(model.blocks[0].attn),), {})
    with pytest.raises(InputError, match=r"method\.gated=true.* give method\.gated=false"):
        vpt.attach(model, num_classes=3, gated=True)


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("layers", [None, [0], [1]])
def test_the_token_form_gives_the_same(name, layers):
    model, x = open_gates(attach(name, layers=layers)), images()
    assert len(model.gates) == model.backbone.num_layers - model.layers[0]
    expected = model.features(x)
    model.backbone.exact_tokens = True
    torch.testing.assert_close(model.features(x), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.fold()(x), model(x), rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        model.gates[0] += 1  # of the first prompted block
    assert (model.features(x) - expected).abs().max() > 1e-6
