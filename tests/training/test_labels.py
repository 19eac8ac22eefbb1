"""Labels of one's own loader: taken where they plainly say the classes, else refused in a line."""

from functools import partial

import numpy as np
import pytest
import tiny
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

import vpt
from vpt.errors import InputError
from vpt.methods.base import Batch

IMAGES, CLASSES = tiny.images(12), torch.arange(12) % 3
ROWS = F.one_hot(CLASSES, 3)
CONFIG = {"epochs": 1, "lr": 0.1, "precision": "fp32", "warmup_epochs": 0}


def batches(labels, images=IMAGES, hold=lambda images, labels: (images, labels)):
    """A DataLoader of two batches, as `hold` makes them."""
    parts = [(images[place], labels[place]) for place in (slice(8), slice(8, 12))]
    return DataLoader(range(12), 8, collate_fn=lambda places: hold(*parts[places[0] // 8]))


def trained(loader, **options):
    model = tiny.attach(tiny.vit(), num_classes=3, num_tokens=2, **options)
    history = vpt.fit(model, loader, config=CONFIG)
    return history[0]["loss"], vpt.evaluate(model, loader)


LABELS = {
    "column": CLASSES[:, None],
    "int32": CLASSES.int(),
    "uint8": CLASSES.byte(),
    "floats": CLASSES.float(),
    "float_column": CLASSES.double()[:, None],
    "one_hot": ROWS,
    "one_hot_floats": ROWS.float(),
    "one_hot_bool": ROWS.bool(),
    "array": CLASSES.numpy(),
    "list": CLASSES.tolist(),
}


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_labels_that_plainly_say_the_class_are_taken(labels):
    assert trained(batches(labels)) == trained(batches(CLASSES))


HOLDERS = {
    "mapping": lambda images, labels: {"image": images, "label": labels, "path": ["x.png"]},
    "transformers": lambda images, labels: {"pixel_values": images, "labels": labels},
    "path": lambda images, labels: (images, labels, ["x.png"] * len(labels)),
    "list": lambda images, labels: [images, labels],
    "number": lambda images, labels: (images, labels, torch.arange(len(labels))),
    "batch": Batch,
}


@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS)
def test_images_and_labels_are_found_in_a_batch(hold):
    assert trained(batches(CLASSES, hold=hold)) == trained(batches(CLASSES))


@pytest.mark.parametrize("setting", ["folds", "class_balanced", "crossfit", "linear_probe"])
def test_labels_are_taken_wherever_they_are_read(setting):
    config = CONFIG | {"folds": {"folds": 3}, "class_balanced": {"loss": "class_balanced"}}.get(
        setting, {}
    )
    options = {"crossfit": {"head": "crossfit"}}.get(setting, {})
    histories = []
    for labels in (CLASSES, CLASSES[:, None].float()):
        method = "linear_probe" if setting == "linear_probe" else "vpt_deep"
        model = tiny.attach(tiny.vit(), method, num_classes=3, **options)
        data = [{"img": i, "target": label} for i, label in zip(IMAGES, labels, strict=True)]
        history = vpt.fit(model, DataLoader(data, 8), config=config)
        histories.append([record | {"seconds": 0} for record in history])
    assert histories[0] == histories[1]


@pytest.mark.parametrize("kind", ["int64", "bool", "float64", "uint8"])
def test_rows_of_a_multilabel_model(kind):
    expected = trained(batches(ROWS.float()), multilabel=True)
    assert trained(batches(ROWS.to(getattr(torch, kind))), multilabel=True) == expected


WRONG = {
    "from_1": (CLASSES + 1, r"shape \(8,\), 1 to 3: classes count from 0 to 2, so subtract 1"),
    "ignored": (CLASSES - 1, r"shape \(8,\), -1 to 1: .*leave out images without a class"),
    "beyond": (CLASSES * 2, r"shape \(8,\), 0 to 4: classes count from 0 to 2$"),
    "between": (CLASSES * 0.5, r"shape \(8,\), 0 to 1: give class numbers \(B,\), 0 to 2"),
    "nan": (CLASSES * torch.nan, r"shape \(8,\), nan to nan: give class numbers"),
    "several": (ROWS + ROWS.roll(1, 1), r"shape \(8, 3\), 0 to 1: .* with multilabel=True"),
    "none": (ROWS * 0, r"shape \(8, 3\), 0 to 0: give one class an image, or"),
    "soft": (ROWS * 0.9 + 0.05, r"shape \(8, 3\), 0.05 to 0.95: give one class"),
    "other_classes": (F.one_hot(CLASSES, 5), r"shape \(8, 5\), 0 to 1: give class numbers"),
    "masks": (torch.zeros(12, 4, 4), r"shape \(8, 4, 4\), 0 to 0: give class numbers"),
    "names": (["cat"] * 12, r"are of type str: give numbers"),
}


@pytest.mark.parametrize(("labels", "said"), WRONG.values(), ids=WRONG)
def test_other_labels_are_refused_with_batch_shape_and_range(labels, said):
    loader = batches(labels)
    model = tiny.attach(tiny.vit(), num_classes=3)
    fit = partial(vpt.fit, model, loader, config=CONFIG)
    for read in (fit, partial(vpt.evaluate, model, loader)):
        with pytest.raises(InputError, match=f"^batch 0 of the loader: labels .*{said}") as error:
            read()
        assert "\n" not in str(error.value)


def test_the_batch_is_numbered():
    labels = CLASSES.clone()
    labels[-1] = 7
    with pytest.raises(InputError, match=r"^batch 1 of the loader: labels of shape \(4,\), 0 to 7"):
        trained(batches(labels))


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (CLASSES, r"shape \(8,\), 0 to 2: give rows \(B, 3\) of 0 and 1; .* without multilabel"),
        (ROWS - 1, r"shape \(8, 3\), -1 to 0: give rows \(B, 3\) of 0 and 1$"),
        (ROWS * 2, r"shape \(8, 3\), 0 to 2: give rows \(B, 3\) of 0 and 1$"),
    ],
)
def test_rows_that_are_refused(labels, said):
    with pytest.raises(InputError, match=said):
        trained(batches(labels), multilabel=True)


@pytest.mark.parametrize(
    ("hold", "said"),
    [
        (lambda images, labels: {"a": images, "label": labels}, "it has a, label: name its images"),
        (lambda images, labels: images, "it is a Tensor: give images and labels"),
        (lambda images, labels: (images,), "it is a tuple: give images and labels"),
        (lambda images, labels: (labels, images), r"images are torch.int64 of shape \(8,\): give"),
        (lambda images, labels: (images.byte(), labels), "images are torch.uint8 of shape"),
        (lambda images, labels: (["x"], labels), "images are list of shape"),
    ],
)
def test_batches_that_are_refused(hold, said):
    with pytest.raises(InputError, match=f"batch 0 of the loader: {said}"):
        trained(batches(CLASSES, hold=hold))


def test_labels_of_data_beyond_the_classes_are_refused_before_training():
    model = tiny.attach(tiny.vit(), num_classes=2)
    loader = tiny.loader(model, tiny.samples(np.arange(6) % 3))
    with pytest.raises(InputError, match="classes count from 0 to 1"):
        vpt.fit(model, loader, config=CONFIG)
