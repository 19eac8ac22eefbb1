"""Adapters against the bare models, what they share with them, and which weights are refused."""

import copy
import os

import open_clip
import pytest
import safetensors.torch
import timm
import torch
from families import MODELS, bare_features, build, clip, is_clip, naflex
from tiny import images, vit

import vpt
from vpt import backbones
from vpt.backbones.base import Prompts
from vpt.errors import InputError


@pytest.fixture(params=MODELS)
def model(request):
    return build(request.param)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def random_prompts(backbone, count, **kwargs):
    return torch.randn(count, 3, max(backbone.widths), **kwargs)


def test_every_family_has_a_model_here():
    built = {type(backbones.adapt(build(name))) for name in MODELS}
    assert built == set(backbones.families())


def test_without_prompts_it_is_the_bare_model(model):
    inputs = images()
    backbone = backbones.adapt(model)
    close(backbone(inputs), bare_features(model, inputs))
    assert backbone(inputs).shape == (3, backbone.feature_dim)
    none = torch.empty(1, 0, backbone.width)
    close(backbone(inputs, Prompts(none, [0])), bare_features(model, inputs))


def test_prompts_act_the_same_wherever_they_stand(model):
    inputs = images()
    backbone = backbones.adapt(model)
    backbone.exact_tokens = True
    bare = backbone(inputs)
    for layers in ([0], [1], [0, 1, 2]):
        prompts = random_prompts(backbone, len(layers))
        prepended = backbone(inputs, Prompts(prompts, layers, "prepend"))
        close(backbone(inputs, Prompts(prompts, layers, "append")), prepended)
        close(backbone(inputs, Prompts(prompts.flip(1), layers)), prepended)
        per_sample = prompts[:, None].expand(-1, len(inputs), -1, -1)
        close(backbone(inputs, Prompts(per_sample, layers)), prepended)
        assert (prepended - bare).abs().max() > 1e-4


def test_an_image_sees_its_own_prompts_and_no_other_image(model):
    inputs = images()
    backbone = backbones.adapt(model)
    prompts = torch.randn(2, 3, 4, max(backbone.widths))  # a set for each image
    for backbone.exact_tokens in (False, True):
        together = backbone(inputs, Prompts(prompts, [0, 1]))
        for index in range(3):
            alone = backbone(inputs[index : index + 1], Prompts(prompts[:, index], [0, 1]))
            close(together[index : index + 1], alone)


def test_gradients_reach_the_prompts_only(model):
    backbone = backbones.adapt(model)
    prompts = random_prompts(backbone, 3, requires_grad=True)
    backbone(images(), Prompts(prompts, [0, 1, 2])).square().sum().backward()
    assert prompts.grad.abs().amax(dim=(1, 2)).min() > 0
    assert all(p.grad is None for p in [*model.parameters(), *backbone.parameters()])


def bare_maps(model, inputs):
    """The model's own feature maps, and the blocks that they follow."""
    tower = model.visual if is_clip(model) else model
    settings = {"intermediates_only": True}
    if isinstance(tower, open_clip.transformer.VisionTransformer | open_clip.timm_model.TimmModel):
        maps = tower.forward_intermediates(inputs, **settings)["image_intermediates"]
    else:
        maps = tower.forward_intermediates(inputs, norm=False, **settings)
    return maps, [1, 2] if len(maps) == 2 else [0, 1, 2]  # Swin gives one a stage


def test_feature_maps_are_of_the_patches(model):
    inputs = images()
    backbone = backbones.adapt(model)
    expected, blocks = bare_maps(model, inputs)
    for ours, theirs in zip(backbone.feature_maps(inputs, indices=blocks), expected, strict=True):
        close(ours, theirs)
    prompts = random_prompts(backbone, 2)
    maps = {}
    for position in ("prepend", "append"):
        for backbone.exact_tokens in (False, True):
            way = position, backbone.exact_tokens
            maps[way] = backbone.feature_maps(inputs, Prompts(prompts, [0, 1], position))
    assert len(maps["append", True]) == 3
    for others in maps.values():
        for one, other in zip(others, maps["append", True], strict=True):
            close(one, other)
    for index, plain in zip(blocks, expected, strict=True):
        prompted = maps["append", True][index]
        assert prompted.shape == plain.shape
        assert (prompted - plain).abs().max() > 1e-4


def test_methods_fold_save_and_load(model, tmp_path):
    inputs = images()
    for method in ("vpt_shallow", "vpt_deep", "random_prompts", "full_finetune"):
        prompted = vpt.attach(model, method, num_classes=3).eval()
        logits = prompted(inputs)
        assert logits.shape == (3, 3)
        close(prompted.fold()(inputs), logits)
        path = vpt.save(prompted, tmp_path / f"{method}.safetensors")
        close(vpt.load(path, backbone=model)(inputs), logits)


def test_full_finetuning_trains_the_whole_image_tower(model):
    prompted = vpt.attach(model, "full_finetune", num_classes=2)
    prompted.loss(images(), torch.tensor([0, 1, 1]))[0].backward()
    assert not [n for n, p in prompted.tunable_parameters().items() if p.grad is None]


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


def clip_of(trunk):
    vision = {"timm_model_name": trunk, "timm_model_pretrained": False, "timm_proj": "linear"}
    return clip(vision=vision)


UNSUPPORTED = {
    "ResNet": lambda: timm.create_model("test_resnet"),
    "ConvNeXt": lambda: timm.create_model("test_convnext"),
    "VisionTransformerRelPos": lambda: timm.create_model(
        "vit_relpos_base_patch32_plus_rpn_256", embed_dim=32, num_heads=2, depth=1
    ),
    "NaFlexVit": lambda: naflex(rope_type="axial"),
    "ModifiedResNet": lambda: clip(vision={"layers": [1, 1, 1, 1], "head_width": 64}),
    "EfficientNet": lambda: clip_of("test_efficientnet"),
    "Linear": lambda: torch.nn.Linear(2, 2),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_other_models_are_refused(name):
    with pytest.raises(InputError, match=f"^{name} cannot be prompted: supported are") as caught:
        vpt.attach(UNSUPPORTED[name](), "vpt_deep", num_classes=2)
    assert "\n" not in str(caught.value)


def test_images_of_another_size_are_refused():
    backbone = backbones.adapt(MODELS["vit"]())
    with pytest.raises(InputError, match="images of 40×40, but the backbone takes"):
        backbone(torch.zeros(1, 3, 40, 40))


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
