"""What is trained on: the images of a loader, in their order, in parts, or with a number each."""

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from vpt.data.loaders import EpochSampler, ImageDataset, make_loader
from vpt.engine.evaluate import EVAL_BATCH
from vpt.errors import InputError
from vpt.targets import Target

Collate = Callable[[list[Any]], tuple[Tensor, Tensor]]


class TrainingSet:
    """The images that `loader` gives.

    Attributes:
        loader: from `make_loader`, or any other.
        target: the kind of its labels.
        own: `make_loader(…, train=True)` made it: all of its data set is trained on.
    """

    def __init__(self, loader: DataLoader, target: Target) -> None:
        self.loader, self.target = loader, target
        self.own = isinstance(loader.sampler, EpochSampler)

    def check_parts(self, setting: str) -> None:
        """Refuses a loader that cannot be taken apart, as `setting` wants.

        Raises:
            InputError: its data set has no index, it has batches of its own, or none.
        """
        if isinstance(self.loader.dataset, IterableDataset) or self.loader.batch_size is None:
            raise InputError(
                f"{setting} needs a DataLoader with a batch_size, of a data set with an index, as "
                "yet unprepared by accelerate: give such a one, or drop the setting"
            )
        if not len(self.loader):
            raise InputError(f"{setting}: the DataLoader has no batch: give drop_last=False")

    @cached_property
    def plain(self) -> DataLoader:
        """The images in their order; those of `make_loader` without augmentation."""
        if not self.own:
            return self.part(np.arange(len(self.places)), learn=False)
        return _like(self.loader, self.loader.dataset.plain(), EVAL_BATCH)

    @cached_property
    def places(self) -> np.ndarray:
        """Where each image (N,) is in the data set: a sampler may leave some out."""
        drawn = range(len(self.loader.dataset)) if self.own else map(int, self.loader.sampler)
        (places,) = broadcast_object_list([np.unique(list(drawn))])  # alike in all processes
        return places

    @cached_property
    def labels(self) -> np.ndarray:
        """Labels of the N images."""
        dataset = self.loader.dataset
        if isinstance(dataset, ImageDataset):  # nothing need be decoded
            return dataset.samples.labels[self.places]
        # copied, for tensors of workers hold a file descriptor each
        labels = torch.cat([labels.cpu().clone() for _, labels in self.plain]).numpy()
        _check_count(labels, self.places)
        return labels

    @property
    def patients(self) -> list[str] | None:
        """Of each image, where they are known."""
        dataset = self.loader.dataset
        if not isinstance(dataset, ImageDataset) or not dataset.samples.patients:
            return None
        return [dataset.samples.patients[place] for place in self.places]

    def part(self, positions: np.ndarray, learn: bool) -> DataLoader:
        """Loads the images at `positions` of `labels`, to learn from (shuffled) or to be tested on.

        Another's data set augments both as it does.
        """
        loader, dataset = self.loader, self.loader.dataset
        batch_size = loader.batch_size if learn else EVAL_BATCH
        if not self.own:
            chosen = Subset(dataset, self.places[positions].tolist())
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
        table[self.places] = numbers
        return _number(self.loader, table), _number(self.plain, numbers)


class _Numbered(Dataset):
    def __init__(self, dataset: Dataset, numbers: np.ndarray) -> None:
        self.dataset, self.numbers = dataset, numbers

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, position: int) -> tuple[Any, int]:
        # an `ImageDataset` counts positions on from epoch to epoch
        return self.dataset[position], int(self.numbers[position % len(self)])


def _collate(collate: Collate, batch: list[tuple[Any, int]]) -> tuple[Tensor, Tensor, Tensor]:
    samples, numbers = zip(*batch, strict=True)
    images, labels = collate(list(samples))
    _check_count(labels, numbers)
    return images, labels, torch.tensor(numbers)


def _check_count(labels: Any, samples: Any) -> None:
    if len(labels) != len(samples):
        raise InputError(
            f"the collate_fn makes {len(labels)} labels of {len(samples)} samples: train.folds and "
            "head=crossfit need one of each, in their order"
        )


def _number(loader: DataLoader, numbers: np.ndarray) -> DataLoader:
    return _like(
        loader,
        _Numbered(loader.dataset, numbers),
        loader.batch_size,
        sampler=loader.sampler,
        drop_last=loader.drop_last,
        collate_fn=partial(_collate, loader.collate_fn),
        pin_memory=loader.pin_memory,
    )


def _like(loader: DataLoader, dataset: Dataset, batch_size: int, **settings: Any) -> DataLoader:
    """Loads another data set with the workers of `loader`."""
    return DataLoader(
        dataset,
        batch_size,
        num_workers=loader.num_workers,
        persistent_workers=loader.persistent_workers,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        **{"collate_fn": loader.collate_fn, **settings},
    )
