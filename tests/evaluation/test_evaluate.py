"""Metrics against scikit-learn, and the order and number of what is evaluated."""

import numpy as np
import pytest
import torch
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    confusion_matrix,
    f1_score,
    roc_auc_score,
)
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import vpt
from vpt.evaluation.evaluate import confusion, predict
from vpt.targets.multiclass import Multiclass

CLASSES = 5


def random_case(seed, present):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor(present)[torch.randint(len(present), (200,), generator=generator)]
    logits = 2 * torch.randn(200, CLASSES, generator=generator)
    logits[torch.arange(200), labels] += 1
    return logits, labels


def mean_auroc(logits, labels):
    """One against the rest, over the classes that occur."""
    probabilities = logits.softmax(-1).numpy()
    present = np.unique(labels)
    return np.mean([roc_auc_score(labels.numpy() == c, probabilities[:, c]) for c in present])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("present", [[0, 1, 2, 3, 4], [0, 2, 4], [1, 2]], ids=str)
def test_same_as_scikit_learn(seed, present):
    logits, labels = random_case(seed, present)
    predicted = logits.argmax(-1)
    metrics = Multiclass().metrics(logits, labels)
    expected = {
        "accuracy": accuracy_score(labels, predicted),
        "balanced_accuracy": np.mean(
            [np.mean((predicted == c)[labels == c].numpy()) for c in present]
        ),
        "macro_f1": f1_score(labels, predicted, average="macro", labels=present),
        "auroc": mean_auroc(logits, labels),
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert metrics["num_test"] == 200
    table = confusion_matrix(labels, predicted, labels=range(CLASSES))
    assert np.array_equal(confusion(logits, labels).numpy(), table)


def test_same_as_scikit_learns_own_names_where_all_classes_occur():
    logits, labels = random_case(0, [0, 1, 2, 3, 4])
    metrics = Multiclass().metrics(logits, labels)
    predicted, probabilities = logits.argmax(-1), logits.softmax(-1)
    assert metrics["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, predicted))
    auroc = roc_auc_score(labels, probabilities, multi_class="ovr", average="macro")
    assert metrics["auroc"] == pytest.approx(auroc, abs=1e-6)
    assert metrics["macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro"))


def test_binary():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (50,), generator=generator)
    logits = torch.randn(50, 2, generator=generator)
    score = roc_auc_score(labels, logits.softmax(-1)[:, 1])
    assert Multiclass().metrics(logits, labels)["auroc"] == pytest.approx(score, abs=1e-6)


def test_one_class_has_no_auroc():
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 3.0, 0.0], [2.0, 0.0, 1.0]])
    metrics = Multiclass().metrics(logits, torch.zeros(3, dtype=torch.long))
    assert metrics["auroc"] is None
    assert metrics["accuracy"] == metrics["balanced_accuracy"] == pytest.approx(2 / 3)
    assert metrics["macro_f1"] == pytest.approx(0.8)


def test_a_class_that_cannot_be_predicted():
    logits, labels = random_case(0, [0, 1, 2])
    logits[:, 4] = -torch.inf  # as linear_probe gives for a class without training images
    metrics = Multiclass().metrics(logits, labels)
    assert metrics["auroc"] == pytest.approx(mean_auroc(logits, labels), abs=1e-6)
    assert all(0 <= value <= 1 for name, value in metrics.items() if name != "num_test")


def test_calibration_error_by_hand():
    # bins of 1/15: [.6, .667), [.667, .733) and [.867, .933)
    confidence = torch.tensor([0.61, 0.69, 0.88, 0.9, 0.92])
    correct = torch.tensor([1, 0, 1, 1, 0])
    logits = torch.stack([confidence, 1 - confidence], dim=-1).log()
    expected = 1 / 5 * abs(1 - 0.61) + 1 / 5 * abs(0 - 0.69) + 3 / 5 * abs(2 / 3 - 0.9)
    assert Multiclass().metrics(logits, 1 - correct)["ece"] == pytest.approx(expected, abs=1e-6)


class Echo(nn.Module):
    """The images are the logits."""

    def forward(self, images):
        assert not self.training
        assert not torch.is_grad_enabled()
        return images


@pytest.mark.parametrize("batch", [1, 3, 7, 100])
def test_all_images_count_once_in_order_whatever_the_batch_size(batch):
    logits, labels = random_case(1, [0, 1, 2, 3, 4])
    logits, labels = logits[:17], labels[:17]
    loader = DataLoader(TensorDataset(logits, labels), batch)
    found = predict(Echo().train(), loader)
    assert torch.equal(found[0], logits)
    assert torch.equal(found[1], labels)
    assert vpt.evaluate(Echo(), loader) == Multiclass().metrics(logits, labels)
    assert vpt.evaluate(Echo(), loader)["num_test"] == 17


def test_any_iterable_of_batches_will_do():
    logits, labels = random_case(1, [0, 1])
    batches = [(logits[:150], labels[:150]), (logits[150:], labels[150:])]
    assert vpt.evaluate(Echo(), batches) == Multiclass().metrics(logits, labels)
