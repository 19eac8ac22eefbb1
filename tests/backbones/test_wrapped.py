"""Models given inside another object: unwrapped where that is known, else the mend is said."""

import peft
import pytest
import timm
import torch
import transformers
from families import bare_features, build
from tiny import NAMES, clip, images, vit
from torch import nn

import vpt
from vpt import backbones
from vpt.errors import InputError


class Lightning(nn.Module):
    def __init__(self, **modules):
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)


def average(model):
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    return averaged


WRAPPERS = {
    "data_parallel": nn.DataParallel,
    "compiled": torch.compile,
    "compiled_in_place": lambda model: model.compile() or model,
    "both": lambda model: torch.compile(nn.DataParallel(model)),
    "swa": average,
    "ema": timm.utils.ModelEmaV3,
    "tuple": lambda model: (model, object(), object()),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("name", ["vit", "clip"])
def test_wrappers_are_taken_off(name, wrap):
    model = build(name)
    expected = bare_features(model, images())
    backbone = backbones.adapt(wrap(model))
    assert backbone.knows_rows
    torch.testing.assert_close(backbone(images()), expected)


def test_compiled_blocks_run():
    model = vit()
    expected = bare_features(model, images())
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
    torch.testing.assert_close(backbones.adapt(model)(images()), expected)


def test_layers_of_peft_stay():
    model, plain = vit(), vit()
    before = bare_features(plain, images())
    config = peft.LoraConfig(target_modules=["qkv"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config).eval()
    expected = bare_features(wrapped.get_base_model(), images())
    features = backbones.adapt(wrapped)(images())
    torch.testing.assert_close(features, expected)
    assert (features - before).abs().max() > 1e-2


def test_peft_on_the_attention_of_open_clip_is_merged_first():
    config = peft.LoraConfig(target_modules=["attn"], init_lora_weights=False)
    wrapped = peft.get_peft_model(clip(), config).eval()
    with pytest.raises(InputError, match=r"give model\.merge_and_unload\(\)"):
        vpt.attach(wrapped, class_names=NAMES)
    expected = wrapped.get_base_model().encode_image(images())
    backbone = backbones.adapt(wrapped.merge_and_unload())
    torch.testing.assert_close(backbone(images()), expected, rtol=1e-4, atol=1e-5)
    assert backbone.knows_rows


@pytest.mark.parametrize("classes", [0, 3])
def test_a_wrapper_of_transformers_says_its_preprocessing(classes):
    config = transformers.TimmWrapperConfig(
        architecture="test_vit",
        pretrained_cfg={"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "tag": "mine"},
    )
    if classes:
        config.num_labels = classes
        model = transformers.TimmWrapperForImageClassification(config)
    else:
        model = transformers.TimmWrapperModel(config)
    model.eval()
    batch = images(2, size=160)
    backbone = backbones.adapt(model)
    inner = model.timm_model
    torch.testing.assert_close(
        backbone(batch), inner.forward_head(inner.forward_features(batch), pre_logits=True)
    )
    assert backbone.preprocess.mean == (0.1, 0.2, 0.3)
    assert backbone.config.name == "timm:test_vit.mine"
    assert inner.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)  # the user's stays as it is


HF = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: timm.create_model("test_vit", features_only=True), "without features_only=True"),
        (lambda: transformers.ViTModel(transformers.ViTConfig(**HF)), "timm.create_model"),
        (lambda: Lightning(net=transformers.ViTModel(transformers.ViTConfig(**HF))), "timm"),
        (lambda: Lightning(net=vit(), loss=nn.Linear(2, 2)), r"give model.net \(VisionTransformer"),
        (lambda: Lightning(clip=clip()), r"give model.clip \(CLIP\)$"),
        (lambda: Lightning(student=vit(), teacher=vit()), r"model.student .* or model.teacher"),
        (lambda: nn.Sequential(nn.Identity(), vit()), r"give model.1 \(VisionTransformer\)"),
        (lambda: vpt.attach(vit(), num_classes=2), "give model.backbone"),
        (lambda: torch.jit.trace(vit(), images()), "it is compiled: give the model"),
        (lambda: torch.fx.symbolic_trace(nn.Linear(2, 2)), "it is compiled: give the model"),
        (lambda: "vit_base_patch16_224", r"vpt.backbones.load\('vit_base_patch16_224'\)"),
        (lambda: vit().state_dict(), "is a OrderedDict, not a module: give a timm"),
        (lambda: (), "is a tuple, not a module"),
        (lambda: vit, "is a function, not a module"),
        (lambda: nn.Linear(2, 2), "supported are .*timm VisionTransformer"),
    ],
)
def test_what_to_give_instead_is_said(make, said):
    with pytest.raises(InputError, match=said) as error:
        vpt.attach(make(), class_names=NAMES)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600
