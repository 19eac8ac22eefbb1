"""Changed models: prompts run through what they do, or they are refused; never past it."""

import copy

import peft
import pytest
import torch
from families import MODELS, bare_features, build
from tiny import images
from torch import nn
from torch.nn.utils import parametrize, prune

import vpt
from vpt import backbones
from vpt.backbones.base import Prompts
from vpt.errors import InputError

KINDS = [
    "vit",
    "clip_tower",
    "clip",
    "eva02",
    "dinov3",
    "naflex",
    "beit",
    "relpos",
    "swin",
    "swinv2",
]
SPELLED = {"beit", "relpos", "swin", "swinv2"}  # families whose blocks take no further tokens


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class LoRA(nn.Module):
    """Written by hand, as tutorials do."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear
        self.a = nn.Parameter(torch.randn(2, linear.in_features))
        self.b = nn.Parameter(torch.randn(linear.out_features, 2))

    def forward(self, x):
        return self.linear(x) + x @ self.a.T @ self.b.T


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


def attention(model):
    return next(m for name, m in model.named_modules() if name.endswith(".attn"))


def projection(model):
    """The module whose weights a fast path reads, its parent, and its name there."""
    attn = attention(model)
    name = next(n for n in ("qkv", "q_proj", "out_proj") if getattr(attn, n, None) is not None)
    return attn, name


def subclass(model):
    attn, name = projection(model)
    linear = getattr(attn, name)
    scaled = Scaled(linear.in_features, linear.out_features, linear.bias is not None)
    scaled.load_state_dict(linear.state_dict())
    setattr(attn, name, scaled)


def lora(model):
    attn, name = projection(model)
    setattr(attn, name, LoRA(getattr(attn, name)))


def hook(model):
    attention(model).register_forward_hook(
        lambda _, __, output: (
            (2 * output[0], output[1]) if isinstance(output, tuple) else 2 * output
        )
    )


def pre_hook(model):
    prune.l1_unstructured(getattr(*projection(model)), "weight", 0.5)


def parametrization(model):
    parametrize.register_parametrization(getattr(*projection(model)), "weight", Double())


def replaced(model):
    attn = attention(model)
    forward = attn.forward

    def other(*inputs, **options):
        output = forward(*inputs, **options)
        return (2 * output[0], output[1]) if isinstance(output, tuple) else 2 * output

    attn.forward = other


def by_peft(model):
    _, name = projection(model)
    config = peft.LoraConfig(target_modules=[f"attn.{name}"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, model)


CHANGES = [subclass, lora, hook, pre_hook, parametrization, replaced, by_peft]


# a LoRA without a `weight` breaks the models that read it themselves
READ = {"clip_tower", "clip", "beit", "swinv2"}
PAIRS = [(n, c) for n in KINDS for c in CHANGES if not (c is lora and n in READ)]


@pytest.mark.parametrize(("name", "change"), PAIRS)
def test_a_changed_model_is_run_as_it_is_or_refused(name, change):
    model = build(name)
    before = bare_features(copy.deepcopy(model), images())
    change(model)
    model.eval()
    own = bare_features(model, images())
    try:
        backbone = backbones.adapt(model)
    except InputError as error:
        assert "\n" not in str(error)
        assert name in SPELLED or (own - before).abs().max() < 1e-6, error
        return
    torch.testing.assert_close(backbone(images()), own, rtol=1e-4, atol=1e-4)
    prompts = Prompts(torch.randn(3, 4, max(backbone.widths)), [0, 1, 2])
    fast = backbone(images(), prompts)
    backbone.exact_tokens = True
    torch.testing.assert_close(backbone(images(), prompts), fast, rtol=1e-4, atol=1e-4)
    assert not backbone.knows_rows or (own - before).abs().max() < 1e-6 or name in {"eva02"}


@pytest.mark.parametrize("name", KINDS)
def test_a_changed_forward_of_the_whole_model_is_refused(name):
    model = build(name)
    if name == "clip":
        own = model.encode_image
        model.encode_image = lambda *inputs, **options: 2 * own(*inputs, **options)
    else:
        forward = model.forward
        model.forward = lambda x: 2 * forward(x)
    with pytest.raises(InputError, match=r"gives other features than a .* of its weights"):
        backbones.adapt(model)


def test_quantised_models_are_refused_in_one_line():
    model = torch.ao.quantization.quantize_dynamic(build("vit"), {nn.Linear})
    with pytest.raises(InputError, match="VisionTransformer has quantised layers: give the model"):
        vpt.attach(model, num_classes=2)


def test_untouched_models_are_known():
    others = {name for name in MODELS if not backbones.adapt(build(name)).knows_rows}
    assert others == {"clip_qk_norm", "eva_grouped_heads", "eva_post_norm"}
