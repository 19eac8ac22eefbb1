"""Average precision is COCO's, with and without resampling; free response and counts by hand."""

import numpy as np
import pytest
import torch

from vpt.data.boxes import BoxedImages
from vpt.dense.detector import Objects
from vpt.dense.metrics import (
    _coco,
    average_precisions,
    choose_threshold,
    detection_metrics,
    match,
    sensitivities,
)

NAMES = ["one", "two", "three"]


def boxed(boxes, labels, patients=None):
    count = len(boxes)
    rows = [np.array(b, np.float32).reshape(-1, 4) for b in boxes]
    kinds = [np.array(each, np.int64) for each in labels]
    names = [f"{i}.png" for i in range(count)]
    return BoxedImages(names, names, rows, kinds, [(200, 200)] * count, patients)


def noisy(count=40, seed=0):
    """Random objects, and detections near them, elsewhere, and of the wrong class."""
    rng = np.random.default_rng(seed)
    boxes, labels, found = [], [], []
    for _ in range(count):
        number = rng.integers(0, 9)
        corner, sides = rng.uniform(0, 150, (number, 2)), rng.uniform(25, 60, (number, 2))
        own = np.hstack([corner, corner + sides])
        kinds = rng.integers(0, 3, number)
        near = own + rng.normal(0, 3, own.shape)
        far = rng.uniform(0, 100, (4, 2))
        more = np.hstack([far, far + rng.uniform(5, 80, (4, 2))])
        guesses = np.where(rng.random(number) < 0.8, kinds, rng.integers(0, 3, number))
        every = np.vstack([near, near + rng.normal(0, 4, near.shape), more])
        guessed = np.concatenate([guesses, guesses, rng.integers(0, 3, 4)])
        boxes.append(own), labels.append(kinds)
        found.append(
            Objects(
                torch.from_numpy(every).float(),
                torch.from_numpy(guessed),
                torch.from_numpy(rng.random(len(every))).float(),
            )
        )
    return found, boxed(boxes, labels)


def test_average_precision_is_that_of_faster_coco_eval():
    found, truth = noisy()
    coco = _coco(found, truth, NAMES, 100)
    once = torch.ones(1, len(truth), dtype=torch.float64)
    own = torch.stack([average_precisions(each, once)[0] for each in match(found, truth, 3)])
    assert own.mean().item() == pytest.approx(coco["ap"], abs=1e-6)
    for row, (ap, ap50) in zip(own, coco["classes"], strict=True):
        assert row.mean().item() == pytest.approx(ap, abs=1e-6)
        assert row[0].item() == pytest.approx(ap50, abs=1e-6)
    assert 0.2 < coco["ap50"] < 0.9


def test_a_resample_is_the_metric_of_the_drawn_images():
    found, truth = noisy(12)
    drawn = [0, 0, 3, 5, 5, 5, 7, 8, 9, 10, 11, 11]
    weights = torch.bincount(torch.tensor(drawn), minlength=12)[None].double()
    repeated = _coco([found[i] for i in drawn], truth.take(drawn), NAMES, 100)
    own = torch.stack([average_precisions(each, weights)[0] for each in match(found, truth, 3)])
    assert own.mean().item() == pytest.approx(repeated["ap"], abs=2e-3)  # ties of copies


def test_free_response_and_counts_by_hand():
    # two images, an object in each; the best detection is wrong, the next two are right
    truth = boxed([[[0, 0, 10, 10]], [[0, 0, 10, 10]]], [[0], [0]])
    right, wrong = [0.0, 0, 10, 10], [50.0, 50, 60, 60]
    found = [
        Objects(torch.tensor([wrong, right]), torch.tensor([0, 0]), torch.tensor([0.9, 0.8])),
        Objects(torch.tensor([right]), torch.tensor([0]), torch.tensor([0.3])),
    ]
    (matches,) = match(found, truth, 1)
    curve = sensitivities(matches, torch.ones(1, 2, dtype=torch.float64))[0]
    assert curve.tolist() == [0, 0, 1, 1, 1, 1, 1]  # one false positive in two images
    metrics = detection_metrics(found, truth, ["cell"], 0.5, 100)
    own = metrics["per_class"]["cell"]
    assert (own["precision"], own["recall"], own["counting_error"]) == (0.5, 0.5, 1.0)
    assert metrics["froc"]["0.125"] == 0 and metrics["froc"]["0.5"] == 1
    assert choose_threshold(found, truth, 1) == 0.02


def test_nothing_found_and_nothing_there():
    empty = Objects(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    truth = boxed([[[0, 0, 10, 10]], []], [[1], []])
    metrics = detection_metrics([empty, empty], truth, NAMES, 0.5, 100)
    assert metrics["ap"] == metrics["ap50"] == 0
    assert choose_threshold([empty, empty], truth, 3) == 0.5
    found = Objects(torch.tensor([[0.0, 0, 9, 9]]), torch.tensor([1]), torch.tensor([0.9]))
    metrics = detection_metrics([found, empty], truth, NAMES, 0.5, 100)
    assert metrics["per_class"]["one"]["ap"] is None  # no such object: no value
    assert metrics["ap50"] == 1


def test_intervals_hold_the_value_and_follow_patients():
    found, truth = noisy(30)
    low, high = (metrics := detection_metrics(found, truth, NAMES, 0.5, 100))["ap50_interval"]
    assert low < metrics["ap50"] < high
    grouped = boxed(truth.boxes, truth.labels, [str(i // 10) for i in range(30)])
    wider = detection_metrics(found, grouped, NAMES, 0.5, 100)["ap50_interval"]
    assert wider != [low, high]
