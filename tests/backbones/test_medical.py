"""Pathology models and BiomedCLIP through local files of their layout, made small."""

import json
import shutil

import pytest
import timm
import torch
import yaml
from tiny import NAMES, images, perturb

import vpt
from vpt import backbones, resources
from vpt.backbones import clip
from vpt.errors import InputError
from vpt.settings import read_yaml

TINY = {"embed_dim": 24, "depth": 2, "num_heads": 2, "img_size": 112}
ASKED_FOR = [
    name
    for name in resources.names("configs/backbone")
    if "terms" in read_yaml(resources.find("configs/backbone", name))
]


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The preset called `name` with a small model, and a file of that model's weights."""

    def make(name):
        preset = yaml.safe_load(resources.find("configs/backbone", name).read_text())
        preset["options"] = preset.get("options", {}) | TINY
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(preset))
        monkeypatch.setattr(backbones.resources, "find", lambda *_: path)
        torch.manual_seed(0)
        model = perturb(timm.create_model(preset["name"], num_classes=0, **preset["options"]))
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
        return model, tmp_path / "pytorch_model.bin"

    return make


@pytest.mark.parametrize("name", ASKED_FOR)
def test_a_local_file_gives_the_model_of_the_card(small, name):
    model, file = small(name)
    backbone = backbones.load(name, str(file))
    batch = images(2, size=112)
    with torch.no_grad():
        tokens = model.forward_features(batch)
        patches = tokens[:, model.num_prefix_tokens :]
        expected = [tokens[:, 0]] + ([patches.mean(1)] if "virchow" in name else [])
        torch.testing.assert_close(backbone(batch), torch.cat(expected, 1))
    prompted = vpt.attach(backbone, "vpt_deep", class_names=NAMES, num_tokens=3)
    assert prompted(batch).shape == (2, 3)
    assert backbone.num_prefix_tokens == {"uni2_h": 9, "virchow2": 5, "h_optimus_0": 5}.get(name, 1)
    assert backbone.knows_rows
    assert backbone.config.name == name
    own = {"h_optimus_0": (0.707223, 0.578729, 0.703617), "rad_dino": (0.5307,) * 3}
    assert backbone.preprocess.mean == own.get(name, (0.485, 0.456, 0.406))


def test_rad_dino_has_the_layout_of_dinov2(small):
    model, file = small("rad_dino")
    torch.save({**model.state_dict(), "mask_token": torch.zeros(1, TINY["embed_dim"])}, file)
    batch = images(2, size=112)
    with torch.no_grad():
        torch.testing.assert_close(backbones.load("rad_dino", str(file))(batch), model(batch))


@pytest.mark.parametrize("name", ASKED_FOR)
def test_absent_weights_are_named_with_their_terms(name):
    with pytest.raises(InputError) as error:
        backbones.load(name)
    said = str(error.value)
    assert "backbone.checkpoint=FILE" in said
    assert "huggingface.co" in said
    assert any(terms in said for terms in ("CC-BY-NC-ND-4.0", "Apache-2.0", "read the licence"))
    assert "\n" not in said


@pytest.fixture(scope="module")
def biomedclip(tmp_path_factory):
    """The files of BiomedCLIP's page and of its text tower's, with a small BERT and ViT."""
    import open_clip
    import transformers

    folder = tmp_path_factory.mktemp("biomedclip")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of", "."]
    words += [word for name in NAMES for word in name.replace("_", " ").split()]
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    ).save_pretrained(folder)
    source = "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract"
    config = {
        "model_cfg": {
            "embed_dim": 16,
            "vision_cfg": {
                "timm_model_name": "test_vit",
                "timm_model_pretrained": False,
                "timm_pool": "",
                "timm_proj": "linear",
                "image_size": 160,
            },
            "text_cfg": {
                "hf_model_name": source,
                "hf_tokenizer_name": source,
                "hf_proj_type": "mlp",
                "hf_pooler_type": "cls_last_hidden_state_pooler",
                "context_length": 16,
            },
        },
        "preprocess_cfg": {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28]},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    text = config["model_cfg"]["text_cfg"] | {"hf_model_name": str(folder)}
    options = {"text_cfg": text | {"hf_model_pretrained": False}, "load_weights": False}
    model = perturb(open_clip.create_model(f"local-dir:{folder}", pretrained_text=False, **options))
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return folder, model


def test_biomedclip_classifies_and_is_prompted(biomedclip):
    folder, model = biomedclip
    backbone = backbones.load("biomedclip", str(folder))
    assert isinstance(backbone, clip.Adapter)
    assert backbone.preprocess.mean == (0.48, 0.46, 0.41)
    batch = images(2, size=160)
    with torch.no_grad():
        expected = model.encode_image(batch, normalize=False)
        torch.testing.assert_close(backbone(batch), expected)
        tokens = backbone.tokenizer(["a photo of a dog."])
        assert tokens.shape == (1, 16)
        texts = backbone.encode_texts(["a photo of a dog."])
        torch.testing.assert_close(texts, model.encode_text(tokens, normalize=False))
    for method in ("zero_shot", "vpt_deep"):
        assert vpt.attach(backbone, method, class_names=NAMES)(batch).shape == (2, 3)
    prompted = vpt.attach(backbone, "coop", class_names=NAMES, init="a photo of a")
    texts = backbone.tokenizer([f"a photo of a {name.replace('_', ' ')}." for name in NAMES])
    expected = model.encode_text(texts, normalize=False)
    torch.testing.assert_close(prompted.text_features(), expected)


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("open_clip_config.json", "no open_clip_config.json"),
        ("config.json", "copy that of microsoft/BiomedNLP"),
        ("open_clip_pytorch_model.bin", "does not fit"),
    ],
)
def test_a_missing_file_is_named(biomedclip, tmp_path, missing, said):
    folder = shutil.copytree(biomedclip[0], tmp_path / "copy")
    (folder / missing).unlink()
    with pytest.raises(InputError, match=said) as error:
        backbones.load("biomedclip", str(folder))
    assert "\n" not in str(error.value)


def test_what_to_install_is_said(biomedclip, monkeypatch):
    monkeypatch.setattr(backbones, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"visual-prompt-tuning\[transformers\]"):
        backbones.load("biomedclip", str(biomedclip[0]))
