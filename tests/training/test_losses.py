"""Losses for unequal classes: by hand, and what they do to a rare class."""

import math

import pytest
import torch
from hooks import epoch
from tiny import images, vit
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import vpt
from vpt import losses
from vpt.errors import InputError
from vpt.losses.class_balanced import BETA
from vpt.targets.multiclass import Multiclass

COUNTS = torch.tensor([900, 100])
LOGITS = torch.tensor([[2.0, 0.5], [0.3, 0.1], [-1.0, 1.0]])
LABELS = torch.tensor([0, 1, 1])


def make(name, counts):
    return losses.find(name)(Multiclass(), lambda: counts)


def test_logit_adjustment_by_hand():
    loss = make("logit_adjusted", COUNTS)(LOGITS, LABELS)
    adjusted = LOGITS + torch.tensor([math.log(0.9), math.log(0.1)])
    expected = -torch.stack([adjusted.softmax(1)[i, y].log() for i, y in enumerate(LABELS)]).mean()
    assert loss.item() == pytest.approx(expected.item())


def test_class_balance_by_hand():
    loss = make("class_balanced", COUNTS)(LOGITS, LABELS)
    effective = [(1 - BETA**n) / (1 - BETA) for n in (900, 100)]
    weights = [2 / effective[y] / sum(1 / n for n in effective) for y in (0, 1)]
    losses = F.cross_entropy(LOGITS, LABELS, reduction="none")
    expected = sum(weights[y] * x.item() for y, x in zip(LABELS, losses, strict=True)) / 3
    assert loss.item() == pytest.approx(expected)
    assert weights[1] > 5 * weights[0]


@pytest.mark.parametrize("name", ["logit_adjusted", "class_balanced"])
def test_equal_classes_are_plain_cross_entropy(name):
    loss = make(name, torch.tensor([50, 50]))(LOGITS, LABELS)
    assert loss.item() == pytest.approx(F.cross_entropy(LOGITS, LABELS).item())


@pytest.mark.parametrize("name", ["logit_adjusted", "class_balanced"])
def test_a_class_without_images_breaks_nothing(name):
    loss = make(name, torch.tensor([3, 0]))(LOGITS, torch.zeros(3, dtype=torch.long))
    assert loss.isfinite()


def fit(loss, method="random_prompts", labels=None):
    """Proportion of images that are predicted as the rare class, which nothing tells apart."""
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
    used, real = [], model.step

    def spy(batch, loss):
        used.append(loss)
        return real(batch, loss)

    model.step = spy
    for loss in ("logit_adjusted", "cross_entropy"):
        vpt.fit(model, data, config={"epochs": 1, "loss": loss})
    assert [loss.name for loss in used] == ["logit_adjusted", "cross_entropy"]
    torch.testing.assert_close(used[0].log_weights, -torch.tensor([0.75, 0.25]).double().log())
    assert used[1].log_weights is None


@pytest.mark.parametrize("loss", ["class_balanced", "logit_adjusted"])
@pytest.mark.parametrize("head", ["probe", "crossfit"])
def test_the_linear_probe_to_start_from_weighs_the_classes_as_the_loss_does(loss, head):
    model = vpt.attach(vit(), "vpt_deep", num_classes=2, gated=True, head=head)
    labels, folds = (torch.arange(40) < 4).long(), torch.arange(40) % 5
    features = torch.randn(40, 32) + 2 * labels[:, None]
    splits = folds if head == "crossfit" else None
    made, biases = make(loss, labels.bincount()), []
    for used in (None, made):
        model.before_epoch(epoch(model, features, labels, splits, loss=used))
        biases.append([model.head.bias.clone(), getattr(model, "split_biases", torch.zeros(2))])
    shift = made.log_weights.float()
    torch.testing.assert_close(biases[1][0] - biases[0][0], shift)
    if head == "crossfit":
        torch.testing.assert_close(biases[1][1] - biases[0][1], shift.expand(6, 2))


def test_where_they_do_not_apply():
    with pytest.raises(InputError, match="linear_probe is fitted without it"):
        fit("logit_adjusted", "linear_probe")
    with pytest.raises(InputError, match="multilabel data has cross_entropy only"):
        fit("class_balanced", labels=torch.ones(40, 2))
