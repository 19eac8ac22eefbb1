"""Parts and numbers of a training set, from vpt's own loaders and from anybody's."""

import numpy as np
import pytest
import tiny
import torch
from torch.utils.data import DataLoader, Dataset, SubsetRandomSampler, WeightedRandomSampler

import vpt
from vpt.data.images import Samples
from vpt.data.loaders import make_loader
from vpt.methods.linear_probe import SPLITS
from vpt.targets.multiclass import Multiclass
from vpt.training.crossval import assign_splits
from vpt.training.training_set import TrainingSet

IMAGES, LABELS = tiny.images(24), torch.arange(24) % 3
PAIRS = list(zip(IMAGES, LABELS.tolist(), strict=True))
CHOSEN = list(range(4, 24))


def collate(pairs):  # a list, as torch's own gives
    images, labels = zip(*pairs, strict=True)
    return [torch.stack(images), torch.tensor(labels)]


def loaders():
    weights = [float(index in CHOSEN) for index in range(24)]
    return {
        "subset": DataLoader(PAIRS, 6, sampler=SubsetRandomSampler(CHOSEN)),
        "collate": DataLoader(PAIRS[4:], 6, shuffle=True, collate_fn=collate),
        "workers": DataLoader(PAIRS[4:], 6, shuffle=True, num_workers=1),
        "workers_kept": DataLoader(
            PAIRS[4:], 6, shuffle=True, num_workers=1, persistent_workers=True
        ),
        "weighted": DataLoader(PAIRS, 6, sampler=WeightedRandomSampler(weights, 500)),
        "last": DataLoader(PAIRS[4:], 16, shuffle=True, drop_last=True),
    }


def keys(images):
    return [image.sum().item() for image in images]


@pytest.mark.parametrize("name", loaders())
def test_parts_of_anybodys_loader(name):
    images = TrainingSet(loaders()[name], Multiclass(), 3)
    np.testing.assert_array_equal(images.labels, LABELS[CHOSEN])
    assert images.patients is None
    positions = np.array([0, 3, 7])
    for learn in (False, True):
        batches = list(images.part(positions, learn))
        assert sorted(keys(torch.cat([batch[0] for batch in batches]))) == sorted(
            keys(IMAGES[[4, 7, 11]])
        )
    (batch,) = images.part(positions, learn=False)
    assert batch[1].tolist() == LABELS[[4, 7, 11]].tolist()


@pytest.mark.parametrize("name", loaders())
def test_an_image_has_the_same_number_in_every_epoch(name):
    images = TrainingSet(loaders()[name], Multiclass(), 3)
    expected = dict(zip(keys(IMAGES[4:]), range(20), strict=True))
    for loader in images.numbered(np.arange(20), other=99):
        for _ in range(2):
            for batch, numbers in loader:
                assert [expected[key] for key in keys(batch.inputs)] == numbers.tolist()


def test_images_that_are_never_seen_have_the_other_number():
    images = TrainingSet(DataLoader(PAIRS, 6, sampler=SubsetRandomSampler(CHOSEN)), Multiclass(), 3)
    numbered, _ = images.numbered(np.arange(20), other=99)
    assert [numbered.dataset[index][1] for index in (0, 3, 4, 23)] == [99, 99, 0, 19]


def test_images_first_drawn_later_are_by_a_head_that_has_not_seen_them():
    loader = DataLoader(PAIRS, 6, sampler=WeightedRandomSampler([1.0] * 24, 12))
    images = TrainingSet(loader, Multiclass(), 3)
    numbered, plain = images.numbered(np.zeros(len(images.labels), int), other=99)
    solved = {key for batch, _ in plain for key in keys(batch.inputs)}
    for _ in range(5):
        for batch, numbers in numbered:
            assert [key in solved for key in keys(batch.inputs)] == (numbers == 0).tolist()


def test_the_result_is_the_same_whatever_was_drawn_before():
    results = []
    for state in (1, 2):
        model = vpt.attach(
            tiny.vit(), "vpt_deep", num_classes=3, num_tokens=2, gated=True, head="crossfit"
        )
        torch.manual_seed(state)
        some = DataLoader(PAIRS, 6, sampler=WeightedRandomSampler([1.0] * 24, 12))
        vpt.fit(model, some, config={"epochs": 2, "folds": 2})
        results.append(model.head.weight)
    assert torch.equal(*results)


class Noisy(Dataset):
    def __len__(self):
        return 20

    def __getitem__(self, index):
        return IMAGES[index] + 0.1 * torch.randn(3, 32, 32), LABELS[index]


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    class Stop(Exception):
        pass

    config = {"epochs": 2, "lr": 0.1, "warmup_epochs": 0}
    results, checkpoint = [], tmp_path / "checkpoint"
    for interrupted in (False, True):
        torch.manual_seed(0)
        model = vpt.attach(
            tiny.vit(), "vpt_deep", num_classes=3, num_tokens=2, gated=True, head="crossfit"
        )
        loader = DataLoader(Noisy(), 6, shuffle=True)
        if interrupted:
            path = {"checkpoint": checkpoint}

            def write_then_stop(history):
                if len(history) == 2:
                    raise Stop

            with pytest.raises(Stop):
                vpt.fit(model, loader, config=config, on_epoch=write_then_stop, **path)
            assert checkpoint.is_file()
            vpt.fit(model, loader, config=config, **path)
        else:
            vpt.fit(model, loader, config=config)
        results.append(model.prompts.detach().clone())
    assert torch.equal(*results)


def test_patients_of_a_loader_that_does_not_shuffle_stay_together():
    pixels = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    patients = [f"p{index // 2}" for index in range(12)]
    samples = Samples(pixels, np.arange(12) // 2 % 2, [str(i) for i in range(12)], patients)
    preprocess = vpt.attach(tiny.vit(), num_classes=2).backbone.preprocess
    splits = assign_splits(TrainingSet(make_loader(samples, preprocess, 4), Multiclass(), 3), 3)
    assert splits[::2].tolist() == splits[1::2].tolist()


@pytest.mark.parametrize("head", ["crossfit", "probe"])
def test_a_collate_that_drops_images_is_refused(head):
    def some(pairs):
        return collate(pairs[1:])

    model = vpt.attach(tiny.vit(), "vpt_deep", num_classes=3, head=head)
    with pytest.raises(vpt.InputError, match="collate_fn makes 19 labels of 20 samples"):
        vpt.fit(model, DataLoader(PAIRS[4:], 6, collate_fn=some), config={"epochs": 1, "folds": 2})


def test_own_loaders_give_images_in_order_without_decoding_for_labels(monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    patients = [f"p{index // 2}" for index in range(12)]
    samples = Samples(pixels, np.arange(12) // 2 % 2, [str(i) for i in range(12)], patients)
    preprocess = vpt.attach(tiny.vit(), num_classes=2).backbone.preprocess
    images = TrainingSet(
        make_loader(samples, preprocess, 4, train=True, augment="crop_flip"), Multiclass(), 2
    )
    with monkeypatch.context() as patch:
        patch.setattr(Samples, "read", None)
        assert images.labels.tolist() == samples.labels.tolist()
        assert images.patients == patients
    splits = assign_splits(images, 3)
    assert splits[::2].tolist() == splits[1::2].tolist()
    _, plain = images.numbered(splits, other=3)
    assert torch.cat([numbers for *_, numbers in plain]).tolist() == splits.tolist()
    learn, test = images.part(np.arange(6), learn=True), images.part(np.arange(6), learn=False)
    assert (learn.dataset.augmentation, test.dataset.augmentation) == ("crop_flip", "none")


@pytest.mark.parametrize("name", ["subset", "collate"])
def test_the_recipe_on_ones_own_loader(name):
    options, config = vpt.recipe("vpt_deep")
    assert options == {"num_tokens": 10, "gated": True, "head": "crossfit"}
    assert config.folds == 3
    model = vpt.attach(tiny.vit(), "vpt_deep", num_classes=3, **options)
    seen, lines, real = set(), [], model.batch_features

    def spy(batch):
        if torch.is_grad_enabled() and not batch.cached:  # of a step
            splits = batch.columns["split"].tolist()
            seen.update(zip(keys(batch.inputs), splits, strict=True))
        return real(batch)

    config = config.model_copy(update={"epochs": 2, "min_steps": 0, "folds": None})
    model.batch_features = spy
    vpt.fit(model, loaders()[name], config=config)
    assert {key for key, _ in seen} == set(keys(IMAGES[4:]))  # and never the four left out
    assert len(seen) == 20  # an image's split is the same in both epochs
    assert {split for _, split in seen} == set(range(SPLITS))
    config = config.model_copy(update={"folds": 3})
    vpt.fit(model, loaders()[name], config=config, log=lines.append)
    assert "of 20 held-out" in lines[-1]
