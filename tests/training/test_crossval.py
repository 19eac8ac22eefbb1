"""Training is kept only where held-out training images say that it helps."""

from functools import partial

import numpy as np
import pytest
import tiny
import torch
from tiny import loader, samples
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

import vpt
from vpt.config import EngineConfig
from vpt.data import loaders
from vpt.data.images import Samples
from vpt.errors import InputError
from vpt.evaluation.evaluate import predict
from vpt.losses.class_balanced import ClassBalanced
from vpt.progress import TrainingBar
from vpt.targets.multiclass import Multiclass
from vpt.training import crossval, dial
from vpt.training import fit as train
from vpt.training.crossval import judged_parts, training_helps
from vpt.training.dial import FACTORS
from vpt.training.training_set import TrainingSet


def judge(model, data, learn, start=lambda images: None, balanced=False):
    lines, before = [], {name: t.clone() for name, t in model.artifact_tensors().items()}
    steps = (start, learn, partial(predict, model))
    images = TrainingSet(loader(model, data), model.target, len(model.class_names))
    helps = training_helps(model, images, judged_parts(images, 3), balanced, *steps, lines.append)
    torch.testing.assert_close(dict(model.artifact_tensors()), before, rtol=0, atol=0)
    return helps, lines


def set_bias(model, label, size):
    with torch.no_grad():
        model.head.bias.copy_(size * F.one_hot(torch.tensor(label), 2))


@pytest.mark.parametrize(("label", "helps"), [(0, True), (1, False)])
def test_answers_on_held_out_images_decide(label, helps):
    model = vpt.attach(tiny.vit(), num_classes=2)
    data = samples([0] * 24 + [1] * 6)
    actual, lines = judge(model, data, lambda images: set_bias(model, label, 20.0))
    assert actual == helps
    assert "of 30 held-out training images" in lines[-1]


def test_a_training_that_changes_nothing_does_not_help():
    model = vpt.attach(tiny.vit(), num_classes=2)
    assert not judge(model, samples([0, 1] * 6), lambda images: None)[0]


def test_one_image_of_a_class_leaves_it_as_it_starts():
    model = vpt.attach(tiny.vit(), num_classes=2)
    helps, lines = judge(model, samples([0, 0, 0, 1]), lambda images: set_bias(model, 0, 20.0))
    assert not helps
    assert "too few images" in lines[-1]


def test_held_out_images_and_patients_are_not_learned_from():
    model = vpt.attach(tiny.vit(), num_classes=2)
    data = samples([0, 0, 1, 1] * 6, patients=[f"p{index // 2}" for index in range(24)])
    seen = []
    judge(model, data, lambda images: seen.append(images.dataset.samples))
    assert len(seen) == 3
    assert sorted(len(part) for part in seen) == [16, 16, 16]
    for part in seen:
        held = set(data.names) - set(part.names)
        patients = {data.patients[int(name)] for name in held}
        assert patients.isdisjoint(part.patients)


@pytest.mark.parametrize("augment", ["none", "crop_flip"])
def test_every_image_is_decoded_once_a_run(monkeypatch, augment):
    monkeypatch.setattr(crossval, "LEVEL", 2)  # always trained
    reads, read = [], Samples.read

    def spy(self, index, **options):
        reads.append(self.names[index])
        return read(self, index, **options)

    monkeypatch.setattr(Samples, "read", spy)
    model = vpt.attach(tiny.vit(), num_classes=2, gated=True, head="crossfit")
    data = samples([0, 1] * 6)
    vpt.fit(model, loader(model, data, augment=augment), config={"epochs": 2, "folds": 2})
    # augmented images start from the whole picture, plain ones are kept as crops
    assert sorted(reads) == sorted(data.names * (1 if augment == "none" else 2))


def test_images_that_do_not_fit_into_memory_are_said(monkeypatch):
    monkeypatch.setattr(loaders, "CACHE_BYTES", 3 * 32 * 32 * 3)
    model, lines = vpt.attach(tiny.vit(), num_classes=2), []
    images = loader(model, samples([0, 1] * 6))
    vpt.fit(model, images, config={"epochs": 1}, log=lines.append)
    assert any("memory: 9 of 12 images do not fit" in line for line in lines)


def test_patients_of_both_classes():
    labels, patients = [0, 1, 1, 1, 0, 1, 1, 0], ["p0"] * 5 + ["p1"] * 2 + ["p2"]
    model = vpt.attach(tiny.vit(), num_classes=2)
    vpt.fit(model, loader(model, samples(labels, patients)), config={"epochs": 1, "folds": 3})


def test_a_rare_class_does_not_stop_the_others():
    model = vpt.attach(tiny.vit(), num_classes=3)
    data, lines = samples([0] * 12 + [1] * 11 + [2]), []
    vpt.fit(model, loader(model, data), config={"epochs": 1, "folds": 3}, log=lines.append)
    assert "of 23 held-out" in lines[-1]  # without the one that no split can learn


def test_balanced_classes_count_alike():
    # 24 of a class improve a little, 6 of the other get much worse
    model = vpt.attach(tiny.vit(), num_classes=2)
    torch.nn.init.zeros_(model.head.weight)
    torch.nn.init.zeros_(model.head.bias)
    data = samples([0] * 24 + [1] * 6)
    helps = [judge(model, data, lambda _: set_bias(model, 0, 1.0), balanced=b)[0] for b in (0, 1)]
    assert helps == [True, False]


def test_the_loss_is_of_all_images_after_the_splits(monkeypatch):
    monkeypatch.setattr(crossval, "LEVEL", 2)  # always trained
    model = vpt.attach(tiny.vit(), num_classes=2)
    used, real = [], model.step

    def spy(batch, loss):
        used.append(loss.log_weights)
        return real(batch, loss)

    model.step = spy
    config = {"epochs": 1, "loss": "class_balanced", "folds": 3}
    vpt.fit(model, loader(model, samples([0] * 16 + [1] * 8)), config=config)
    weights = ClassBalanced(model.target, lambda: torch.tensor([16, 8])).log_weights
    assert torch.equal(used[-1], weights)
    assert not torch.equal(used[0], weights)


@pytest.mark.parametrize("options", [{}, {"gated": True, "head": "crossfit"}])
def test_a_resumed_fit_is_not_judged_again(tmp_path, monkeypatch, options):
    monkeypatch.setattr(crossval, "LEVEL", 2)  # always trained
    data, config = samples([0, 1] * 6), {"epochs": 3, "folds": 2, "lr": 1e-2}

    class Stop(Exception):
        pass

    def fit(name, stop_after=3):
        def on_epoch(history):
            if len(history) > stop_after:
                raise Stop

        torch.manual_seed(0)
        model, lines = vpt.attach(tiny.vit(), num_classes=2, **options), []
        told = {"checkpoint": tmp_path / f"{name}.pt", "on_epoch": on_epoch, "log": lines.append}
        try:
            history = vpt.fit(model, loader(model, data), config=config, **told)
        except Stop:
            return any("cross-validation" in line for line in lines), [], []
        judged = any("cross-validation" in line for line in lines)
        gates = [] if model.gates is None else model.gates.tolist()
        return judged, [(record["loss"], record.get("factor")) for record in history], gates

    judged, *expected = fit("whole")
    assert judged
    assert fit("stopped", stop_after=1) == (True, [], [])
    assert fit("stopped") == (False, *expected)


def test_the_run_compiles_after_splits_that_do_not(monkeypatch):
    monkeypatch.setattr(crossval, "LEVEL", 2)  # always trained
    compiled, make = [], train.make_accelerator

    def spy(precision, compile):
        compiled.append(compile)
        return make(precision, False)

    monkeypatch.setattr(train, "make_accelerator", spy)
    model = vpt.attach(tiny.vit(), num_classes=2)
    config, engine = {"epochs": 1, "folds": 2}, EngineConfig(compile=True)
    vpt.fit(model, loader(model, samples([0, 1] * 4)), config=config, engine=engine)
    assert compiled == [True, False, False, True]  # before, in each split, and after


def test_the_default_recipe_falls_back_to_the_linear_probe():
    # labels at random: nothing can be learned
    data = samples([0, 1] * 12)
    lines = []
    model = vpt.attach(tiny.vit(), num_classes=2, gated=True, head="crossfit")
    config = {"epochs": 2, "lr": 1e-2, "folds": 3}
    (record,) = vpt.fit(model, loader(model, data), config=config, log=lines.append)
    probe = vpt.attach(tiny.vit(), "linear_probe", num_classes=2)
    (expected,) = vpt.fit(probe, loader(probe, data))
    assert any("left as it starts" in line for line in lines)
    assert not model.gates.any()
    torch.testing.assert_close(model(tiny.images()), probe(tiny.images()))
    assert record["accuracy"] == expected["accuracy"]


def test_multilabel():
    model = vpt.attach(tiny.vit(), class_names=["a", "b"], multilabel=True)
    labels = np.random.default_rng(0).integers(0, 2, (12, 2))
    config = {"epochs": 1, "folds": 2}
    lines = []
    vpt.fit(model, loader(model, samples(labels)), config=config, log=lines.append)
    assert "of 12 held-out" in " ".join(lines)


def helps(first, trained, labels):
    """`judge` of these logits of images with these labels: before training, and after."""
    model = vpt.attach(tiny.vit(), num_classes=first.shape[1], multilabel=labels.ndim == 2)
    data = samples(labels)
    logits = {
        name: row for name, row in zip(data.names, zip(first, trained, strict=True), strict=True)
    }
    state = {"after": 0}

    def predict(test):
        part = test.dataset.samples
        chosen = [logits[name][state["after"]] for name in part.names]
        state["after"] = 1 - state["after"]
        return torch.stack(chosen), torch.from_numpy(part.labels)

    images = TrainingSet(loader(model, data), model.target, len(model.class_names))
    nothing = lambda _: None  # noqa: E731
    return training_helps(
        model, images, judged_parts(images, 3), False, nothing, nothing, predict, nothing
    )


def test_surer_is_not_better():
    labels = torch.arange(60) % 3
    first = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    first += 1.0 * F.one_hot(labels)
    better = first + 0.5 * F.one_hot(labels)
    assert not helps(first, 4 * first, labels.numpy())
    assert not helps(4 * better, first, labels.numpy())
    assert helps(first, 4 * better, labels.numpy())


def test_a_class_that_no_split_learned_does_not_make_surer_better():
    labels = torch.cat([torch.arange(60) % 3, torch.tensor([3])])
    first = torch.randn(61, 4, generator=torch.Generator().manual_seed(0))
    first += 1.0 * F.one_hot(labels)
    surer = 4 * first
    first[:, 3] = surer[:, 3] = -1e4
    assert not helps(first, surer, labels.numpy())
    marks = F.one_hot(labels)[:, [0, 3]]  # multilabel, with one image of the second class
    assert not helps(first[:, [0, 3]] - 0.5, surer[:, [0, 3]] - 2, marks.numpy())


def test_a_split_with_nothing_to_judge_is_left_out(monkeypatch):
    parts = [(np.arange(8), np.arange(8, 10)), (np.arange(2, 10), np.arange(2))]
    monkeypatch.setattr(Multiclass, "splits", lambda *_: parts)
    model, seen = vpt.attach(tiny.vit(), num_classes=3), []
    judge(model, samples([0, 1] * 4 + [2, 2]), seen.append)
    assert len(seen) == 1


def test_all_right_is_not_worse_than_a_few_wrong():
    labels = torch.arange(40) % 2
    unsure = 0.2 * F.one_hot(labels)
    wrong = 8.0 * F.one_hot(labels)
    wrong[:2] = -wrong[:2]
    assert not helps(unsure, wrong, labels.numpy())


@pytest.mark.parametrize(("enough", "count"), [(3, 1), (8, 1), (14, 1), (15, 2), (30, 3)])
def test_enough_images_are_held_out(monkeypatch, enough, count):
    monkeypatch.setattr(crossval, "ENOUGH", enough)
    model, seen = vpt.attach(tiny.vit(), num_classes=2), []
    judge(model, samples([0, 1] * 15), seen.append)
    assert len(seen) == count


class Stream(IterableDataset):
    def __iter__(self):
        return zip(tiny.images(4), [0, 1, 0, 1], strict=True)


@pytest.mark.parametrize(
    "batches",
    [
        DataLoader(Stream(), 2),
        DataLoader([(tiny.images(1)[0], 0)], batch_sampler=[[0]]),
    ],
)
def test_a_loader_without_parts_is_refused(batches):
    model = vpt.attach(tiny.vit(), num_classes=2)
    with pytest.raises(InputError, match=r"train\.folds=3 needs a DataLoader with a batch_size"):
        vpt.fit(model, batches, config=vpt.recipe("vpt_deep")[1])
    model = vpt.attach(tiny.vit(), num_classes=2, head="crossfit")
    with pytest.raises(InputError, match=r"head=crossfit needs a DataLoader with a batch_size"):
        vpt.fit(model, batches)


def test_a_loader_without_batches_is_refused():
    model = vpt.attach(tiny.vit(), num_classes=2)
    batches = DataLoader([(tiny.images(1)[0], 0)], 2, drop_last=True)
    with pytest.raises(InputError, match=r"train\.folds=3: the DataLoader has no batch"):
        vpt.fit(model, batches, config={"folds": 3})


@pytest.mark.parametrize("level", [2, 0])  # always trained, never
def test_one_bar_counts_the_batches_of_all_stages(monkeypatch, level):
    monkeypatch.setattr(crossval, "LEVEL", level)
    monkeypatch.setattr(dial, "LIKELY", level)
    counted, moved = [], []
    next_stage, tick, move = TrainingBar.next_stage, TrainingBar.tick, TrainingBar._move

    def spy_stage(self):
        next_stage(self)
        counted.append([self._size, 0])

    def spy_tick(self):
        tick(self)
        counted[-1][1] += 1

    def spy_move(self, done, **shown):
        move(self, done, **shown)
        moved.append(done / self.total)

    monkeypatch.setattr(TrainingBar, "next_stage", spy_stage)
    monkeypatch.setattr(TrainingBar, "tick", spy_tick)
    monkeypatch.setattr(TrainingBar, "_move", spy_move)
    model = vpt.attach(tiny.vit(), num_classes=2, gated=True, head="crossfit")
    config = {"epochs": 2, "folds": 2, "min_steps": 6}
    vpt.fit(model, loader(model, samples([0, 1] * 12)), config=config)
    parts = 1 + 2 * 4 + len(FACTORS)  # a pass before, 2 epochs of 4 steps, a pass a factor
    assert counted[0] == [parts, parts if level else 1]
    # then 2 epochs of 4 steps, and a pass after them
    assert counted[1:] == ([[2 * 4 + 1] * 2] if level else [])
    assert moved[-1] == 1
    assert max(moved) == 1
