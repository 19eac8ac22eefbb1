"""Splits trained side by side, and the factor on gates that their held-out images choose."""

import numpy as np
import pytest
import tiny
import torch
from tiny import loader, samples
from torch.utils.data import DataLoader, RandomSampler

import vpt
from vpt.accelerator import make_accelerator
from vpt.bench.recipe import count_images
from vpt.config import TrainConfig
from vpt.losses.class_balanced import ClassBalanced
from vpt.losses.cross_entropy import CrossEntropy
from vpt.methods.base import Batch, Epoch
from vpt.methods.linear_probe import SPLITS
from vpt.methods.vpt_deep import VPTDeep
from vpt.training import crossval, dial, side_by_side
from vpt.training.dial import pick
from vpt.training.epochs import _updated
from vpt.training.side_by_side import SideBySide, fits, num_batches
from vpt.training.training_set import TrainingSet

LABELS = torch.arange(24) % 3
PARTS = torch.stack([torch.arange(24) // 8 != held for held in range(3)])
IMAGES = tiny.images(24).double()


def started(name="vpt_deep", **options):
    model = vpt.attach(tiny.vit(), name, num_classes=3, gated=True, head="crossfit", **options)
    model = model.double().eval()
    with torch.no_grad():
        start = Batch(model.features(IMAGES), LABELS, cached=True)
    model.before_epoch(Epoch(0, 1, CrossEntropy(model.target), [], lambda: start))
    model.penalties.fill_(1.0)  # images at random would have nearly none, and no gradients
    return model, start


def trained(model, start, parts, config, losses=None):
    splits = torch.where(parts, torch.arange(24) % 8 % SPLITS, -1)
    losses = losses or [CrossEntropy(model.target)] * len(parts)
    side = SideBySide(
        model, start, lambda places: IMAGES[places], splits, losses, make_accelerator("fp32")
    )
    side.train(config, -(-int(parts[0].sum()) // config.batch_size), lambda: None)
    return side


@pytest.mark.parametrize("name", ["vpt_deep", "vpt_shallow"])
@pytest.mark.parametrize("batch_size", [16, 5])
def test_side_by_side_is_one_by_one(name, batch_size):
    model, start = started(name, num_tokens=2)
    config = TrainConfig(epochs=3, batch_size=batch_size, lr=0.05, warmup_epochs=0)
    losses = [
        ClassBalanced(model.target, lambda: torch.tensor([9, 4, 3])),
        CrossEntropy(model.target),
        CrossEntropy(model.target),
    ]
    side = trained(model, start, PARTS, config, losses)
    logits = side.logits(torch.ones(3, 24, dtype=torch.bool), 0.5, lambda: None)
    for number, (together, part, loss) in enumerate(zip(side.models, PARTS, losses, strict=True)):
        alone = trained(model, start, part[None], config, [loss])
        for key, tensor in alone.models[0].tunable_parameters().items():
            assert tensor.abs().max() > 0
            found = together.tunable_parameters()[key]
            torch.testing.assert_close(found, tensor, rtol=1e-9, atol=1e-9)
        expected = alone.logits(torch.ones(1, 24, dtype=torch.bool), 0.5, lambda: None)
        torch.testing.assert_close(logits[number], expected[0], rtol=1e-6, atol=1e-6)
    assert not torch.equal(side.models[0].prompts, side.models[1].prompts)
    assert not model.gates.any()


def test_one_part_of_all_images_is_what_fit_trains(monkeypatch):
    monkeypatch.setattr(side_by_side, "BATCHES", 1)  # which order makes no difference to
    data = samples(LABELS.numpy())
    model = vpt.attach(tiny.vit(), num_classes=3, gated=True, head="crossfit", num_tokens=2)
    model = model.double().eval()
    ordered = loader(model, data, 24, train=False)
    images, labels = next(iter(ordered))
    with torch.no_grad():
        start = Batch(model.features(images.double()), labels, cached=True)
    model.before_epoch(Epoch(0, 1, CrossEntropy(model.target), [], lambda: start))
    splits = torch.from_numpy(np.zeros(24, int))
    for number, (_, held) in enumerate(model.target.splits(LABELS.numpy(), None, SPLITS)):
        splits[held] = number
    config = {"epochs": 3, "batch_size": 24, "lr": 0.02, "warmup_epochs": 0}
    side = SideBySide(
        model,
        start,
        lambda places: images[places].double(),
        splits[None],
        [CrossEntropy(model.target)],
        make_accelerator("fp32"),
    )
    side.train(TrainConfig(**config), 1, lambda: None)
    vpt.fit(model.float(), loader(model, data, 24), config=config)
    # scikit-learn stops a little before the optimum
    torch.testing.assert_close(side.models[0].gates.float(), model.gates, rtol=0.02, atol=1e-4)


def test_heads_between_epochs_are_of_what_steps_have_computed():
    model = vpt.attach(tiny.vit(), num_classes=3, gated=True, head="crossfit", num_tokens=2)
    count = count_images(model.backbone)
    vpt.fit(model, loader(model, samples(LABELS.numpy()), 6), config={"epochs": 3})
    # a pass before and one after
    assert count == {"forward": (1 + 3 + 1) * 24, "backward": 3 * 24}


@pytest.mark.parametrize("draws", [24, 12])
def test_features_of_images_that_no_step_has_seen_are_computed(draws):
    data = [(image.float(), int(label)) for image, label in zip(IMAGES, LABELS, strict=True)]
    model = vpt.attach(tiny.vit(), num_classes=3, gated=True, head="crossfit", num_tokens=2)
    count = count_images(model.backbone)
    images = DataLoader(data, 3, sampler=RandomSampler(data, num_samples=draws))
    vpt.fit(model, images, config={"epochs": 3})
    # all before and after, and between epochs unless these have seen all
    passes = 2 if draws == 24 else 4
    assert count == {"forward": (passes + 3) * draws, "backward": 3 * draws}


def test_of_an_image_that_is_drawn_twice_the_last_features_count():
    known = Batch(torch.zeros(3, 1), torch.zeros(3), cached=True)
    places, features = torch.tensor([2, 0, 3, 1, 0]), torch.arange(5.0)[:, None]
    assert _updated(known, places, features).inputs.tolist() == [[4], [3], [0]]
    assert _updated(known, places[1:], features[1:]) is None


def test_a_training_goes_on_in_the_batches_that_it_began_with(tmp_path):
    """Checkpoints of earlier versions do not say which: the loader's."""
    path, config = tmp_path / "checkpoint.pt", {"epochs": 3, "min_steps": 9}

    def train():
        model = vpt.attach(tiny.vit(), num_classes=3, gated=True, head="crossfit", num_tokens=2)
        images = loader(model, samples(LABELS.numpy()), 24)
        return vpt.fit(model, images, config=config, checkpoint=path)

    assert [len(train()), len(train())] == [3, 3]
    state = torch.load(path, weights_only=True)
    assert state.pop("kept")["batch_size"] == 6
    torch.save(state, path)
    assert len(train()) == 9


def test_a_factor_of_zero_is_the_start():
    model, start = started()
    side = trained(model, start, PARTS, TrainConfig(epochs=2, lr=0.05, warmup_epochs=0))
    needed = torch.ones(3, 24, dtype=torch.bool)
    bare = SideBySide(
        model, start, None, side.splits, [CrossEntropy(model.target)] * 3, side.accelerator
    )
    first = bare.logits(needed, 0.0, lambda: None)
    # heads begin elsewhere, and end within a solver's precision
    again = side.logits(needed, 0.0, lambda: None)
    torch.testing.assert_close(again, first, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(side.logits(needed, 1.0, lambda: None), first)


def gains(means, images, seed=0):
    """Of each factor: alike on an image but for a little, as those of one training are."""
    rng = np.random.default_rng(seed)
    common, own = rng.normal(0, 1, images), rng.normal(0, 1, (len(means), images))
    return common + 0.5 * own + np.array(means)[:, None]


def test_pure_noise_is_taken_for_a_gain_no_more_often_than_stated():
    chances = [pick(gains([0, 0, 0, 0], 30, seed))[1] for seed in range(400)]
    found = np.mean([p < crossval.LEVEL for p in chances])
    assert found < crossval.LEVEL + 3 * np.sqrt(0.05 * 0.95 / 400)
    assert found > 0.01  # a test that never finds any would pass too


@pytest.mark.parametrize("images", [15, 50, 200])
def test_plain_gains_are_found(images):
    best, p = pick(gains([1.0, 2.0, 1.0, 0.0], images))
    assert (best, p < 0.01) == (1, True)


def test_equal_factors_give_the_smallest():
    best, p = pick(np.repeat(gains([1.0], 50), 4, 0))
    assert (best, p < 0.01) == (0, True)


def test_harm_is_no_gain():
    assert pick(gains([-1.0, -2.0, -3.0, -4.0], 50))[1] > 0.9
    assert pick(np.zeros((4, 10)))[1] == 1
    assert pick(np.ones((4, 1)))[1] > 0.05


@pytest.mark.parametrize(
    ("labels", "coloured", "line"),
    [
        ([0, 1] * 6, True, "gets all right"),
        ([0, 1] * 2, False, "too few to tell"),
        ([0, 1] * 6, False, "chance alone"),
    ],
)
def test_nothing_is_tried_out_where_nothing_can_be_decided(monkeypatch, labels, coloured, line):
    pixels = np.random.default_rng(0).integers(0, 256, (len(labels), 32, 32, 3), dtype=np.uint8)
    if coloured:
        pixels[:] = 200 * np.array(labels)[:, None, None, None]
    model = vpt.attach(tiny.vit(), num_classes=2, gated=True, head="crossfit")
    config = TrainConfig(**vpt.recipe("vpt_deep")[1].model_dump() | {"min_steps": 2, "epochs": 2})
    steps, lines = [], []
    monkeypatch.setattr(SideBySide, "train", lambda *args: steps.append(args))
    vpt.fit(model, loader(model, samples(labels, pixels=pixels)), config=config, log=lines.append)
    assert line in lines[-1], lines
    assert bool(steps) == (line == "chance alone")


@pytest.mark.parametrize(
    ("method", "classes", "a_class", "a_patient", "p", "factor"),
    [
        ("vpt_deep", 2, 9, None, 0.04, 1.0),
        ("vpt_deep", 2, 9, None, 0.2, None),
        ("vpt_deep", 2, 10, None, 0.2, 1.0),
        ("vpt_deep", 2, 10, None, 0.6, None),
        ("vpt_deep", 2, 18, 2, 0.2, None),  # of nine patients
        ("vpt_deep", 2, 20, 2, 0.2, 1.0),
        ("vpt_shallow", 2, 10, None, 0.2, None),
        ("vpt_deep", 3, 5, None, 0.04, 1.0),
        ("vpt_deep", 3, 5, None, 0.9, 0.5),  # images can't tell
        ("vpt_deep", 3, 20, None, 0.9, 0.5),
        ("vpt_deep", 3, 21, None, 0.9, None),
        ("vpt_deep", 3, 40, 2, 0.9, 0.5),
        ("vpt_shallow", 3, 5, None, 0.9, None),
    ],
)
def test_how_far_prompts_act_by_the_number_of_images_and_classes(
    monkeypatch, method, classes, a_class, a_patient, p, factor
):
    numbers = np.arange(classes * a_class)
    labels = numbers % classes
    patients = a_patient and [f"{i % classes}-{i // classes // a_patient}" for i in numbers]
    data = samples(labels, patients)
    model = vpt.attach(tiny.vit(), method, num_classes=classes, gated=True, head="crossfit")
    monkeypatch.setattr(dial, "pick", lambda gains: (2, p))
    config = TrainConfig(**vpt.recipe("vpt_deep")[1].model_dump() | {"min_steps": 2, "epochs": 2})
    lines = []
    history = vpt.fit(model, loader(model, data), config=config, log=lines.append)
    (line,) = [line for line in lines if "chance alone" in line]
    assert ("trained on all images" in line) == bool(model.gates.any()) == bool(factor)
    assert ("0.5 times the strength" in line) == (factor == 0.5)
    assert history[-1].get("factor") == factor


@pytest.mark.parametrize("gate", [0.0, 0.1])
def test_prompts_of_another_stay_at_full_strength_where_images_can_t_tell(monkeypatch, gate):
    model = vpt.attach(tiny.vit(), num_classes=3, gated=True, head="crossfit")
    model.gates.data.fill_(gate)
    monkeypatch.setattr(dial, "pick", lambda gains: (2, 0.9))
    config = TrainConfig(**vpt.recipe("vpt_deep")[1].model_dump() | {"min_steps": 2, "epochs": 2})
    history = vpt.fit(model, loader(model, samples(np.arange(15) % 3)), config=config)
    assert history[-1].get("factor") == (None if gate else 0.5)
    assert (model.gates == gate).all() == bool(gate)


class Other(VPTDeep):
    """A loss of its own."""

    def step(self, batch, loss):
        return super().step(batch, loss)


@pytest.mark.parametrize(
    ("method", "options", "augment", "expected"),
    [
        ("vpt_deep", {}, "none", True),
        ("vpt_shallow", {}, "none", True),
        ("vpt_deep", {"dropout": 0.1}, "none", False),
        ("vpt_deep", {"gated": False}, "none", False),
        ("vpt_deep", {"head": "probe"}, "none", False),
        ("vpt_deep", {}, "crop_flip", False),
        (Other, {}, "none", False),
    ],
)
def test_only_what_copies_do_as_they_would_alone_is_trained_side_by_side(
    method, options, augment, expected
):
    options = {"gated": True, "head": "crossfit", "num_tokens": 2} | options
    model = vpt.attach(tiny.vit(), method, num_classes=3, **options)
    data = loader(model, samples(LABELS.numpy()), augment=augment)
    assert fits(model, TrainingSet(data, model.target, 3)) == expected


@pytest.mark.parametrize(("sizes", "batches"), [([3, 2], 2), ([10, 9], 4), ([200, 201], 7)])
def test_few_images_are_taken_in_small_batches(sizes, batches):
    """And no batch is empty."""
    assert num_batches(sizes, 32) == batches


@pytest.mark.parametrize(("sizes", "batch_size"), [((100, 40), 2), ((3, 2), 32), ((64, 60), 8)])
def test_each_part_has_an_image_in_each_batch(sizes, batch_size):
    """Groups of patients differ in size; the mean loss of no image is no number."""
    batches = num_batches(sizes, batch_size)
    assert batches == {100: 40, 3: 2, 64: 8}[sizes[0]]
    for size in sizes:
        assert all(len(batch) for batch in torch.arange(size).tensor_split(batches))
