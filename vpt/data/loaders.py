"""Samples → batches: crops cached, augmentation repeatable whatever the number of workers."""

import random
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from vpt.config import Augment
from vpt.data.sources import Samples
from vpt.data.transforms import Preprocess, augmentation

CACHE_BYTES = 2**30  # all workers together


class ImageStore:
    """Images as arrays, up to CACHE_BYTES; all data sets made of one another share it."""

    def __init__(self, size: int) -> None:
        self.images: dict[tuple[bool, int], np.ndarray] = {}
        self.left = size

    def get(self, key: tuple[bool, int], decode: Callable[[], np.ndarray]) -> np.ndarray:
        """The image of `key`, decoded unless it is there."""
        if key in self.images:
            return self.images[key]
        image = decode()
        worker = get_worker_info()
        size = image.nbytes * (worker.num_workers if worker else 1)
        if size <= self.left:
            self.left -= size
            self.images[key] = image
        return image


class ImageDataset(Dataset):
    """Samples as (uint8 (H, W, 3), label or (C,) of them), cropped as at evaluation or augmented.

    An index may carry its epoch, as `epoch * len(dataset) + index` (see `EpochSampler`). What does
    not change between epochs is kept in an `ImageStore`: the crop, or, before an augmentation, the
    decoded image.
    """

    def __init__(
        self,
        samples: Samples,
        preprocess: Preprocess,
        augment: Augment = "none",
        seed: int = 0,
        cache: bool = True,
    ) -> None:
        self.samples = samples
        self.preprocess = preprocess
        self.augmentation, self.seed = augment, seed
        self.prepare = np.asarray if augment != "none" else preprocess.crop()
        self.augment = None if augment == "none" else augmentation(augment, preprocess)
        self.store = ImageStore(CACHE_BYTES if cache else 0)
        self.places = np.arange(len(samples))  # in the store

    @property
    def deterministic(self) -> bool:
        """True if an image is the same in every epoch."""
        return self.augment is None

    @property
    def beyond_store(self) -> int:
        """Number of images for whose crops the store has no room."""
        return max(0, len(self) - CACHE_BYTES // (3 * self.preprocess.image_size**2))

    def plain(self) -> "ImageDataset":
        """Data set of the images without augmentation."""
        return self if self.deterministic else self._sharing(self.samples, self.places, "none")

    def take(self, positions: np.ndarray) -> "ImageDataset":
        """The images at `positions`, which are decoded once for both."""
        return self._sharing(
            self.samples.take(positions), self.places[positions], self.augmentation
        )

    def _sharing(self, samples: Samples, places: np.ndarray, augment: Augment) -> "ImageDataset":
        other = ImageDataset(samples, self.preprocess, augment, self.seed)
        other.store, other.places = self.store, places
        return other

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        # The epoch travels with the index: workers that persist are copies made before the first
        # epoch, and would never see a `set_epoch` of the data set.
        epoch, index = divmod(position, len(self))
        image = self._prepared(index)
        if self.augment is not None:
            self.augment.set_random_seed(_seed(self.seed, epoch, index))
            image = self.augment(image=image)["image"]
        return image, self.samples.labels[index]

    def _prepared(self, index: int) -> np.ndarray:
        def decode() -> np.ndarray:
            return self.prepare(self.samples.read(index, grey=self.preprocess.grey_range))

        return self.store.get((self.deterministic, int(self.places[index])), decode)


class EpochSampler(Sampler[int]):
    """A new order each epoch, given by (seed, epoch); yields `epoch * length + index`."""

    def __init__(self, length: int, seed: int = 0) -> None:
        self.length = length
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Call before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(_seed(self.seed, self.epoch))
        order = torch.randperm(self.length, generator=generator)
        return iter((self.epoch * self.length + order).tolist())


def make_loader(
    samples: Samples,
    preprocess: Preprocess,
    batch_size: int,
    *,
    train: bool = False,
    augment: Augment = "none",
    seed: int = 0,
    workers: int = 0,
) -> DataLoader:
    """Batches of (float32 (B, 3, H, W), labels (B,) or (B, C)); the last may be smaller.

    `train` shuffles: call `loader.sampler.set_epoch(epoch)` before each epoch. Without it, the
    order is that of `samples`.
    """
    dataset = ImageDataset(samples, preprocess, augment, seed)
    return load(dataset, batch_size, train=train, workers=workers)


def load(
    dataset: ImageDataset, batch_size: int, *, train: bool = False, workers: int = 0
) -> DataLoader:
    """Batches of a data set, as `make_loader` gives them."""
    return DataLoader(
        dataset,
        batch_size,
        sampler=EpochSampler(len(dataset), dataset.seed) if train else None,
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=partial(_collate, dataset.preprocess),
        pin_memory=torch.cuda.is_available(),
    )


def _collate(
    preprocess: Preprocess, batch: list[tuple[np.ndarray, np.ndarray]]
) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = (torch.from_numpy(np.stack(arrays)) for arrays in zip(*batch, strict=True))
    return preprocess.normalize(images), labels


def _seed(*parts: int) -> int:
    return random.Random(repr(parts)).getrandbits(32)
