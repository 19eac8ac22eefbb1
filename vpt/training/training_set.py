"""The images that are trained on: in their order, in parts, and in batches with names."""

from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from vpt.data.loaders import EpochSampler, ImageDataset, load
from vpt.errors import InputError
from vpt.evaluation.evaluate import EVAL_BATCH
from vpt.methods.base import Batch
from vpt.targets import Target

INPUTS = "inputs"  # the column that stands in for the images

Collate = Callable[[list[Any]], Any]  # to what `Batch.of` takes


class TrainingSet:
    """The images that `loader` gives.

    Attributes:
        loader: from `make_loader`, or any other.
        target: the kind of its labels.
        num_classes: how many classes there are.
        own: `make_loader(…, train=True)` made it: all of its data set is trained on.
        tick: called for each batch that is read of `batches`.
    """

    tick: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self, loader: DataLoader, target: Target, num_classes: int) -> None:
        self.loader, self.target, self.num_classes = loader, target, num_classes
        self.own = isinstance(loader.sampler, EpochSampler)
        if self.own:  # at once: no batch of theirs need be looked at
            target.conform(loader.dataset.samples.labels, num_classes)

    @property
    def conform(self) -> Callable[[Any], Tensor] | None:
        """Makes the target's labels of a batch's; None: they are such."""
        return None if self.own else partial(self.target.conform, num_classes=self.num_classes)

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
        """Index (N,) of each image in the data set: a sampler may leave some out."""
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
        labels = torch.cat([batch.labels.cpu().clone() for batch in self._read(self.plain)]).numpy()
        _check_count(labels, self.places)
        return labels

    @property
    def patients(self) -> list[str] | None:
        """Of each image, where they are known."""
        dataset = self.loader.dataset
        if not isinstance(dataset, ImageDataset) or not dataset.samples.patients:
            return None
        return [dataset.samples.patients[place] for place in self.places]

    def read(self, positions: Tensor) -> Tensor:
        """Images (B, 3, H, W) at `positions` of `labels`, as `plain` gives them."""
        dataset, collate = self.plain.dataset, self.plain.collate_fn
        return Batch.of(collate([dataset[place] for place in positions.tolist()])).inputs

    def part(self, positions: np.ndarray, learn: bool) -> DataLoader:
        """Loads the images at `positions` of `labels`, to learn from (shuffled) or to be tested on.

        Another's data set augments both as it does.
        """
        loader, dataset = self.loader, self.loader.dataset
        batch_size = loader.batch_size if learn else EVAL_BATCH
        if not self.own:
            chosen = Subset(dataset, self.places[positions].tolist())
            return _like(loader, chosen, batch_size, shuffle=learn)
        chosen = dataset.take(positions)
        return load(
            chosen if learn else chosen.plain(),
            batch_size,
            train=learn,
            workers=loader.num_workers,
        )

    def batches(self, loader: DataLoader, columns: dict[str, Tensor] | None = None) -> "Batches":
        """Batches of `loader`, one of these images."""
        return Batches(loader, columns, self.conform, self.tick)

    def class_counts(self) -> Tensor:
        """Number of images of each class (C,); those of another's loader are all read once."""
        if self.own:
            labels = self.labels
        else:
            labels = torch.cat([batch.labels for batch in self._read(self.loader)]).numpy()
        return torch.from_numpy(self.target.class_counts(labels, self.num_classes))

    def _read(self, loader: DataLoader) -> Iterator[Batch]:
        return (Batch.read(batch, number, self.conform) for number, batch in enumerate(loader))

    def numbered(
        self,
        numbers: np.ndarray,
        other: int,
        *,
        batch_size: int | None = None,
        unread: bool = False,
        views: int | None = None,
    ) -> tuple[DataLoader, DataLoader]:
        """`loader` and `plain` with numbers: of pairs of a Batch and the number (B,) of each image.

        Args:
            numbers: (N,), in the order of `labels`.
            other: the number of images that it lacks.
            batch_size: of `loader`; None: as it is.
            unread: `loader` gives numbers in the place of images, which nobody needs.
            views: the epochs take turns with so many views of each image; None: each has its own.
        """
        table = np.full(len(self.loader.dataset), other)
        table[self.places] = numbers
        loader = self.loader
        if unread:
            labels = loader.dataset.samples.labels
            loader = DataLoader(_Labels(labels), loader.batch_size, sampler=loader.sampler)
        size = batch_size or loader.batch_size
        plain = _number(self.plain, numbers, views, self.plain.batch_size)
        return _number(loader, table, views, size), plain


class Batches:
    """Batches of a loader, with columns that each image's number looks up.

    Attributes:
        loader: anybody's, or one from `TrainingSet.numbered`, which columns need.
        columns: (N, …) by name. One called `inputs` stands in for the images.
    """

    def __init__(
        self,
        loader: DataLoader,
        columns: dict[str, Tensor] | None = None,
        conform: Callable[[Any], Tensor] | None = None,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        """`conform` and `tick` are those of the loader's `TrainingSet`."""
        self.loader, self.columns, self.conform, self.tick = loader, columns or {}, conform, tick
        self.numbered = isinstance(loader.dataset, _Numbered)

    def __iter__(self) -> Iterator[Batch]:
        for number, batch in enumerate(self.loader):
            self.tick()
            batch, places = batch if self.numbered else (batch, None)
            batch = Batch.read(batch, number, self.conform)
            if places is None:
                yield batch
                continue
            own = {
                name: column[places.to(column.device)].to(places.device)
                for name, column in self.columns.items()
            }
            cached = own.pop(INPUTS, None)
            columns = {**batch.columns, **own}
            if cached is None:
                yield batch._replace(columns=columns)
            else:
                yield Batch(cached, batch.labels, columns, cached=True)

    def with_columns(self, columns: dict[str, Tensor]) -> "Batches":
        """Copy with these columns too, or instead."""
        return Batches(self.loader, {**self.columns, **columns}, self.conform, self.tick)

    def prepared(self, accelerator: Accelerator) -> "Batches":
        """Copy on the accelerator's device, split over its processes."""
        columns = {name: c.to(accelerator.device) for name, c in self.columns.items()}
        return Batches(accelerator.prepare(self.loader), columns, self.conform, self.tick)


class _Labels(Dataset):
    """Labels alone, indexed as `ImageDataset` is."""

    def __init__(self, labels: np.ndarray) -> None:
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, position: int) -> tuple[int, Any]:
        index = position % len(self)
        return index, self.labels[index]


class _Numbered(Dataset):
    def __init__(self, dataset: Dataset, numbers: np.ndarray, views: int | None) -> None:
        self.dataset, self.numbers, self.views = dataset, numbers, views

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, position: int) -> tuple[Any, int]:
        # an `ImageDataset` counts positions on from epoch to epoch
        epoch, index = divmod(position, len(self))
        view = epoch % self.views if self.views else epoch
        return self.dataset[view * len(self) + index], int(self.numbers[index])


def _collate(collate: Collate, items: list[tuple[Any, int]]) -> tuple[Batch, Tensor]:
    samples, numbers = zip(*items, strict=True)
    batch = Batch.of(collate(list(samples)))
    _check_count(batch.labels, numbers)
    return batch, torch.tensor(numbers)


def _check_count(labels: Any, samples: Any) -> None:
    if len(labels) != len(samples):
        raise InputError(
            f"the collate_fn makes {len(labels)} labels of {len(samples)} samples: train.folds and "
            "head=crossfit need one of each, in their order"
        )


def _number(
    loader: DataLoader, numbers: np.ndarray, views: int | None, batch_size: int
) -> DataLoader:
    return _like(
        loader,
        _Numbered(loader.dataset, numbers, views),
        batch_size,
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
