"""A loss, a target and a method of one's own: trained, evaluated, saved and loaded as they are."""

import json

import numpy as np
import pytest
import torch
from tiny import clip, images, vit
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import vpt
from vpt.config import EngineConfig
from vpt.data.images import Samples
from vpt.data.loaders import make_loader
from vpt.errors import InputError
from vpt.losses import Loss
from vpt.methods.base import Batch
from vpt.methods.coop import CoOp
from vpt.methods.vpt_deep import VPTDeep
from vpt.run import run
from vpt.targets.multiclass import Multiclass

CONFIG = {"epochs": 2, "lr": 0.01, "warmup_epochs": 0}


class Focal(Loss):
    """Lin et al. 2017, with γ = 2."""

    def __call__(self, logits, labels):
        losses = self.target.losses(logits, labels)
        return ((1 - (-losses).exp()) ** 2 * losses).mean()


class Priors(Loss):
    """Needs the class counts, and shifts linear heads."""

    def __init__(self, target, counts):
        super().__init__(target, counts)
        self.log_weights = counts().double().log()

    def __call__(self, logits, labels):
        return self.target.loss(logits, labels)


class Votes(Multiclass):
    """Labels (N, C) are proportions of raters."""

    exclusive = False

    def fits(self, labels):
        return labels.ndim == 2

    def conform(self, labels, num_classes):
        return torch.as_tensor(labels)

    def class_counts(self, labels, num_classes):
        return super().class_counts(labels.argmax(-1), num_classes)

    def learnable(self, labels):
        return super().learnable(labels.argmax(-1))

    def _splitter(self, labels, patients):
        return super()._splitter(labels.argmax(-1), patients)

    def splits(self, labels, patients, count):
        return Multiclass().splits(labels.argmax(-1), patients, count)

    def comparable(self, labels, seen, held):
        return super().comparable(labels.argmax(-1), seen, held)

    def regressions(self, labels, num_classes):
        return super().regressions(labels.argmax(-1), num_classes)

    def num_correct(self, logits, labels):
        return super().num_correct(logits, labels.argmax(-1))

    def truth(self, labels, num_classes):
        return super().truth(labels.argmax(-1), num_classes)

    def predicted(self, logits):
        return super().truth(logits.argmax(-1), logits.shape[-1])

    def metrics(self, logits, labels):
        return super().metrics(logits, labels.argmax(-1))


class Anchored(VPTDeep):
    """VPT-deep whose features stay near those of the bare backbone."""

    def frozen_columns(self, images):
        return {**super().frozen_columns(images), "teacher": self.backbone(images)}

    def step(self, batch, loss):
        plain = super().step(batch, loss)
        drift = (self.batch_features(batch) - batch.columns["teacher"]).square().mean()
        terms = {loss.name: plain.total, "drift": drift}
        return plain._replace(total=plain.total + drift, terms=terms)


class Guided(CoOp):
    """CoOp with a column beside its features, which never change either."""

    def frozen_columns(self, images):
        return {"mean": images.mean((1, 2, 3))}

    def step(self, batch, loss):
        plain = super().step(batch, loss)
        return plain._replace(terms={"mean": batch.columns["mean"].mean()})


def samples(count=24, target=None, labels=None):
    pixels = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(count) % 3 if labels is None else labels
    return Samples(pixels, labels, [str(i) for i in range(count)], target=target)


def loader(model, data, **options):
    return make_loader(data, model.backbone.preprocess, 8, train=True, **options)


def attach(method="vpt_deep", **options):
    torch.manual_seed(0)
    return vpt.attach(vit(), method, num_classes=3, num_tokens=2, **options)


def state(model):
    return {name: tensor.clone() for name, tensor in model.artifact_tensors().items()}


def test_a_loss_of_ones_own():
    batches = DataLoader(TensorDataset(images(8), torch.arange(8) % 3), 8)
    model = attach(head="random").eval()
    expected = Focal(model.target)(model(images(8)), torch.arange(8) % 3)
    for loss in (Focal, Focal(Multiclass())):
        torch.manual_seed(0)
        history = vpt.fit(attach(head="random"), batches, config=CONFIG, loss=loss)
        assert history[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)
    plain = vpt.fit(attach(head="random"), batches, config=CONFIG)
    assert plain[0]["loss"] > 1.1 * history[0]["loss"]
    assert "terms" not in plain[0]


def test_a_loss_is_made_from_the_counts_of_what_is_trained_on():
    model = attach(head="crossfit", gated=True)
    data = samples(labels=np.array([0] * 4 + [1] * 8 + [2] * 12))
    weighted = vpt.fit(model, loader(model, data), config=CONFIG, loss=Priors)
    plain = attach(head="crossfit", gated=True)
    vpt.fit(plain, loader(plain, data), config={**CONFIG, "lr": 1e-9}, loss="cross_entropy")
    probe = attach(head="crossfit", gated=True)
    vpt.fit(probe, loader(probe, data), config={**CONFIG, "lr": 1e-9}, loss=Priors)
    shift = probe.head.bias - plain.head.bias
    torch.testing.assert_close(shift, torch.tensor([4.0, 8, 12]).log(), rtol=1e-4, atol=1e-3)
    assert np.isfinite(weighted[-1]["loss"])


def test_an_unknown_loss_names_the_nearest(tmp_path):
    model = attach()
    batches = DataLoader(TensorDataset(images(4), torch.arange(4) % 3), 4)
    said = r"train\.loss=class_balancd: no loss 'class_balancd'; did you mean 'class_balanced'\?"
    with pytest.raises(InputError, match=said):
        vpt.fit(model, batches, config={"loss": "class_balancd"})
    config = vpt.config.load_run("digits_vpt_deep", ["train.loss=focl", f"out={tmp_path / 'run'}"])
    with pytest.raises(InputError, match=r"no loss 'focl'; known: .*cross_entropy"):
        run(config, log=lambda line: None)
    assert not (tmp_path / "run").exists()


def test_a_target_of_ones_own(tmp_path):
    votes = np.random.default_rng(0).dirichlet((1, 1, 1), 24).astype(np.float32)
    model = attach(target=Votes, head="crossfit", gated=True)
    assert isinstance(model.target, Votes)
    data = samples(target=Votes(), labels=votes)
    lines = []
    vpt.fit(model, loader(model, data), config={**CONFIG, "folds": 2}, log=lines.append)
    assert "held-out training images" in lines[-1]
    (record, _) = vpt.fit(model, loader(model, data), config=CONFIG)
    assert 0 < record["loss"] < 10
    batch, labels = images(24), torch.from_numpy(votes)
    expected = F.cross_entropy(model(batch), labels)
    torch.testing.assert_close(model.loss(batch, labels)[0], expected)
    test = make_loader(data, model.backbone.preprocess, 8)
    found = vpt.evaluate(model, test)
    logits = torch.cat([model(x) for x, _ in test]).detach()
    right = (logits.argmax(1) == labels.argmax(1)).float().mean().item()
    assert found["accuracy"] == pytest.approx(right)

    path = vpt.save(model, tmp_path / "votes.safetensors")
    with pytest.raises(InputError, match=r"target Votes is not .*give target=CLASS"):
        vpt.load(path, vit())
    with pytest.raises(InputError, match="its target is Votes, not multiclass"):
        vpt.load(path, vit(), target=Multiclass)
    loaded = vpt.load(path, vit(), target=Votes)
    assert isinstance(loaded.target, Votes)
    torch.testing.assert_close(loaded(batch), model.eval()(batch))


def test_targets_of_this_package_are_named_as_ever(tmp_path):
    for multilabel in (False, True):
        path = vpt.save(attach(multilabel=multilabel), tmp_path / "prompt.safetensors")
        metadata = vpt.artifact.read(path)[1]
        assert metadata["multilabel"] == multilabel and "target" not in metadata


def test_terms_are_means_over_the_images():
    model = attach(Anchored, head="random")
    before = attach(Anchored, head="random").eval()
    data = TensorDataset(images(10), torch.arange(10) % 3)
    still = {"epochs": 1, "warmup_epochs": 0, "lr": 1e-9}
    (record,) = vpt.fit(model, DataLoader(data, 4), config=still)
    batch = Batch(*data.tensors, before.frozen_columns(data.tensors[0]))
    expected = before.step(batch, Focal(before.target))
    assert record["terms"].keys() == {"cross_entropy", "drift"}
    assert record["terms"]["drift"] == pytest.approx(expected.terms["drift"].item(), rel=1e-4)
    assert record["loss"] == pytest.approx(sum(record["terms"].values()), rel=1e-5)
    assert record["terms"]["drift"] > 0


@pytest.mark.parametrize(
    ("augment", "views", "calls"), [("none", None, 1), ("crop", None, 3 * 4), ("crop", 2, 2)]
)
def test_a_frozen_column_is_computed_once_a_view(augment, views, calls, tmp_path):
    counted = []

    class Counting(Anchored):
        def frozen_columns(self, images):
            counted.append(len(images))
            return super().frozen_columns(images)

        def step(self, batch, loss):
            with torch.no_grad():
                torch.testing.assert_close(
                    batch.columns["teacher"], self.backbone(batch.inputs), rtol=1e-4, atol=1e-5
                )
            assert not batch.columns["teacher"].requires_grad
            return super().step(batch, loss)

    model = attach(Counting, head="random")
    batches = make_loader(
        samples(), model.backbone.preprocess, 6, train=True, augment=augment, seed=3
    )
    vpt.fit(model, batches, config={**CONFIG, "epochs": 3, "views": views})
    assert len(counted) == calls


def test_frozen_columns_come_with_splits_and_from_a_folder(tmp_path):
    engine = EngineConfig(feature_cache=tmp_path)
    states = []
    for folder in (None, engine, engine):
        model = attach(Anchored, head="crossfit", gated=True)
        lines = []
        vpt.fit(model, loader(model, samples()), config=CONFIG, engine=folder, log=lines.append)
        states.append(state(model))
    assert "from" in lines[-1]
    for other in states[1:]:
        for name, tensor in states[0].items():
            torch.testing.assert_close(other[name], tensor)


@pytest.mark.parametrize("own", [True, False])
def test_a_frozen_column_beside_frozen_features(own):
    torch.manual_seed(0)
    model = vpt.attach(clip(), Guided, class_names=["cat", "dog", "bird"], num_tokens=2)
    passes = []
    pooled = model.backbone.pooled
    model.backbone.pooled = lambda *inputs: passes.append(1) or pooled(*inputs)
    batches = loader(model, samples())
    pixels = torch.cat([x for x, _ in batches])
    if not own:
        batches = DataLoader(TensorDataset(pixels, torch.arange(24) % 3), 8)
    history = vpt.fit(model, batches, config=CONFIG)
    assert history[0]["terms"]["mean"] == pytest.approx(pixels.mean().item(), abs=1e-5)
    assert len(passes) == (1 if own else 2 * 3)


def test_hooks_are_called_around_each_epoch():
    called = []

    class Hooked(VPTDeep):
        def before_epoch(self, at):
            called.append(("before", at.number, at.count, at.loss.name))

        def step(self, batch, loss):
            called.append("step")
            return super().step(batch, loss)

        def after_epoch(self, at):
            called.append(("after", at.number))
            assert len(at.features().labels) == sum(len(batch.labels) for batch in at.batches) == 24

        def after_training(self, at):
            called.append("end")

    model = attach(Hooked)
    vpt.fit(model, make_loader(samples(), model.backbone.preprocess, 24, train=True), config=CONFIG)
    assert called == [
        *(("before", 0, 2, "cross_entropy"), "step", ("after", 0)),
        *(("before", 1, 2, "cross_entropy"), "step", ("after", 1)),
        "end",
    ]


def test_a_method_of_ones_own_is_loaded_by_its_class(tmp_path):
    model = attach(Anchored)
    path = vpt.save(model, tmp_path / "own.safetensors")
    with pytest.raises(InputError, match=r"method Anchored is not .*give method=CLASS"):
        vpt.load(path, vit())
    with pytest.raises(InputError, match="its method is Anchored, not vpt_deep"):
        vpt.load(path, vit(), method=VPTDeep)
    loaded = vpt.load(path, vit(), method=Anchored)
    assert isinstance(loaded, Anchored)
    torch.testing.assert_close(loaded(images()), model.eval()(images()))


def test_a_loader_may_give_batches_with_columns():
    seen = []

    class Weighted(VPTDeep):
        def step(self, batch, loss):
            seen.append(batch.columns["site"].tolist())
            return super().step(batch, loss)

    def collate(items):
        inputs, labels = (torch.stack(parts) for parts in zip(*items, strict=True))
        return Batch(inputs, labels, {"site": labels + 10})

    data = TensorDataset(images(6), torch.arange(6) % 3)
    for head in ("random", "crossfit"):
        seen.clear()
        model = attach(Weighted, head=head)
        batches = DataLoader(data, 3, collate_fn=collate)
        vpt.fit(model, batches, config={**CONFIG, "epochs": 1})
        assert seen == [[10, 11, 12], [10, 11, 12]]
        assert vpt.evaluate(model, batches)["num_test"] == 6


def test_terms_are_in_the_run_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("vpt.methods.vpt_deep.VPTDeep.step", _with_term)
    settings = ["data.shots=2", "train.epochs=1", "train.min_steps=0", "train.folds=null"]
    config = vpt.config.load_run("digits_vpt_deep", [*settings, f"out={tmp_path / 'run'}"])
    run(config, log=lambda line: None, progress=False)
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["terms"] == {"own": pytest.approx(0.5)}


def _with_term(self, batch, loss):
    plain = super(VPTDeep, self).step(batch, loss)
    return plain._replace(terms={"own": plain.total * 0 + 0.5})


def test_the_parts_of_cross_validation_have_the_same_loss(monkeypatch):
    monkeypatch.setattr("vpt.training.crossval.LEVEL", 2)  # always trained
    used = []

    class Recorded(VPTDeep):
        def step(self, batch, loss):
            used.append(loss.log_weights.exp().sum().item())
            return super().step(batch, loss)

    model = attach(Recorded)
    config = {**CONFIG, "epochs": 1, "folds": 2}
    vpt.fit(model, loader(model, samples()), config=config, loss=Priors)
    assert used == pytest.approx([12, 12, 12, 12, 24, 24, 24])
