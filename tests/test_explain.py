"""Saliency sums to what it explains, for every method and family, and finds what is there."""

import json

import families
import open_clip
import pytest
import tiny
import torch
from PIL import Image
from tiny import clip, images, needs_clip, vit, vpt_cli, write_folder, write_image

import vpt
from vpt import explain, methods
from vpt.backbones import load, load_tiny_clip
from vpt.errors import InputError
from vpt.run import NOTICE
from vpt.targets.multiclass import Multiclass


def attach(backbone, method="vpt_deep", **options):
    return tiny.attach(backbone, method, **options).eval()


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("method", methods.names())
def test_contributions_sum_to_the_logit(method, folded, monkeypatch):
    monkeypatch.setattr(explain, "STEPS", 200)
    model = attach(clip() if needs_clip(method) else vit(), method).double()
    model = model.fold() if folded else model
    image = images(1)[0].double()
    heat = explain.saliency(model, image, 1)
    assert heat.shape == (4, 4)
    with torch.no_grad():
        rise = model(image[None])[0, 1] - model(explain.blur(image)[None])[0, 1]
    torch.testing.assert_close(heat.sum(), rise, rtol=0.01, atol=1e-3)


@pytest.mark.parametrize("family", families.MODELS)
def test_every_family_has_a_map_of_its_patches(family):
    model = attach(families.build(family), num_tokens=3)
    image = images(1)[0]
    heat = explain.saliency(model, image, 0)
    assert tuple(heat.shape) == model.backbone.grid(0, image[None])
    assert heat.abs().sum() > 0


def test_registers_and_prompts_have_no_place_in_the_map():
    for registers in (0, 3):
        for tokens in (1, 7):
            model = attach(vit(reg_tokens=registers), num_tokens=tokens)
            assert explain.saliency(model, images(1)[0], 0).shape == (4, 4)


class Corner(torch.nn.Module):
    """Logits from the brightness of patch (1, 2) alone."""

    target = Multiclass()

    def __init__(self):
        super().__init__()
        self.backbone = attach(vit()).backbone

    def forward(self, x):
        bright = x[:, :, 8:16, 16:24].mean((1, 2, 3))
        return torch.stack([torch.zeros_like(bright), bright], 1)


def test_it_finds_the_one_patch_that_matters():
    image = torch.zeros(3, 32, 32)
    image[:, 8:16, 16:24] = 5
    heat = explain.saliency(Corner(), image, 1)
    assert heat.argmax() == 1 * 4 + 2
    curve = explain.deletion(Corner(), image, 1, heat)
    assert len(curve) == explain.DELETIONS + 1
    whole, blurred = (Corner()(x[None]).softmax(-1)[0, 1] for x in (image, explain.blur(image)))
    torch.testing.assert_close(curve[0], whole)
    torch.testing.assert_close(curve[1:], blurred.expand(explain.DELETIONS), rtol=0, atol=1e-5)
    assert explain.area(curve) < explain.random_area(Corner(), image, 1, heat.shape)
    assert explain.area(explain.deletion(Corner(), image, 1, -heat)) > explain.area(curve)


def test_area_is_the_mean_height():
    assert explain.area(torch.tensor([1.0, 1.0, 1.0])) == 1
    assert explain.area(torch.tensor([1.0, 0.0])) == 0.5


def test_words_of_a_context_that_is_made_of_words():
    backbone = load_tiny_clip()
    ids = open_clip.SimpleTokenizer()(["red circle"])[0, 1:3]
    context = backbone.token_embedding.weight[ids].detach()
    nearest = explain.nearest_words(context, attach(backbone, "coop"))
    assert [row["words"][0] for row in nearest] == ["red</w>", "circle</w>"]
    assert all(row["word_like"] and row["distances"][0] < 1e-3 for row in nearest)


@pytest.mark.parametrize(("size", "drift"), [(0.5, 0), (0.02, 6)])
def test_gibberish_is_called_gibberish(size, drift):
    """Learning moves all vectors a little towards where words are: that makes none a word."""
    backbone = load_tiny_clip()
    generator = torch.Generator().manual_seed(3)
    context = size * torch.randn(4, 128, generator=generator)
    context += drift * backbone.token_embedding.weight.detach().mean(0)
    nearest = explain.nearest_words(context, attach(backbone, "coop"))
    assert [row["word_like"] for row in nearest] == [False] * 4
    assert all(row["random"] > 0 for row in nearest)


@pytest.mark.parametrize("method", ["coop", "cocoop"])
def test_a_context_as_json(method, tmp_path, capfd, monkeypatch):
    artefact, out = tmp_path / "a.safetensors", tmp_path / "out"
    vpt.save(attach(load("tiny_clip"), method, num_tokens=2), artefact)
    code, printed, err = vpt_cli(capfd, monkeypatch, "explain", artefact, "--out", out)
    assert code == 0, err
    record = json.loads((out / "context.json").read_text())
    for row in record["words"]["all"]:
        verdict = "near words" if row["word_like"] else "hardly nearer to words than chance"
        assert row["words"][0] in printed and verdict in printed
    assert ("classes" in record) == (out / "classes.png").is_file() == (method == "coop")
    picture = write_image(tmp_path / "a.png")
    code, printed, err = vpt_cli(capfd, monkeypatch, "explain", artefact, picture, "--out", out)
    assert code == 0, err
    (record,) = json.loads((out / "explain.json").read_text())
    assert ("patch_similarity" in record) == (method == "coop")


def test_words_are_read_as_text():
    """Bytes have letters of their own in CLIP's vocabulary."""
    tokenizer = open_clip.SimpleTokenizer()
    words = {tokenizer.decoder[number]: explain._word(tokenizer, number) for number in range(49408)}
    assert words["cat</w>"] == "cat</w>"
    assert words["caf\u00c3\u00a9</w>"] == "café</w>"


def test_class_embeddings_before_and_after():
    model = attach(load_tiny_clip(), "coop", init="a photo of a", num_tokens=4)
    found = explain.explain_classes(model)
    assert list(found) == model.class_names
    for record in found.values():  # nothing is learned yet
        assert record["shift"] == pytest.approx(1, abs=1e-4)
        before, after = record["nearest"]["before"], record["nearest"]["after"]
        assert before[0] == after[0] != "" and before[1] == pytest.approx(after[1], abs=1e-4)
    with torch.no_grad():
        model.context.add_(torch.randn_like(model.context))
    assert all(record["shift"] < 0.99 for record in explain.explain_classes(model).values())


def test_the_whole_matrix_of_classes_and_its_plot(tmp_path):
    model = attach(load_tiny_clip(), "coop", num_tokens=2)
    records = explain.explain_classes(model)
    after = torch.tensor([record["similarity"]["after"] for record in records.values()])
    texts = torch.nn.functional.normalize(model.text_features(), dim=-1).detach()
    torch.testing.assert_close(after, texts @ texts.T, rtol=0, atol=1e-4)
    assert records != explain.explain_classes(attach(load_tiny_clip(), "zero_shot"))
    explain.draw_classes(records, tmp_path / "classes.png")
    with Image.open(tmp_path / "classes.png") as figure:
        assert len(figure.convert("L").getcolors()) > 30


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("method", ["coop", "ivlp", "zero_shot"])
def test_patches_beside_the_text(method, folded):
    """The map is that of patch tokens without prompts among them, and changes with the text."""
    model = attach(load_tiny_clip(), method)
    model = model.fold() if folded else model
    image, backbone = images(1)[0], model.backbone
    found = torch.stack([explain.patch_similarity(model, image, c) for c in (0, 1)])
    assert found.shape == (2, *backbone.grid(0, image[None]))
    with torch.no_grad():
        (patches,) = model.feature_maps(image[None], [backbone.num_layers - 1])
        projected = backbone.project(backbone.final_norm(patches[0].flatten(1).T[None]))[0]
        wanted = torch.cosine_similarity(projected[:, None], model.text_features()[None], dim=-1)
    torch.testing.assert_close(found.flatten(1).T, wanted[:, :2])
    assert not torch.allclose(found[0], found[1])


def test_no_map_without_texts_or_without_a_class_token():
    with pytest.raises(InputError, match="no class texts"):
        explain.patch_similarity(attach(vit()), images(1)[0], 0)
    model = attach(load_tiny_clip(), "zero_shot")
    model.backbone.readout_tokens = None  # such as the mean of patches
    with pytest.raises(InputError, match="class token"):
        explain.patch_similarity(model, images(1)[0], 0)


def test_command(tmp_path, capfd, monkeypatch):
    data, run = tmp_path / "data.csv", tmp_path / "run"
    files = sorted(write_folder(tmp_path / "data").glob("*/*"))
    rows = [f"{file},{file.parent.name},p{i}" for i, file in enumerate(files)]
    data.write_text("\n".join(["path,label,patient", *rows]))
    settings = ["backbone.name=tiny_clip", "train.epochs=1", "data.shots=2", f"out={run}"]
    settings.append("train.min_steps=0")
    settings.append("data.duplicates=ignore")
    code, _, err = vpt_cli(capfd, monkeypatch, "train", "vpt_deep", f"data.root={data}", *settings)
    assert code == 0, err
    folder = tmp_path / "new"
    pictures = [write_image(folder / f"{name}.png", label) for label, name in enumerate("ab")]
    pictures.append(write_image(tmp_path / "c.png"))
    out = tmp_path / "out"
    artefact = run / "prompt.safetensors"
    code, printed, err = vpt_cli(
        capfd, monkeypatch, "explain", artefact, folder, pictures[2], "--out", out
    )
    assert code == 0, err
    assert NOTICE in err
    assert len(printed.splitlines()) == 3
    records = json.loads((out / "explain.json").read_text())
    assert [record["path"] for record in records] == [str(path) for path in pictures]
    for record in records:
        assert record["class"] in ("cat", "dog") and record["notice"] == NOTICE
        assert record["deletion"][0] == pytest.approx(record["probability"], abs=1e-5)
        assert (out / record["figure"]).stat().st_size > 1000
    code, _, err = vpt_cli(capfd, monkeypatch, "explain", artefact)
    assert (code, "no context" in err, err.count("\n")) == (1, True, 1)
    (tmp_path / "empty").mkdir()
    code, _, err = vpt_cli(capfd, monkeypatch, "explain", artefact, tmp_path / "empty")
    assert (code, "no images in this folder" in err, err.count("\n")) == (1, True, 1)
