import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from vpt.data import loaders
from vpt.data.images import Samples
from vpt.data.loaders import EpochSampler, ImageDataset, make_loader
from vpt.data.transforms import Preprocess

PREPROCESS = Preprocess(
    image_size=8,
    interpolation="bicubic",
    crop_pct=1.0,
    crop_mode="center",
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)
ARRAY = np.random.default_rng(0).integers(0, 256, (7, 12, 12, 3), dtype=np.uint8)
SAMPLES = Samples(ARRAY, np.arange(7), [f"all/{i}" for i in range(7)])


def epochs(loader, count=2):
    for epoch in range(count):
        loader.sampler.set_epoch(epoch)
        yield list(loader)


def test_evaluation_keeps_the_order():
    batches = list(make_loader(SAMPLES, PREPROCESS, 3))
    assert [labels.tolist() for _, labels in batches] == [[0, 1, 2], [3, 4, 5], [6]]
    images, labels = batches[0]
    assert images.shape == (3, 3, 8, 8) and images.dtype == torch.float32
    assert labels.dtype == torch.int64
    expected = PREPROCESS.normalize(torch.from_numpy(PREPROCESS.crop()(SAMPLES.read(1))))
    assert torch.equal(images[1], expected)


def test_training_shuffles_anew_each_epoch_and_keeps_all():
    first, second = epochs(make_loader(SAMPLES, PREPROCESS, 3, train=True, seed=1))
    orders = [[int(label) for _, labels in epoch for label in labels] for epoch in (first, second)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(7))
    assert orders[0] != orders[1]


@pytest.mark.parametrize("augment", ["crop", "crop_flip"])
def test_augmentation_does_not_depend_on_workers(augment):
    options = {"train": True, "augment": augment, "seed": 3}
    alone = epochs(make_loader(SAMPLES, PREPROCESS, 3, **options))
    helped = epochs(make_loader(SAMPLES, PREPROCESS, 3, workers=2, **options))
    for one, other in zip(alone, helped, strict=True):
        for (images, labels), (images2, labels2) in zip(one, other, strict=True):
            assert torch.equal(images, images2) and torch.equal(labels, labels2)


def test_augmentation_differs_by_seed_epoch_and_image():
    same = Samples(np.stack([ARRAY[0]] * 2), np.arange(2), ["a", "b"])

    def drawn(seed, position):
        return ImageDataset(same, PREPROCESS, "crop", seed)[position][0]

    base = drawn(1, 0)
    assert (drawn(1, 0) == base).all()
    for other in (drawn(2, 0), drawn(1, 1), drawn(1, 2), drawn(-1, 0)):
        assert (other != base).any()


def test_sampler_positions_carry_the_epoch():
    sampler = EpochSampler(5, seed=1)
    assert sorted(sampler) == list(range(5)) and list(sampler) == list(sampler)
    sampler.set_epoch(2)
    assert sorted(sampler) == list(range(10, 15)) and len(sampler) == 5
    assert list(EpochSampler(20, seed=1)) != list(EpochSampler(20, seed=2))


def test_plain_images_are_those_of_evaluation():
    augmented = ImageDataset(SAMPLES, PREPROCESS, "crop_flip", seed=1)
    plain = augmented.plain()
    assert plain.deterministic and not augmented.deterministic
    assert plain.plain() is plain
    assert (plain[2][0] == PREPROCESS.crop()(SAMPLES.read(2))).all()


@pytest.mark.parametrize("augment", ["none", "crop"])
def test_images_are_read_once_within_the_budget(tmp_path, monkeypatch, augment):
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path in paths:
        Image.fromarray(ARRAY[0]).save(path)
    samples = Samples(paths, np.zeros(3, dtype=np.int64), ["a", "b", "c"])
    reads = []
    read = Samples.read
    monkeypatch.setattr(
        Samples, "read", lambda self, i, **options: reads.append(i) or read(self, i)
    )

    def read_twice(**options):
        reads.clear()
        data = ImageDataset(samples, PREPROCESS, augment, **options)
        first = [data[i][0] for i in range(3)]
        assert all((data[i][0] == image).all() for i, image in enumerate(first))
        return reads

    assert read_twice() == [0, 1, 2]
    assert read_twice(cache=False) == [0, 1, 2] * 2
    one = 8 * 8 * 3 if augment == "none" else 12 * 12 * 3
    monkeypatch.setattr(loaders, "CACHE_BYTES", 2 * one + 1)
    assert read_twice() == [0, 1, 2, 2]
    monkeypatch.setattr(loaders, "get_worker_info", lambda: SimpleNamespace(num_workers=2))
    assert read_twice() == [0, 1, 2, 1, 2]  # two workers share the budget


@pytest.mark.parametrize("augment", ["none", "crop_flip"])
def test_dataset_can_be_sent_to_a_worker(augment):
    data = ImageDataset(SAMPLES, PREPROCESS, augment)
    again = pickle.loads(pickle.dumps(data))
    assert (again[3][0] == data[3][0]).all() and again[3][1] == 3
