"""What is trained on: the images of a loader, in their order, in parts, or with a number each."""

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from vpt.data.loaders import EpochSampler, make_loader
from vpt.engine.evaluate import EVAL_BATCH
from vpt.errors import InputError

Collate = Callable[[list[Any]], tuple[Any, ...]]


class TrainingSet:
    """The images that `loader` gives.

    Attributes:
        loader: from `make_loader`, or any other.
        own: `make_loader(…, train=True)` made it. Then nothing need be decoded for labels, patients
            stay together, and heads are solved on images without augmentation.
    """

    def __init__(self, loader: DataLoader) -> None:
        self.loader = loader
        self.own = isinstance(loader.sampler, EpochSampler)

    def check_parts(self, setting: str) -> None:
        """Refuses a loader that cannot be taken apart, as `setting` wants.

        Raises:
            InputError: its data set has no index, or it has batches of its own.
        """
        if isinstance(self.loader.dataset, IterableDataset) or self.loader.batch_size is None:
            raise InputError(
                f"{setting} needs a DataLoader with a batch_size, of a data set with an index"
            )

    @cached_property
    def plain(self) -> DataLoader:
        """The images in their order, without augmentation; of another's loader, as it has them."""
        if not self.own:
            return self.loader
        return _like(self.loader, self.loader.dataset.plain(), EVAL_BATCH)

    @property
    def labels(self) -> np.ndarray:
        """(N,), or of multilabel data (N, C)."""
        return self._labels_and_places[0]

    @property
    def patients(self) -> list[str] | None:
        """Of each image, where they are known."""
        return self.loader.dataset.samples.patients if self.own else None

    @cached_property
    def _labels_and_places(self) -> tuple[np.ndarray, np.ndarray]:
        """And where each image is in the data set: its sampler may leave some out."""
        places = np.arange(len(self.loader.dataset))
        if self.own:
            return self.loader.dataset.samples.labels, places
        labels, places = zip(*(batch[1:] for batch in _number(self.loader, places)), strict=True)
        places, first = np.unique(torch.cat(places), return_index=True)
        return torch.cat(labels).numpy()[first], places

    def part(self, positions: np.ndarray, learn: bool) -> DataLoader:
        """Loads the images at `positions` of `labels`, to learn from or to be tested on."""
        loader, dataset = self.loader, self.loader.dataset
        batch_size = loader.batch_size if learn else EVAL_BATCH
        if not self.own:
            chosen = Subset(dataset, self._labels_and_places[1][positions].tolist())
            return _like(loader, chosen, batch_size, shuffle=learn)
        return make_loader(
            dataset.samples.take(positions),
            dataset.preprocess,
            batch_size,
            train=learn,
            augment=dataset.augmentation if learn else "none",
            seed=dataset.seed,
            workers=loader.num_workers,
        )

    def numbered(self, numbers: np.ndarray, other: int) -> tuple[DataLoader, DataLoader]:
        """`loader` and `plain` with the number of each image as a third tensor.

        `numbers` (N,) are in the order of `labels`; images that it lacks have the number `other`.
        """
        table = np.full(len(self.loader.dataset), other)
        table[self._labels_and_places[1]] = numbers
        return _number(self.loader, table), _number(self.plain, table)


class _Numbered(Dataset):
    def __init__(self, dataset: Dataset, numbers: np.ndarray) -> None:
        self.dataset, self.numbers = dataset, numbers

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, position: int) -> tuple[Any, int]:
        # an `ImageDataset` counts positions on from epoch to epoch
        return self.dataset[position], int(self.numbers[position % len(self)])


def _collate(collate: Collate, batch: list[tuple[Any, int]]) -> tuple[Any, ...]:
    samples, numbers = zip(*batch, strict=True)
    return *collate(list(samples)), torch.tensor(numbers)


def _number(loader: DataLoader, numbers: np.ndarray) -> DataLoader:
    dataset = _Numbered(loader.dataset, numbers)
    collate = partial(_collate, loader.collate_fn)
    return _like(
        loader,
        dataset,
        loader.batch_size,
        sampler=loader.sampler,
        drop_last=loader.drop_last,
        collate_fn=collate,
        pin_memory=loader.pin_memory,
    )


def _like(loader: DataLoader, dataset: Dataset, batch_size: int, **settings: Any) -> DataLoader:
    """Loads another data set with the workers of `loader`."""
    settings = {"collate_fn": loader.collate_fn, **settings}
    return DataLoader(
        dataset,
        batch_size,
        num_workers=loader.num_workers,
        persistent_workers=loader.persistent_workers,
        worker_init_fn=loader.worker_init_fn,
        **settings,
    )
