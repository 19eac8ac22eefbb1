"""Image features computed once, for methods that leave the image tower alone."""

import json
from pathlib import Path

import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vpt.artifact import digest, package_version, write_atomically
from vpt.data.loaders import ImageDataset
from vpt.engine.evaluate import EVAL_BATCH
from vpt.engine.progress import Log
from vpt.errors import InputError
from vpt.methods import Method


class FrozenFeatures(Dataset):
    """Features of a training set in the place of its images, indexed as `ImageDataset` is.

    Without augmentation an image has one view, computed once: exact. With it, each epoch has its
    own, computed in one pass before the epoch: exact too. Or the epochs take turns with a number
    of `views` that are computed once.
    """

    def __init__(
        self,
        model: Method,
        train: DataLoader,
        accelerator: Accelerator,
        views: int | None,
        folder: Path | None,
        log: Log,
    ) -> None:
        """`train` loads an `ImageDataset`; `folder` keeps features for later runs, None: no."""
        self.model, self.train, self.accelerator = model, train, accelerator
        self.folder, self.log = folder and folder.expanduser().absolute(), log
        images: ImageDataset = train.dataset
        self.views = 1 if images.deterministic else views
        self.labels = torch.from_numpy(images.samples.labels)
        self.stored: dict[int, Tensor] = {}
        self.features = torch.empty(0)
        which = {None: "each epoch's own views, in one pass", 1: "one view"}
        log(f"image features: of {which.get(self.views, f'{self.views} stored views')} an image")

    def show(self, epoch: int) -> None:
        """Have the features of an epoch's views at hand."""
        view = epoch if self.views is None else epoch % self.views
        if view not in self.stored:
            if self.views is None:
                self.stored.clear()
            self.stored[view] = self._load(view)
        self.features = self.stored[view]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor]:
        index = position % len(self)
        return self.features[index], self.labels[index]

    def _load(self, view: int) -> Tensor:
        if self.folder is None:
            return self._compute(view)
        key = self._key(view)
        path = self.folder / f"{key}.safetensors"
        main = self.accelerator.is_main_process
        # one process decides for all: they compute features together or not at all
        (features,) = broadcast_object_list([_read(path, key) if main else None])
        if features is not None:
            self.log(f"image features: from {path}")
            return features
        if path.is_file():
            self.log(f"image features: broken, so made again: {path}")
        tensors = {"features": self._compute(view)}
        if main:
            header = {"sha256": digest(tensors, key)}
            write_atomically(path, safetensors.torch.save(tensors, header))
        return tensors["features"]

    def _compute(self, view: int) -> Tensor:
        count = len(self)
        loader = DataLoader(
            self.train.dataset,
            EVAL_BATCH,
            sampler=range(view * count, (view + 1) * count),
            num_workers=self.train.num_workers,
            collate_fn=self.train.collate_fn,
        )
        return image_features(self.model, loader, self.accelerator)[0]

    def _key(self, view: int) -> str:
        """Names all that the features come from; another of any of it is another file."""
        model, images = self.model, self.train.dataset
        tunable = model.tunable_parameters()
        frozen = {n: t.cpu() for n, t in model.artifact_tensors().items() if n not in tunable}
        text = json.dumps(
            {
                "version": package_version(),
                "torch": torch.__version__,
                "backbone": [model.backbone.fingerprint(), repr(model.backbone.model)],
                "layers": getattr(model, "layers", None),
                "preprocess": model.backbone.preprocess.to_dict(),
                "augment": images.deterministic or [images.augmentation, images.seed, view],
                "images": images.samples.content_hash(),
                "precision": self.accelerator.mixed_precision,
            },
            sort_keys=True,
        )
        return digest(frozen, text)


@torch.no_grad()
def image_features(
    model: Method, loader: DataLoader, accelerator: Accelerator
) -> tuple[Tensor, ...]:
    """Features (N, feature_dim) in float32 and labels (N,) of all images of `loader`, on the CPU.

    With whatever else a batch of `loader` has.

    Raises:
        InputError: a feature is not finite.
    """
    model.to(accelerator.device).eval()
    parts = []
    for images, *targets in accelerator.prepare(loader):
        with accelerator.autocast():
            features = model.features(images)
        parts.append(accelerator.gather_for_metrics((features.float(), *targets)))
    features, *targets = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    if not features.isfinite().all():
        raise InputError("features are not finite: check the backbone's weights, or lower train.lr")
    return features, *targets


def _read(path: Path, key: str) -> Tensor | None:
    """What was written under `key`; None if it is not there whole."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors, header = {"features": file.get_tensor("features")}, file.metadata()
        whole = header["sha256"] == digest(tensors, key)
    except Exception:
        return None
    return tensors["features"] if whole else None
