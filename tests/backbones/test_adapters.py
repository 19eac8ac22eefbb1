"""Adapters against the bare models, what they share with them, and which weights are refused."""

import copy
import os

import open_clip
import pytest
import safetensors.torch
import timm
import torch
from tiny import clip, images, vit

import vpt
from vpt import backbones
from vpt.errors import InputError

VITS = {
    "plain": {},
    "deit3": {"no_embed_class": True, "init_values": 0.1},
    "dinov2_reg": {"reg_tokens": 4, "no_embed_class": True, "dynamic_img_size": True},
    "qk_norm": {"qk_norm": True, "init_values": 0.5},
    "avg_fc_norm": {"global_pool": "avg", "fc_norm": True},
    "avg_without_class_token": {"global_pool": "avg", "class_token": False},
    "clip_vision": {"pre_norm": True, "final_norm": True},
    "map_pool": {"global_pool": "map", "class_token": False},
    "drop_path": {"drop_path_rate": 0.5, "proj_drop_rate": 0.5},
    "no_head": {"num_classes": 0},
}
MODELS = {**{name: (lambda kw=kw: vit(**kw)) for name, kw in VITS.items()}, "open_clip": clip}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


def bare_features(model, inputs):
    if isinstance(model, open_clip.CLIP):
        return model.encode_image(inputs)
    return model.forward_head(model.forward_features(inputs), pre_logits=True)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_without_prompts_it_is_the_bare_model(model):
    inputs = images()
    backbone = backbones.adapt(model)
    close(backbone(inputs), bare_features(model, inputs))
    assert backbone(inputs).shape == (3, backbone.feature_dim)
    none = torch.empty(1, 0, backbone.width)
    close(backbone(inputs, none, [0]), bare_features(model, inputs))


@pytest.mark.parametrize("layers", [[0], [1], [0, 1]], ids=str)
def test_prompts_act_the_same_wherever_they_stand(model, layers):
    inputs = images()
    backbone = backbones.adapt(model)
    prompts = torch.randn(len(layers), 3, backbone.width)
    prepended = backbone(inputs, prompts, layers, "prepend")
    close(backbone(inputs, prompts, layers, "append"), prepended)
    per_sample = prompts[:, None].expand(-1, len(inputs), -1, -1)
    close(backbone(inputs, per_sample, layers), prepended)
    assert (prepended - backbone(inputs)).abs().max() > 1e-3


def test_gradients_reach_the_prompts_only(model):
    backbone = backbones.adapt(model)
    prompts = torch.randn(2, 3, backbone.width, requires_grad=True)
    backbone(images(), prompts, [0, 1]).square().sum().backward()
    assert prompts.grad.abs().amax(dim=(1, 2)).min() > 0
    assert all(p.grad is None for p in [*model.parameters(), *backbone.parameters()])


def methods_for(model):
    both = ["vpt_deep", "linear_probe", "full_finetune"]
    return [*both, "coop"] if isinstance(model, open_clip.CLIP) else both


def test_attach_leaves_the_users_model_as_it_was(model):
    model.train()
    inputs = images()
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 2 == 0)
    wanted = [p.requires_grad for p in model.parameters()]
    modules = list(model.modules())
    state = copy.deepcopy(model.state_dict())
    torch.manual_seed(0)
    before = bare_features(model, inputs)
    for method in methods_for(model):
        prompted = vpt.attach(model, method, class_names=["cat", "dog"])
        prompted.train()
        if not prompted.solved:
            prompted.loss(inputs, torch.tensor([0, 1, 1]))[0].backward()
    assert all(module.training for module in modules)
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert all(p.grad is None for p in model.parameters())
    assert [id(m) for m in model.modules()] == [id(m) for m in modules]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    torch.manual_seed(0)
    assert torch.equal(bare_features(model, inputs), before)


def test_weights_are_shared_not_copied(model):
    pointers = {p.data_ptr() for p in model.parameters()}
    prompted = vpt.attach(model, "vpt_deep", num_classes=2)
    folded = prompted.fold()
    for view in (prompted, folded):
        assert {p.data_ptr() for p in view.backbone.parameters()} <= pointers
    again = vpt.attach(prompted.backbone, "vpt_shallow", num_classes=2)
    assert {p.data_ptr() for p in again.backbone.parameters()} <= pointers


def test_two_prompted_models_on_one_backbone_do_not_touch_each_other(model):
    inputs, labels = images(), torch.tensor([0, 1, 1])
    torch.manual_seed(0)
    one = vpt.attach(model, "vpt_deep", num_classes=2)
    two = vpt.attach(model, "vpt_shallow", num_classes=2, num_tokens=3).eval()
    three = vpt.attach(one.backbone, "full_finetune", num_classes=2)
    before = two(inputs)
    for trained in (one, three):
        optimizer = torch.optim.SGD(trained.tunable_parameters().values(), lr=0.1)
        trained.train()
        trained.loss(inputs, labels)[0].backward()
        optimizer.step()
    assert torch.equal(two(inputs), before)
    assert all(p.grad is None for p in two.parameters())
    assert not two.training


def swin():
    return timm.create_model("swin_tiny_patch4_window7_224", embed_dim=8, depths=(1, 1, 1, 1))


UNSUPPORTED = {
    "ResNet": lambda: timm.create_model("resnet18", pretrained=False),
    "SwinTransformer": swin,
    "VisionTransformerDistilled": lambda: timm.create_model(
        "deit_tiny_distilled_patch16_224", depth=1
    ),
    "Linear": lambda: torch.nn.Linear(2, 2),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_other_models_are_refused(name):
    with pytest.raises(InputError, match=f"^{name} cannot be prompted: supported are") as caught:
        vpt.attach(UNSUPPORTED[name](), "vpt_deep", num_classes=2)
    assert "\n" not in str(caught.value)


def test_fingerprint_names_the_pretrained_weights(model):
    fingerprint = backbones.adapt(model).fingerprint()
    assert len(fingerprint) == 64
    assert backbones.adapt(copy.deepcopy(model)).fingerprint() == fingerprint
    assert backbones.adapt(model.half().float()).fingerprint() != fingerprint  # rounded
    rounded = backbones.adapt(model).fingerprint()
    assert backbones.adapt(copy.deepcopy(model).double()).fingerprint() == rounded
    with torch.no_grad():
        next(p for p in model.parameters() if p.dim() > 1).view(-1)[-1] += 0.25
    assert backbones.adapt(model).fingerprint() != rounded


def test_fingerprint_leaves_the_classifier_out():
    model = vit()
    fingerprint = backbones.adapt(model).fingerprint()
    model.reset_classifier(7)
    assert backbones.adapt(model).fingerprint() == fingerprint


NAME = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A random ViT-Ti/16 in fp16 and the same numbers in fp32."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    model = timm.create_model(NAME, num_classes=3).half()
    safetensors.torch.save_file(model.state_dict(), folder / "half.safetensors")
    model.float()
    safetensors.torch.save_file(model.state_dict(), folder / "float.safetensors")
    torch.save(model.state_dict(), folder / "float.pth")
    return folder


def test_local_timm_weights_load(weights):
    inputs = images(size=224)
    state = safetensors.torch.load_file(weights / "float.safetensors")
    model = timm.create_model(NAME, num_classes=3).eval()
    model.load_state_dict(state)
    fingerprint = backbones.adapt(model).fingerprint()
    for file in ("half.safetensors", "float.safetensors", "float.pth"):
        backbone = backbones.load(NAME, str(weights / file))
        assert backbone.fingerprint() == fingerprint
        assert backbone.config.name == NAME
        assert not any(p.requires_grad for p in backbone.parameters())
    close(backbone(inputs), bare_features(model, inputs))


def test_local_open_clip_weights_load(tmp_path):
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-S-32-alt").eval()  # the smallest with native towers
    safetensors.torch.save_file(model.state_dict(), tmp_path / "clip.safetensors")
    backbone = backbones.load("ViT-S-32-alt", str(tmp_path / "clip.safetensors"))
    assert backbone.fingerprint() == backbones.adapt(model).fingerprint()
    inputs = images(1, size=224)
    close(backbone(inputs), model.encode_image(inputs))
    close(backbone.encode_texts(["a cat"]), model.encode_text(open_clip.tokenize(["a cat"])))


class Bomb:
    """A pickle of it creates the file `marker` when it is executed."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("name", [NAME, "ViT-B-32"])
@pytest.mark.parametrize("suffix", ["pth", "bin"])
def test_code_in_a_pickle_is_refused_and_not_executed(tmp_path, name, suffix):
    marker = tmp_path / "executed"
    path = tmp_path / f"weights.{suffix}"
    torch.save({"state_dict": {"a": torch.ones(1), "b": Bomb(marker)}}, path)
    with pytest.raises(InputError, match=rf"weights\.{suffix}: not a file of weights") as caught:
        backbones.load(name, str(path))
    assert "\n" not in str(caught.value)
    assert not marker.exists()
    torch.load(path, weights_only=False)  # the bomb is live
    assert marker.exists()


def broken_files(folder, weights):
    whole = (weights / "half.safetensors").read_bytes()
    other = vit().state_dict()
    files = {
        "truncated.safetensors": whole[: len(whole) // 2],
        "header.safetensors": whole[:20],
        "empty.safetensors": b"",
        "text.pth": b"hello",
        "other.safetensors": safetensors.torch.save(other),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    torch.save([1, 2], folder / "list.pth")


@pytest.mark.parametrize("name", [NAME, "ViT-B-32"])
@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("missing.safetensors", "no such file"),
        ("truncated.safetensors", "not a file of weights"),
        ("header.safetensors", "not a file of weights"),
        ("empty.safetensors", "not a file of weights"),
        ("text.pth", "not a file of weights"),
        ("list.pth", "list.pth"),
        ("other.safetensors", "does not fit"),
    ],
)
def test_a_bad_checkpoint_is_one_line_that_names_it(tmp_path, weights, name, file, message):
    broken_files(tmp_path, weights)
    with pytest.raises(InputError, match=message) as caught:
        backbones.load(name, str(tmp_path / file))
    assert "\n" not in str(caught.value)
    assert file in str(caught.value)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("vit_tiny_patch16_22", "vit_tiny_patch16_224"),
        ("tiny_clp", "tiny_clip"),
        ("ViT-B-33", "ViT-B-32"),
    ],
)
def test_an_unknown_name_says_the_nearest(name, near):
    with pytest.raises(InputError, match=f"backbone.name={name}: .*{near}"):
        backbones.load(name)


def test_the_embedded_clip_takes_no_other_weights(weights):
    with pytest.raises(InputError, match="tiny_clip"):
        backbones.load("tiny_clip", str(weights / "half.safetensors"))


def test_the_embedded_clip_loads():
    backbone = backbones.load("tiny_clip")
    assert backbone(images()).shape == (3, backbone.feature_dim)
    assert backbone.encode_texts(["a cat", "a dog"]).shape == (2, backbone.feature_dim)
