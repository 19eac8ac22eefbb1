"""Files of weights as they are found: read to the right features, or refused in one line."""

import argparse
import json
import pickle
import re

import numpy as np
import open_clip
import pytest
import safetensors.torch
import timm
import torch
import transformers
from tiny import images, perturb
from torch import nn

from vpt import backbones
from vpt.errors import InputError

NAME = "vit_tiny_patch16_224"
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


class Config(dict):
    """An object of one's own, as trainings save them beside weights."""


class Bomb:
    """An object that runs code where a pickle is executed."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.fixture
def small(monkeypatch):
    """Has NAME built small; returns one with other weights, and its features of `images()`."""
    build = timm.models.vision_transformer.VisionTransformer.__init__

    def built(self, *args, **options):
        build(self, *args, **options | TINY)

    monkeypatch.setattr(timm.models.vision_transformer.VisionTransformer, "__init__", built)
    model = perturb(timm.create_model(NAME, num_classes=7))
    with torch.no_grad():
        return model.state_dict(), model.forward_head(model.forward_features(images()), True)


def prefixed(state, prefix):
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def other(state):
    return {name: torch.randn_like(tensor) for name, tensor in state.items()}


def lightning(state):
    beside = {"loss.weight": torch.ones(7), "metric.total": torch.tensor(3)}
    hyper = {"hyper_parameters": Config(lr=np.float64(0.1), net=nn.Identity), "epoch": 3}
    return {"state_dict": prefixed(state, "model.") | beside, **hyper}


def dino(state):
    head = {"head.mlp.0.weight": torch.ones(3, 3)}
    return {
        "student": prefixed(other(state), "module.backbone.") | prefixed(head, "module."),
        "teacher": prefixed(state, "backbone.") | head,
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []},
        "args": argparse.Namespace(lr=0.1),
    }


def moco(state):
    state = {name: t for name, t in state.items() if not name.startswith("head")}
    state |= {"head.0.weight": torch.ones(5, 32)}
    momentum = prefixed(other(state), "module.momentum_encoder.")
    return {"arch": "vit", "state_dict": momentum | prefixed(state, "module.base_encoder.")}


HOLDERS = {
    "plain": lambda state: state,
    "model": lambda state: {"model": state, "epoch": 1},
    "ema": lambda state: {"state_dict": other(state), "state_dict_ema": state},
    "module": lambda state: prefixed(state, "module."),
    "compiled": lambda state: prefixed(state, "_orig_mod.module."),
    "net": lambda state: {"net": prefixed(state, "net.")},
    "backbone": lambda state: {"backbone": state, "head": {"w": torch.ones(2)}},
    "dinov2": lambda state: {"teacher": prefixed(state, "backbone.") | {"dino.w": torch.ones(2)}},
    "decoder": lambda state: {"model": state | {"decoder_blocks.0.weight": torch.ones(2)}},
    "trunk": lambda state: prefixed(state, "visual.trunk.") | {"logit_scale": torch.ones([])},
    "scalars": lambda state: {"model": state, "best": np.float64(0.9), "at": np.int64(3)},
    "arrays": lambda state: {"model": state, "curve": np.arange(3.0)},
    "lightning": lightning,
    "dino": dino,
    "moco": moco,
    "ema_beside": lambda state: {"model": other(state), "ema": state},
    "params_ema": lambda state: {"params": other(state), "params_ema": state},
    "optimizer": lambda state: {"optimizer": {"state": {}}, "net": state},
}


@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS)
def test_what_holds_weights_is_taken_off(small, tmp_path, hold):
    state, expected = small
    torch.save(hold(state), tmp_path / "file.pth.tar")
    backbone = backbones.load(NAME, str(tmp_path / "file.pth.tar"))
    torch.testing.assert_close(backbone(images()), expected)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_safetensors_are_known_by_content(small, tmp_path, suffix):
    safetensors.torch.save_file(prefixed(small[0], "encoder."), tmp_path / f"model{suffix}")
    backbone = backbones.load(NAME, str(tmp_path / f"model{suffix}"))
    torch.testing.assert_close(backbone(images()), small[1])


def test_checkpoints_of_old_torch(small, tmp_path):
    held = {"state_dict": small[0], "args": argparse.Namespace(lr=1), "best": np.float64(1)}
    torch.save(held, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    backbone = backbones.load(NAME, str(tmp_path / "old.pth"))
    torch.testing.assert_close(backbone(images()), small[1])


HF = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32}
HF |= {"patch_size": 8, "layer_norm_eps": 1e-6}


@pytest.mark.parametrize("form", ["file", "folder", "memory"])
@pytest.mark.parametrize("kind", ["ViTModel", "ViTForImageClassification", "Dinov2Model"])
def test_names_of_transformers(small, tmp_path, kind, form):
    name = kind.partition("For")[0].removesuffix("Model")
    options = HF if name == "Dinov2" else HF | {"intermediate_size": 128}
    model = getattr(transformers, kind)(getattr(transformers, f"{name}Config")(**options))
    perturb(model)
    file = tmp_path / "model.safetensors"
    if form != "memory":
        model.save_pretrained(tmp_path)
        file = tmp_path if form == "folder" else file
    else:
        file = tmp_path / "model.pth"
        torch.save(model.state_dict(), file)
    architecture = "vit_small_patch14_dinov2" if name == "Dinov2" else NAME
    backbone = backbones.load(architecture, str(file))
    with torch.no_grad():
        expected = getattr(model, model.base_model_prefix, model)(images()).last_hidden_state[:, 0]
    torch.testing.assert_close(backbone(images()), expected, rtol=1e-4, atol=1e-5)


def arrays(state, depth=2):
    """The ViT authors' names and axes."""
    found = {
        "cls": state["cls_token"],
        "embedding/kernel": state["patch_embed.proj.weight"].permute(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
        "head/kernel": torch.zeros(32, 21843),
        "head/bias": torch.zeros(21843),
    }
    for number in range(depth):
        own = {n.split(".", 2)[2]: t for n, t in state.items() if n.startswith(f"blocks.{number}.")}
        block = f"Transformer/encoderblock_{number}"
        attention = f"{block}/MultiHeadDotProductAttention_1"
        for part, w, b in zip(
            ("query", "key", "value"),
            own["attn.qkv.weight"].chunk(3),
            own["attn.qkv.bias"].chunk(3),
            strict=True,
        ):
            found[f"{attention}/{part}/kernel"] = w.T.reshape(32, 2, 16)
            found[f"{attention}/{part}/bias"] = b.reshape(2, 16)
        found[f"{attention}/out/kernel"] = own["attn.proj.weight"].T.reshape(2, 16, 32)
        found[f"{attention}/out/bias"] = own["attn.proj.bias"]
        for index, norm in ((0, "norm1"), (2, "norm2")):
            found[f"{block}/LayerNorm_{index}/scale"] = own[f"{norm}.weight"]
            found[f"{block}/LayerNorm_{index}/bias"] = own[f"{norm}.bias"]
        for index, layer in enumerate(("mlp.fc1", "mlp.fc2")):
            found[f"{block}/MlpBlock_3/Dense_{index}/kernel"] = own[f"{layer}.weight"].T
            found[f"{block}/MlpBlock_3/Dense_{index}/bias"] = own[f"{layer}.bias"]
    return {name: tensor.numpy() for name, tensor in found.items()}


def test_arrays_of_the_vit_authors(small, tmp_path):
    np.savez(tmp_path / "imagenet21k_ViT-B_16.npz", **arrays(small[0]))
    backbone = backbones.load(NAME, str(tmp_path / "imagenet21k_ViT-B_16.npz"))
    torch.testing.assert_close(backbone(images()), small[1])


def test_arrays_of_another_depth_or_kind(small, tmp_path):
    np.savez(tmp_path / "short.npz", **arrays(small[0], depth=1))
    with pytest.raises(InputError, match="found 1 blocks, wanted 2"):
        backbones.load(NAME, str(tmp_path / "short.npz"))
    np.savez(tmp_path / "data.npz", train_images=np.zeros(3))
    with pytest.raises(InputError, match=f"data.npz: does not fit {NAME}"):
        backbones.load(NAME, str(tmp_path / "data.npz"))


CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 24, "vocab_size": 64, "width": 16, "heads": 2, "layers": 2},
}
CLIP_HOLDERS = {
    "plain": lambda state: state,
    "open_clip": lambda state: {"state_dict": prefixed(state, "module."), "epoch": 1},
    "lightning": lambda state: {"state_dict": prefixed(state, "model.clip."), "at": np.int64(3)},
    "jit": lambda state: {**state, "context_length": torch.tensor(24)},
    "namespace": lambda state: {"model": state, "args": argparse.Namespace(lr=1)},
}


@pytest.fixture
def small_clip(tmp_path):
    (tmp_path / "small.json").write_text(json.dumps(CLIP))
    open_clip.add_model_config(tmp_path / "small.json")
    return perturb(open_clip.CLIP(**CLIP))


@pytest.mark.parametrize("hold", CLIP_HOLDERS.values(), ids=CLIP_HOLDERS)
def test_files_of_a_clip(small_clip, tmp_path, hold):
    torch.save(hold(small_clip.state_dict()), tmp_path / "clip.pt")
    backbone = backbones.load("open_clip:small", str(tmp_path / "clip.pt"))
    with torch.no_grad():
        expected = small_clip.encode_image(images())
        torch.testing.assert_close(backbone(images()), expected)
        torch.testing.assert_close(
            backbone.encode_texts(["x"], lambda texts: torch.arange(24)[None]),
            small_clip.encode_text(torch.arange(24)[None]),
        )


def test_nothing_of_a_pickle_is_executed(small, small_clip, tmp_path):
    file, trace = tmp_path / "bomb.pth", tmp_path / "trace"
    torch.save({"model": small[0], "beside": Bomb(trace)}, file)
    torch.testing.assert_close(backbones.load(NAME, str(file))(images()), small[1])
    torch.save({"model": small_clip.state_dict(), "beside": Bomb(trace)}, file)
    backbones.load("open_clip:small", str(file))
    file.write_bytes(pickle.dumps(Bomb(trace)))
    trace.unlink(missing_ok=True)
    with pytest.raises(InputError, match="can be read safely"):
        backbones.load(NAME, str(file))
    assert not trace.exists()


def deeper(state):
    return state | {n.replace("blocks.1", "blocks.2"): t for n, t in state.items()}


REFUSED = {
    "two": (
        lambda state: prefixed(state, "left.") | prefixed(state, "right."),
        r"weights of several models, left\., right\.: save those of one",
    ),
    "deeper": (deeper, r"found blocks\.2\.norm1\.weight and 11 more"),
    "shallower": (
        lambda state: {n: t for n, t in state.items() if "blocks.1" not in n},
        r"wanted blocks\.1\.norm1\.weight and 11 more",
    ),
    "wider": (
        lambda state: state | {"norm.weight": torch.ones(64)},
        r"norm\.weight is \[64\], wanted \[32\]",
    ),
    "another": (
        lambda state: {f"layer{i}.conv.weight": torch.ones(3) for i in range(150)},
        r"found layer0\.conv\.weight and 149 more, wanted cls_token and \d+ more",
    ),
    "nothing": (lambda state: {"epoch": 3, "args": [1]}, "found epoch, args, wanted weights, or"),
    "list": (lambda state: [1, 2], r"a list, wanted a model's state_dict\(\)"),
    "whole": (lambda state: nn.Linear(2, 2), r"a whole pickled model: save its state_dict\(\)"),
    "whole_inside": (lambda state: {"model": nn.Linear(2, 2)}, "a whole pickled model"),
}


@pytest.mark.parametrize(("make", "said"), REFUSED.values(), ids=REFUSED)
def test_what_was_found_and_wanted_is_said(small, tmp_path, make, said):
    torch.save(make(small[0]), tmp_path / "file.pth")
    with pytest.raises(InputError, match=said) as error:
        backbones.load(NAME, str(tmp_path / "file.pth"))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 350


def test_files_that_are_no_weights(small, small_clip, tmp_path):
    file = tmp_path / "file.pt"
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), file)
    for name in (NAME, "open_clip:small"):
        with pytest.raises(InputError, match=r"TorchScript archive.*checkpoint=openai"):
            backbones.load(name, str(file))
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(InputError, match="run git lfs pull"):
        backbones.load(NAME, str(file))
    file.write_text("<!DOCTYPE html>")
    with pytest.raises(InputError, match=r"not a file of weights .PyTorch.*download") as error:
        backbones.load(NAME, str(file))
    assert not re.search("\n", str(error.value))
