"""Intervals: the weighted metrics against scikit-learn's, the resampling against the theory."""

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from sklearn.metrics import average_precision_score, roc_auc_score
from torch.nn import functional as F

from vpt import targets
from vpt.evaluation.bootstrap import _areas, class_rates, intervals, metric_intervals
from vpt.targets.multiclass import Multiclass

NAMES = ["cat", "dog", "bird"]


def draws(count, patients=None):
    found = []
    intervals(lambda weights: (found.append(weights), weights)[1], count, patients)
    return torch.cat(found)


def case(multilabel=False, count=120):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(len(NAMES), (count,), generator=generator)
    logits = torch.randn(count, len(NAMES), generator=generator) + F.one_hot(labels, len(NAMES))
    if multilabel:
        return logits, (torch.rand(count, len(NAMES), generator=generator) < 0.3).float()
    return logits, labels


def test_images_are_drawn_as_often_as_there_are_images():
    weights = draws(40)
    assert weights.shape == (1000, 40)
    assert (weights.sum(1) == 40).all()
    assert weights.mean().item() == 1
    assert weights.var().item() == pytest.approx(1, abs=0.1)  # binomial: 39 / 40
    assert torch.equal(weights, draws(40))


def test_patients_are_drawn_with_all_their_images():
    patients = ["b", "a", "b", "c", "c", "c"]
    weights = draws(6, patients)
    assert torch.equal(weights[:, 0], weights[:, 2])
    assert torch.equal(weights[:, 3], weights[:, 5])
    drawn = weights[:, [0, 1, 3]]
    assert (drawn.sum(1) == 3).all() and (weights.sum(1) != 6).any()


def test_a_share_has_the_interval_of_the_theory():
    hit = (torch.arange(400) < 300).float()
    ((low, high),) = intervals(lambda w: (w @ hit / w.sum(1))[:, None], 400)
    half = 1.96 * np.sqrt(0.75 * 0.25 / 400)
    assert (low, high) == pytest.approx((0.75 - half, 0.75 + half), abs=0.004)
    # four images a patient, alike: as wide as with a quarter of the images
    patients = [f"p{i // 4}" for i in range(400)]
    ((low, high),) = intervals(lambda w: (w @ hit / w.sum(1))[:, None], 400, patients)
    assert (low, high) == pytest.approx((0.75 - 2 * half, 0.75 + 2 * half), abs=0.008)


@pytest.mark.parametrize("digits", [1, 6])  # with ties, and hardly any
def test_weighted_areas_are_scikit_learns(digits):
    rng = np.random.default_rng(0)
    truth = rng.random(60) < 0.3
    scores = np.round(rng.random(60) + 0.4 * truth, digits)
    weights = draws(60)[:20]
    auroc, auprc = _areas(torch.tensor(scores), torch.tensor(truth), weights)
    for i, weight in enumerate(weights.numpy()):
        assert auroc[i].item() == pytest.approx(roc_auc_score(truth, scores, sample_weight=weight))
        expected = average_precision_score(truth, scores, sample_weight=weight)
        assert auprc[i].item() == pytest.approx(expected)


@pytest.mark.parametrize("multilabel", [False, True])
def test_intervals_are_of_the_metrics(monkeypatch, multilabel):
    logits, labels = case(multilabel)
    metrics = targets.of(labels).metrics(logits, labels)
    found = metric_intervals(targets.of(labels), logits, labels, NAMES)
    pairs = {name.removesuffix("_interval"): found[name] for name in found if name != "per_class"}
    assert pairs.keys() == {"accuracy", "balanced_accuracy", "macro_f1", "auroc", "auprc"}
    for name, (low, high) in pairs.items():
        assert low < metrics[name] < high, name
        assert high - low < 0.35
    # drawn once each, the resamples are the images: both bounds are the metric itself
    once = torch.ones(1, len(labels), dtype=torch.float64)
    monkeypatch.setattr("vpt.evaluation.bootstrap._draw", lambda count, patients: [once])
    for name, pair in metric_intervals(targets.of(labels), logits, labels, NAMES).items():
        if name != "per_class":
            assert pair == pytest.approx([metrics[name.removesuffix("_interval")]] * 2, abs=1e-6)


def test_rates_of_a_class_by_hand():
    truth = torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0, 0, 0]]).bool().T
    called = torch.tensor([[1, 1, 1, 0, 1, 0, 0, 0, 0, 0]]).bool().T
    (rates,) = class_rates(truth, called)
    assert rates["sensitivity"] == 3 / 4
    assert rates["specificity"] == pytest.approx(5 / 6)
    low, high = rates["sensitivity_interval"]
    assert 0 < low < 3 / 4 < high == 1
    (none,) = class_rates(torch.zeros(10, 1).bool(), called)
    assert none["sensitivity"] is None and none["sensitivity_interval"] is None
    assert none["specificity"] == 0.6


def test_all_and_none_have_the_exact_interval():
    truth = (torch.arange(13) < 5)[:, None]
    patients = [f"p{i // 2}" for i in range(13)]  # 3 of the positives, 5 of the others
    exact = {n: binomtest(n, n).proportion_ci() for n in (3, 5, 7, 8, 13)}
    (right,), (wrong,) = class_rates(truth, truth), class_rates(truth, ~truth, patients)
    assert right["sensitivity_interval"] == pytest.approx([exact[5].low, 1])
    assert right["specificity_interval"] == pytest.approx([exact[8].low, 1])
    assert wrong["sensitivity_interval"] == pytest.approx([0, 1 - exact[3].low])
    assert wrong["specificity_interval"] == pytest.approx([0, 1 - exact[5].low])
    logits = torch.eye(2)[truth[:, 0].long()]
    for trials, names in ((13, None), (7, patients)):
        found = metric_intervals(Multiclass(), logits, truth[:, 0].long(), NAMES[:2], names)
        assert found["accuracy_interval"] == pytest.approx([exact[trials].low, 1])


def test_many_classes_have_no_metrics_of_their_own():
    labels = torch.arange(63) % 21
    names = [str(i) for i in range(21)]
    found = metric_intervals(Multiclass(), torch.eye(21)[labels], labels, names)
    assert found.keys() == {"accuracy_interval", "balanced_accuracy_interval", "macro_f1_interval"}


def test_a_class_that_does_not_occur_is_left_out():
    logits, labels = case()
    labels[labels == 2] = 1
    found = metric_intervals(targets.of(labels), logits, labels, NAMES)
    assert found["per_class"]["bird"]["sensitivity"] is None
    low, high = found["balanced_accuracy_interval"]
    assert low < targets.of(labels).metrics(logits, labels)["balanced_accuracy"] < high
