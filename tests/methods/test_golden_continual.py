"""Continual methods against numbers of the official implementations."""

import math

import pytest
import torch
from golden_case import Case, assert_close
from tiny import vit

import vpt
from vpt.methods.ranpac import RanPAC

# Head widths divide feature widths
BACKBONE = {"embed_dim": 24, "num_heads": 2, "num_classes": 0}


def names(count):
    return [f"class {number}" for number in range(count)]


def test_class_means():
    case = Case("simple_cil")
    model = vpt.attach(vit(**BACKBONE), "class_means", class_names=names(7))
    features, labels = case["input.train_features"], case["input.train_labels"]
    test, truth = case["input.test_features"], case["input.test_labels"]
    seen = 0
    for task, size in enumerate(case.config["config"]["tasks"]):
        own = (labels >= seen) & (labels < seen + size)
        seen += size
        model.begin_task(task, 3)
        model.solve(features[own], labels[own])
        logits = model.logits(test[truth < seen])
        assert_close(logits[:, :seen], case[f"expected.logits.task{task}"], 1e-5)
        right = (logits.argmax(1) == truth[truth < seen]).double().mean() * 100
        assert right.item() == pytest.approx(case["expected.accuracy"][task].item(), abs=0.006)
    assert_close(model.head.weight, case["expected.prototypes"], 1e-5)


def ranpac(case, **options):
    options = {"num_features": case.config["config"]["M"], **options}
    model = vpt.attach(vit(**BACKBONE), "ranpac", class_names=names(7), **options)
    model.projection.copy_(case["input.projection"])
    return model


def whole(packed):
    """The sum of both parts of packed triangles, as one symmetric matrix."""
    size = int(math.sqrt(2 * packed.shape[1]))
    gram = torch.zeros(size, size, dtype=packed.dtype)
    gram[tuple(torch.triu_indices(size, size))] = packed.sum(0)
    return (gram + gram.triu(1).T).float()


def test_ranpac():
    case = Case("ranpac")
    model = ranpac(case, select="task")
    test, truth = case["input.test_features"], case["input.test_labels"]
    seen = 0
    for task, size in enumerate(case.config["config"]["tasks"]):
        features = case[f"input.train_features.task{task}"]
        labels = case[f"input.train_labels.task{task}"]
        seen += size
        model.begin_task(task, 3)
        before = model.gram, model.cross
        model.take(features, labels)
        assert model.penalty == case["expected.lambda"][task].item()
        assert_close(whole(model.gram), case[f"expected.G.task{task}"], 1e-5)
        assert_close(model.cross.sum(0).float(), case[f"expected.Q.task{task}"], 1e-5)
        assert_close(model.head.weight[:seen], case[f"expected.weight.task{task}"])
        logits = model.logits(test[truth < seen])
        assert_close(logits[:, :seen], case[f"expected.logits.task{task}"], 1e-5)
        right = (logits.argmax(1) == truth[truth < seen]).double().mean() * 100
        assert right.item() == pytest.approx(case["expected.accuracy"][task].item(), abs=0.006)
        own = [new - old if task else new for new, old in zip((model.gram, model.cross), before)]
        held = len(labels) - int(0.8 * len(labels))
        losses = ((RanPAC.losses(*own) + held) / (held * 7)).float()
        assert_close(losses[9:], case["expected.ridge_losses"][task, 9:], 1e-5)


def test_ranpac_in_another_order_has_the_same_sums():
    case = Case("ranpac")
    model, other = ranpac(case, select="task"), ranpac(case, select="task")
    for one, tasks in ((model, [0, 1, 2]), (other, case.config["other_order"]["tasks"])):
        for number, task in enumerate(tasks):
            one.begin_task(number, 3)
            data = case[f"input.train_features.task{task}"], case[f"input.train_labels.task{task}"]
            one.take(*data)
    torch.testing.assert_close(other.gram, model.gram)
    torch.testing.assert_close(other.cross, model.cross)
    assert (model.penalty, other.penalty) == (100, 1000)
    fixed = torch.linalg.solve(
        whole(other.gram).double() + model.penalty * torch.eye(64), other.cross.sum(0)
    )
    assert_close(fixed.T.float(), case["expected.order.weight_fixed_lambda"])
    stream = [ranpac(case), ranpac(case)]
    for one, tasks in zip(stream, ([0, 1, 2], [2, 0, 1]), strict=True):
        for number, task in enumerate(tasks):
            one.begin_task(number, 3)
            one.take(
                case[f"input.train_features.task{task}"], case[f"input.train_labels.task{task}"]
            )
    assert stream[0].penalty == stream[1].penalty
    assert_close(stream[1].head.weight, stream[0].head.weight)
