"""Heads that have not seen the image whose loss they give."""

import hooks
import numpy as np
import pytest
import tiny
import torch
from tiny import loader, samples
from torch import nn
from torch.nn import functional as F

import vpt
from vpt.accelerator import make_accelerator
from vpt.errors import InputError
from vpt.losses.cross_entropy import CrossEntropy
from vpt.methods.base import Batch
from vpt.methods.linear_probe import SPLITS, solve_head
from vpt.training.features import image_features
from vpt.training.training_set import Batches

LABELS = torch.arange(30) % 3


def model(**options):
    options = {"gated": True, "head": "crossfit", "num_tokens": 2, **options}
    return vpt.attach(tiny.vit(), "vpt_deep", num_classes=3, **options)


def features():
    return torch.randn(30, 32, generator=torch.Generator().manual_seed(0))


def solved(method, rest):
    head = nn.Linear(32, 3)
    solve_head(head, method.target, features()[rest], LABELS[rest], method.penalties)
    return head


def prepare(method, splits, epoch=0):
    method.before_epoch(hooks.epoch(method, features(), LABELS, splits, number=epoch))


def test_each_split_has_the_probe_of_the_other_splits():
    method, splits = model(), torch.arange(30) // 3 % SPLITS
    prepare(method, splits)
    for split in range(SPLITS):
        expected = solved(method, splits != split)
        torch.testing.assert_close(method.split_weights[split], expected.weight.data)
        torch.testing.assert_close(method.split_biases[split], expected.bias.data)
    torch.testing.assert_close(method.split_weights[SPLITS], method.head.weight)
    expected = solved(method, torch.full((30,), True))
    torch.testing.assert_close(method.head.weight.data, expected.weight.data)


def test_the_loss_of_an_image_is_by_the_head_of_its_split():
    method, splits = model(), torch.arange(30) // 3 % (SPLITS + 1)
    prepare(method, splits)
    inputs, labels, held = tiny.images(3), torch.tensor([2, 0, 1]), torch.tensor([4, SPLITS, 1])
    seen = method.features(inputs)
    expected = torch.stack(
        [
            F.linear(x, method.split_weights[split], method.split_biases[split])
            for x, split in zip(seen, held, strict=True)
        ]
    )
    loss = CrossEntropy(method.target)
    total, logits, _ = method.step(Batch(inputs, labels, {"split": held}), loss)
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(total, F.cross_entropy(expected, labels))
    torch.testing.assert_close(method.loss(inputs, labels)[1], method(inputs))


def test_the_penalty_is_chosen_before_the_first_epoch_only():
    method, splits = model(), torch.arange(30) // 3 % SPLITS
    prepare(method, splits)
    method.penalties.fill_(1e-5)
    prepare(method, splits, epoch=1)
    assert method.penalties.unique().tolist() == pytest.approx([1e-5])
    assert method.head.weight.abs().max() < 1e-2


def test_a_class_that_only_one_split_has_keeps_the_head_of_all_images():
    method = model()
    prepare(method, torch.where(LABELS == 2, 0, 1 + torch.arange(30) % 4))
    torch.testing.assert_close(method.split_weights[0, 2], method.head.weight[2])
    assert method.split_biases.abs().max() < 100


def test_every_image_comes_with_its_own_split():
    seen, data = [], samples(np.arange(24) % 2, [f"p{index // 2}" for index in range(24)])
    method = vpt.attach(tiny.vit(), "vpt_deep", num_classes=2, gated=True, head="crossfit")
    by_image = {}
    real = method.batch_features

    def spy(batch):
        if torch.is_grad_enabled() and not batch.cached:  # of a step
            for image, split in zip(batch.inputs, batch.columns["split"], strict=True):
                seen.append((image.sum().item(), split.item()))
        return real(batch)

    method.batch_features = spy
    images = loader(method, data, workers=1)
    vpt.fit(method, images, config={"epochs": 2})
    for key, split in seen:
        assert by_image.setdefault(key, split) == split
    assert len(by_image) == 24
    plain = [image.sum().item() for batch, _ in _in_order(method, data) for image in batch]
    splits = [by_image[key] for key in plain]
    assert splits[::2] == splits[1::2]  # a patient's images are in one split
    assert set(splits) == set(range(SPLITS))


def _in_order(method, data):
    return loader(method, data, train=False)


def test_heads_are_solved_anew_before_each_epoch_and_no_step_moves_them():
    method = model()
    heads, real = [], method.before_epoch

    def spy(*args):
        heads.append(method.head.weight.clone())
        real(*args)
        heads.append(method.head.weight.clone())

    method.before_epoch = spy
    data = samples(LABELS.numpy())
    kept = []
    vpt.fit(
        method,
        loader(method, data),
        config={"epochs": 2, "lr": 0.1, "warmup_epochs": 0},
        on_epoch=lambda history: kept.append(method.head.weight.clone()),
    )
    assert torch.equal(kept[-1], method.head.weight)  # what the last artefact and its time are of
    assert "head.weight" not in method.tunable_parameters()
    assert not torch.equal(heads[0], heads[1])
    assert torch.equal(heads[1], heads[2])
    assert not torch.equal(heads[2], heads[3])
    assert not torch.equal(heads[3], method.head.weight)  # solved once more after the last step
    batches = Batches(_in_order(method, data))
    seen, labels, *_ = image_features(method, batches, make_accelerator("fp32"))
    expected = nn.Linear(32, 3)
    solve_head(expected, method.target, seen, labels, method.penalties)
    torch.testing.assert_close(method.head.weight.data, expected.weight.data)


def test_multilabel():
    labels = np.random.default_rng(0).integers(0, 2, (20, 3))
    method = vpt.attach(
        tiny.vit(), class_names=list("abc"), multilabel=True, gated=True, head="crossfit"
    )
    history = vpt.fit(method, loader(method, samples(labels)), config={"epochs": 2})
    assert all(np.isfinite(record["loss"]) for record in history)
    assert method.penalties.shape == (3,)
    assert method.split_weights.flatten(1).norm(dim=1).gt(0).all()


def test_one_image_a_class():
    method = model()
    vpt.fit(method, loader(method, samples([0, 1, 2])), config={"epochs": 1})
    assert torch.equal(method.split_weights[0], method.split_weights[SPLITS])  # nothing is held out


def test_few_images_have_more_epochs():
    method = model()
    images = loader(method, samples(LABELS.numpy()))  # 4 batches
    assert len(vpt.fit(method, images, config={"epochs": 1, "min_steps": 10})) == 3
    assert len(vpt.fit(method, images, config={"epochs": 2, "min_steps": 8})) == 2


def test_few_images_have_as_much_more_warm_up():
    method = model()
    images = loader(method, samples(LABELS.numpy()))  # 4 batches
    config = {"epochs": 2, "warmup_epochs": 1, "min_steps": 16, "lr": 1.0}
    history = vpt.fit(method, images, config=config)
    assert [record["lr"] for record in history] == [0.0, 0.5, 1.0, 0.5]


def test_prompts_are_pruned_before_the_heads_are_solved():
    method = vpt.attach(tiny.vit(), "kv_prompts", num_classes=3, head="crossfit", prune_tokens=0.5)
    images = loader(method, samples(LABELS.numpy()))
    vpt.fit(method, images, config={"epochs": 2, "warmup_epochs": 0})
    assert not method.mask.all()
    splits = torch.arange(30) // 3 % SPLITS

    def seen():
        with torch.no_grad():
            return method.features(inputs)

    inputs = tiny.images(30)
    method.mask.fill_(1)
    batches = [Batch(inputs, LABELS, {"split": splits})]
    method.before_epoch(hooks.epoch(method, seen, LABELS, splits, number=1, batches=batches))
    expected = nn.Linear(32, 3)
    solve_head(expected, method.target, seen(), LABELS, method.penalties)
    torch.testing.assert_close(method.head.weight.data, expected.weight.data)
    assert not method.mask.all()


@pytest.mark.parametrize("label", [0, 1])
def test_images_of_one_class_are_refused(label):
    method = vpt.attach(tiny.vit(), num_classes=2, head="crossfit")
    images = loader(method, samples([label] * 6))
    for splits in (None, 2):
        with pytest.raises(InputError, match="all training images are of one class"):
            vpt.fit(method, images, config={"epochs": 1, "folds": splits})


def test_heads_are_solved_on_images_without_augmentation():
    method = model()
    images = loader(method, samples(LABELS.numpy()), augment="crop_flip")
    vpt.fit(method, images, config={"epochs": 1})
    batches = Batches(_in_order(method, images.dataset.samples))
    seen, labels, *_ = image_features(method, batches, make_accelerator("fp32"))
    expected = nn.Linear(32, 3)
    solve_head(expected, method.target, seen, labels, method.penalties)
    torch.testing.assert_close(method.head.weight.data, expected.weight.data)
