"""Images with any number of classes: every method, and from an .npz file to predictions."""

import json
import random
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    f1_score,
    roc_auc_score,
)
from tiny import attach, clip, images, loader, samples, vit, vpt_cli, write_image
from torch.nn import functional as F

import vpt
from vpt import methods
from vpt.config import DataConfig, load_run
from vpt.data.fewshot import split_shots
from vpt.data.sources import open_source
from vpt.errors import InputError
from vpt.losses.cross_entropy import CrossEntropy
from vpt.methods.base import Batch
from vpt.run import run
from vpt.targets.multilabel import Multilabel

NAMES = ["mass", "nodule", "hernia"]


def findings(count, seed=0, noise=60):
    """Grey or coloured images: a channel is bright where its class is there."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((count, len(NAMES))) < (0.5, 0.4, 0.2)).astype(np.uint8)
    pixels = rng.integers(0, noise, (count, 28, 28, 3)) + 150 * labels[:, None, None]
    return pixels.astype(np.uint8), labels


@pytest.mark.parametrize("method", methods.names())
def test_every_method_trains_saves_and_folds(tmp_path, method):
    backbone = clip()
    model = attach(backbone, method, class_names=NAMES, multilabel=True)
    pixels, labels = findings(24)
    batches = loader(model, samples(labels, pixels=pixels), seed=1)
    history = vpt.fit(model, batches, config={"epochs": 2})
    assert all(0 <= record["accuracy"] <= 1 for record in history)
    assert model.class_names == NAMES
    batch = images(4)
    logits = model(batch)
    assert logits.shape == (4, len(NAMES)) and logits.isfinite().all()
    if not model.solved:
        labels = torch.eye(4)[:, :3]
        expected = F.binary_cross_entropy_with_logits(logits, labels)
        with torch.no_grad():
            columns = model.frozen_columns(batch)
        step = model.step(Batch(batch, labels, columns), CrossEntropy(model.target))
        own = step.terms.get("cross_entropy", step.total)  # of a method that adds to it
        if "classes" in step.terms:  # of one with losses of two branches, which its tests compare
            expected = step.total
        assert own.item() == pytest.approx(expected.item(), rel=1e-4)
    folded = model.fold()
    assert folded.target.name == "multilabel"
    torch.testing.assert_close(folded(batch), logits, rtol=1e-4, atol=1e-4)
    loaded = vpt.load(vpt.save(model, tmp_path / "prompt.safetensors"), clip())
    assert loaded.target.name == "multilabel" and loaded.class_names == NAMES
    torch.testing.assert_close(loaded(batch), logits, rtol=1e-4, atol=1e-4)


def test_zero_shot_compares_a_finding_with_its_absence():
    model = vpt.attach(
        clip(), "zero_shot", class_names=NAMES, templates=["an X-ray of {}."], multilabel=True
    )
    names = [*NAMES, *(f"no {name}" for name in NAMES)]
    both = vpt.attach(clip(), "zero_shot", class_names=names, templates=["an X-ray of {}."])
    similarity = both(images())
    torch.testing.assert_close(model(images()), similarity[:, :3] - similarity[:, 3:])


def test_linear_probe_is_a_regression_a_class():
    rng = torch.Generator().manual_seed(0)
    features = torch.randn(60, 32, generator=rng)
    labels = (features[:, :3] + torch.randn(60, 3, generator=rng) > 0).float()
    labels[:, 1], labels[0, 2] = 0, 1
    model = vpt.attach(vit(), "linear_probe", class_names=NAMES, multilabel=True)
    model.solve(features, labels)
    probability = model.logits(features).sigmoid().detach()
    assert (probability[:, 1] < 1e-6).all()
    for index in (0, 2):
        single = vpt.attach(vit(), "linear_probe", num_classes=2)
        single.solve(features, labels[:, index].long())
        expected = single.logits(features).softmax(-1)[:, 1]
        torch.testing.assert_close(probability[:, index], expected.detach())
    labels[:, 1] = 1
    model.solve(features, labels)
    assert (model.logits(features)[:, 1] > 10).all()


def test_metrics_are_scikit_learns_means():
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(80, 4, generator=generator) < 0.3).float()
    labels[:, 3] = 0  # never: it has no area
    logits = 2 * torch.randn(80, 4, generator=generator) + labels
    metrics = Multilabel().metrics(logits, labels)
    truth, scores, said = labels[:, :3].numpy(), logits[:, :3].numpy(), logits[:, :3].numpy() > 0
    expected = {
        "accuracy": ((logits > 0) == labels).float().mean().item(),
        "auroc": roc_auc_score(truth, scores, average="macro"),
        "auprc": average_precision_score(truth, scores, average="macro"),
        "macro_f1": f1_score(truth, said, average="macro"),
        "balanced_accuracy": np.mean(
            [balanced_accuracy_score(t, s) for t, s in zip(truth.T, said.T, strict=True)]
        ),
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert 0 < metrics["ece"] < 1 and metrics["num_test"] == 80


def test_scores_near_one_are_no_ties():
    logits = torch.tensor([[30.0, -1], [31.0, 1], [32.0, -1], [33.0, 1]])
    assert (
        Multilabel().metrics(logits, torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1.0]]))["auroc"] == 1
    )


@pytest.mark.parametrize("shots", [1, 4, 500])
def test_every_class_gets_its_shots(shots):
    _, labels = findings(300)
    chosen = Multilabel().draw(labels, shots, random.Random(1))
    assert len(set(chosen)) == len(chosen)
    drawn, there = labels[chosen], labels.sum(0)
    assert (drawn.sum(0) >= np.minimum(shots, there)).all()
    assert len(chosen) <= (len(NAMES) + 1) * shots
    empty = (~labels.any(1)).sum()
    assert (~drawn.any(1)).sum() == min(shots, empty)
    assert chosen == Multilabel().draw(labels, shots, random.Random(1))
    assert shots == 500 or chosen != Multilabel().draw(labels, shots, random.Random(2))


@pytest.fixture
def npz(tmp_path):
    arrays = {}
    for seed, (part, count) in enumerate([("train", 80), ("val", 60), ("test", 60)]):
        arrays[f"{part}_images"], arrays[f"{part}_labels"] = findings(count, seed)
    np.savez(tmp_path / "chest.npz", **arrays)
    return tmp_path / "chest.npz"


def test_from_an_npz_file_to_predictions(tmp_path, capfd, monkeypatch, npz):
    cli = partial(vpt_cli, capfd, monkeypatch)
    out = tmp_path / "run"
    settings = ["backbone.name=tiny_clip", f"data.root={npz}", "data.shots=8", f"out={out}"]
    settings += ["data.classes=[mass, nodule, hernia]", "train.epochs=2", "train.min_steps=0"]
    code, said, err = cli("train", "vpt_shallow", *settings, "decision.sensitivity.hernia=0.9")
    assert code == 0, err
    assert "3 classes, any number an image" in err
    result = json.loads((out / "result.json").read_text())
    assert result["auroc"] > 0.9 and result["num_test"] == 60
    assert result["per_class"].keys() == set(NAMES)
    assert result["decision"]["thresholds"]["hernia"]["sensitivity"] > 0.5
    assert not (out / "confusion.png").exists()

    code, shown, _ = cli("eval", out / "prompt.safetensors")
    assert code == 0
    assert shown.splitlines()[0] == said.splitlines()[0]

    path = write_image(tmp_path / "new.png", 1)
    code, line, err = cli("predict", "--json", out / "prompt.safetensors", path)
    assert code == 0, err
    prediction = json.loads(line)
    assert prediction.keys() == {"path", "labels", "probabilities"}
    threshold = result["decision"]["thresholds"]["hernia"]["threshold"]
    least = {"mass": 0.5, "nodule": 0.5, "hernia": threshold}
    above = [name for name in NAMES if prediction["probabilities"][name] >= least[name]]
    assert prediction["labels"] == above
    code, text, _ = cli("predict", out / "prompt.safetensors", path)
    assert text.startswith(f"{path}\t")


def test_chestmnist_has_fourteen_findings(tmp_path, monkeypatch):
    monkeypatch.setattr("vpt.data.sources._check_sums", lambda root, card: None)
    monkeypatch.setattr("vpt.data.sources._check_dump", lambda parts, card, where: None)
    arrays = {}
    for part in ("train", "val", "test"):
        arrays[f"{part}_images"] = np.zeros((28, 28, 28), np.uint8)
        arrays[f"{part}_labels"] = np.eye(14, dtype=np.uint8).repeat(2, 0)
    np.savez(tmp_path / "chestmnist_64.npz", **arrays)
    source = open_source(DataConfig(root=tmp_path / "chestmnist_64.npz"))
    assert (
        source.name == "chestmnist" and source.target.name == "multilabel" and source.card.medical
    )
    assert source.class_names == source.card.classes
    split = split_shots(source, 1, seed=1)
    assert (split.train.labels.sum(0) == 1).all() and len(split.test) == 28


@pytest.mark.parametrize(
    ("method", "setting", "said"),
    [
        ("linear_probe", "decision.alpha=0.1", "need data with one class an image"),
        ("linear_probe", "decision.coverage=0.9", "need data with one class an image"),
        ("vpt_deep", "train.loss=class_balanced", "multilabel data has cross_entropy only"),
        ("linear_probe", "train.loss=logit_adjusted", "linear_probe is fitted without it"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_file(tmp_path, npz, method, setting, said):
    settings = ["backbone.name=tiny_clip", f"data.root={npz}", f"out={tmp_path / 'run'}"]
    config = load_run(method, [*settings, "data.shots=4", setting])
    with pytest.raises(InputError, match=said):
        run(config, log=lambda line: None)
    assert not (tmp_path / "run").exists()
