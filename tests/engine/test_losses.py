"""Losses for unequal classes: by hand, and what they do to a rare class."""

import math

import pytest
import torch
from tiny import images, vit
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import vpt
from vpt.engine.losses import BETA, log_class_weights, make_criterion
from vpt.errors import InputError

COUNTS = torch.tensor([900, 100])
LOGITS = torch.tensor([[2.0, 0.5], [0.3, 0.1], [-1.0, 1.0]])
LABELS = torch.tensor([0, 1, 1])


def criterion(name, counts):
    return make_criterion(name, log_class_weights(name, counts))


def test_logit_adjustment_by_hand():
    loss = criterion("logit_adjusted", COUNTS)(LOGITS, LABELS)
    adjusted = LOGITS + torch.tensor([math.log(0.9), math.log(0.1)])
    expected = -torch.stack([adjusted.softmax(1)[i, y].log() for i, y in enumerate(LABELS)]).mean()
    assert loss.item() == pytest.approx(expected.item())


def test_class_balance_by_hand():
    loss = criterion("class_balanced", COUNTS)(LOGITS, LABELS)
    effective = [(1 - BETA**n) / (1 - BETA) for n in (900, 100)]
    weights = [2 / effective[y] / sum(1 / n for n in effective) for y in (0, 1)]
    losses = F.cross_entropy(LOGITS, LABELS, reduction="none")
    expected = sum(weights[y] * x.item() for y, x in zip(LABELS, losses, strict=True)) / 3
    assert loss.item() == pytest.approx(expected)
    assert weights[1] > 5 * weights[0]


@pytest.mark.parametrize("name", ["logit_adjusted", "class_balanced"])
def test_equal_classes_are_plain_cross_entropy(name):
    loss = criterion(name, torch.tensor([50, 50]))(LOGITS, LABELS)
    assert loss.item() == pytest.approx(F.cross_entropy(LOGITS, LABELS).item())


@pytest.mark.parametrize("name", ["logit_adjusted", "class_balanced"])
def test_a_class_without_images_breaks_nothing(name):
    loss = criterion(name, torch.tensor([3, 0]))(LOGITS, torch.zeros(3, dtype=torch.long))
    assert loss.isfinite()


def fit(loss, method="random_prompts", labels=None):
    """Share of the images that are taken for the rare class, which nothing tells from the other."""
    torch.manual_seed(0)
    labels = (torch.arange(40) < 4).long() if labels is None else labels
    data = TensorDataset(images(40), labels)
    options = {} if method == "linear_probe" else {"num_tokens": 2, "head": "random"}
    model = vpt.attach(vit(), method, num_classes=2, multilabel=labels.dim() == 2, **options)
    config = {"epochs": 20, "lr": 0.02, "warmup_epochs": 0, "loss": loss, "batch_size": 40}
    vpt.fit(model, DataLoader(data, 40, shuffle=True), config=config)
    with torch.no_grad():
        return (model(images(200, seed=5)).argmax(1) == 1).float().mean().item()


def test_the_rare_class_is_found_more_often():
    plain = fit("cross_entropy")
    assert plain < 0.2
    for loss in ("class_balanced", "logit_adjusted"):
        assert fit(loss) > plain + 0.1


def test_a_later_fit_has_its_own_loss():
    data = DataLoader(TensorDataset(images(8), (torch.arange(8) < 2).long()), 8)
    model = vpt.attach(vit(), "vpt_deep", num_classes=2)
    logits, labels = torch.randn(2, 2), torch.tensor([0, 1])
    losses = []
    for loss in ("logit_adjusted", "cross_entropy"):
        vpt.fit(model, data, config={"epochs": 1, "loss": loss})
        losses.append(model.criterion(logits, labels).item())
    assert losses[1] == pytest.approx(F.cross_entropy(logits, labels).item())
    assert losses[0] != pytest.approx(losses[1], abs=1e-3)
    assert model.log_weights is None


@pytest.mark.parametrize("loss", ["class_balanced", "logit_adjusted"])
@pytest.mark.parametrize("head", ["probe", "crossfit"])
def test_the_linear_probe_to_start_from_weighs_the_classes_as_the_loss_does(loss, head):
    model = vpt.attach(vit(), "vpt_deep", num_classes=2, gated=True, head=head)
    labels, folds = (torch.arange(40) < 4).long(), torch.arange(40) % 5
    features = torch.randn(40, 32) + 2 * labels[:, None]
    seen = (features, labels, folds) if head == "crossfit" else (features, labels)
    biases = []
    for model.log_weights in (None, log_class_weights(loss, labels.bincount())):
        model.before_epoch(0, 1, [], lambda: seen)
        biases.append([model.head.bias.clone(), getattr(model, "fold_biases", torch.zeros(2))])
    shift = model.log_weights.float()
    torch.testing.assert_close(biases[1][0] - biases[0][0], shift)
    if head == "crossfit":
        torch.testing.assert_close(biases[1][1] - biases[0][1], shift.expand(6, 2))


def test_where_they_do_not_apply():
    with pytest.raises(InputError, match="linear_probe is solved without it"):
        fit("logit_adjusted", "linear_probe")
    with pytest.raises(InputError, match="multilabel data has cross_entropy only"):
        fit("class_balanced", labels=torch.ones(40, 2))
