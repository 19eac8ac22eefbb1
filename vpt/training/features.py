"""Features and a method's frozen columns, which never change for an image: computed once."""

import json
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from vpt.accelerator import Precision, make_accelerator
from vpt.artifact import digest
from vpt.data.loaders import CACHE_BYTES
from vpt.errors import InputError
from vpt.evaluation.evaluate import EVAL_BATCH, predict
from vpt.files import write_atomically
from vpt.methods import Method
from vpt.methods.base import Batch
from vpt.progress import Log
from vpt.resources import package_version
from vpt.training.training_set import INPUTS, Batches

NAMES = "names"  # the column of a file that says whose its rows are


class FrozenColumns:
    """Columns (N, …) of a training set, for the views of an epoch.

    Without augmentation an image has one view, computed once: exact. With it, features of each
    epoch's own views are computed in one pass before the epoch: exact too. Or the epochs take turns
    with a number of `views` that are computed once.

    Attributes:
        views: how many there are; None: each epoch's own.
        labels: of the training set's images.
        columns: as `show` left them; `inputs` among them if the method's never change.
        left_out: `spare_columns` that would take more than CACHE_BYTES.
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
        """`train` loads an `ImageDataset`; `folder` keeps columns for later runs, None: no."""
        self.model, self.train, self.accelerator = model, train, accelerator
        self.folder, self.log = folder and folder.expanduser().absolute(), log
        self.views = 1 if train.dataset.deterministic else views
        self.labels = torch.from_numpy(train.dataset.samples.labels)
        self.stored: dict[int, dict[str, Tensor]] = {}
        self.columns: dict[str, Tensor] = {}
        which = {None: "each epoch's own views, in one pass", 1: "one view"}
        what = "image features" if model.frozen_features else "frozen columns"
        log(f"{what}: of {which.get(self.views, f'{self.views} stored views')} an image")
        self.left_out = self._left_out()

    @property
    def whole(self) -> bool:
        """True if `columns` are all that `image_features` would give."""
        model, images = self.model, self.train.dataset
        return model.frozen_features and images.deterministic and not model.cross_fitted

    def show(self, epoch: int) -> None:
        """Have the columns of an epoch's views at hand."""
        view = epoch if self.views is None else epoch % self.views
        if view not in self.stored:
            if self.views is None:
                self.stored.clear()
            self.stored[view] = self._load(view)
        self.columns = self.stored[view]

    def _load(self, view: int) -> dict[str, Tensor]:
        first = view * len(self.train.dataset)
        if self.folder is None:
            return self._compute(range(first, first + len(self.train.dataset)))
        key, names = self._key(view), self._names()
        path = self.folder / f"{key}.safetensors"
        main = self.accelerator.is_main_process
        # one process decides for all: they compute columns together or not at all
        (kept,) = broadcast_object_list([read_columns(path, key) if main else None])
        if kept is None and path.is_file():
            self.log(f"image features: broken, so made again: {path}")
        known = _rows(kept[NAMES]) if kept else {}
        missing = [index for index, name in enumerate(names.numpy()) if name.tobytes() not in known]
        if missing:
            made = self._compute([first + index for index in missing])
            made[NAMES] = names[missing]
            kept = {n: torch.cat([kept[n], made[n]]) for n in made} if kept else made
            if main:
                write_columns(path, kept, key)
        else:
            self.log(f"image features: from {path}")
        known = _rows(kept[NAMES])
        rows = [known[name.tobytes()] for name in names.numpy()]
        return {name: column[rows] for name, column in kept.items() if name != NAMES}

    def _names(self) -> Tensor:
        """Hashes (N, bytes) that tell images apart: of contents, or of places if augmented."""
        images = self.train.dataset
        if images.deterministic:
            names = b"".join(images.samples.hashes())
            return torch.frombuffer(bytearray(names), dtype=torch.uint8).view(len(images), -1)
        return torch.arange(len(images)).view(torch.uint8).view(len(images), -1)

    @torch.no_grad()
    def _compute(self, positions: Sequence[int]) -> dict[str, Tensor]:
        # a part, not a sampler: accelerate cuts the last batch by the length of the data set
        loader = DataLoader(
            Subset(self.train.dataset, positions),
            EVAL_BATCH,
            num_workers=self.train.num_workers,
            collate_fn=self.train.collate_fn,
        )
        model, accelerator = self.model.to(self.accelerator.device).eval(), self.accelerator
        parts = []
        for images, _ in accelerator.prepare(loader):
            with accelerator.autocast():
                columns = model.frozen_columns(images)
                columns = {n: c for n, c in columns.items() if n not in self.left_out}
                if model.frozen_features:
                    columns = {INPUTS: model.features(images), **columns}
            columns = {k: c.float() if c.is_floating_point() else c for k, c in columns.items()}
            parts.append(accelerator.gather_for_metrics(columns))
        return _check({name: torch.cat([p[name] for p in parts]).cpu() for name in parts[0]})

    @torch.no_grad()
    def _left_out(self) -> list[str]:
        model, images = self.model, self.train.dataset
        if not model.spare_columns:
            return []
        size = model.backbone.preprocess.image_size
        one = model.frozen_columns(torch.zeros(1, 3, size, size, device=model.backbone.device))
        left_out = []
        for name in sorted(model.spare_columns & one.keys()):
            whole = 4 * one[name].numel() * len(images) * (self.views or 1)
            if whole > CACHE_BYTES:
                left_out.append(name)
                self.log(
                    f"memory: {whole / 1e6:,.0f} MB of {name!r} do not fit into the "
                    f"{CACHE_BYTES >> 20} MiB for frozen columns, so each step computes it anew"
                )
        return left_out

    def _key(self, view: int) -> str:
        """Names all that the columns come from; another of any of it is another file."""
        model, images = self.model, self.train.dataset
        own = model.overrides(
            "image_prompts", "pixels", "read", "project", "features", "frozen_columns"
        )
        tensors, tunable = model.artifact_tensors() if own else {}, model.tunable_parameters()
        frozen = {name: t.cpu() for name, t in tensors.items() if name not in tunable}
        text = json.dumps(
            {
                "version": package_version(),
                "torch": torch.__version__,
                "backbone": [model.backbone.fingerprint(), repr(model.backbone.model)],
                "method": own and [model.name, model.options.model_dump(mode="json")],
                "preprocess": model.backbone.preprocess.to_dict(),
                "windows": images.samples.windows,
                # any set of images adds to the file of those that are not augmented
                "augment": images.deterministic
                or [images.augmentation, images.seed, view, images.samples.content_hash()],
                "precision": self.accelerator.mixed_precision,
                **({"left_out": self.left_out} if self.left_out else {}),
            },
            sort_keys=True,
        )
        return digest(frozen, text)


@torch.no_grad()
def predict_cached(
    model: Method, loader: DataLoader, precision: Precision, folder: Path | None
) -> tuple[Tensor, Tensor]:
    """Logits (N, C) and labels of the images of a loader without augmentation.

    Of a method with `frozen_features`, `folder` keeps the features; None: nothing does.
    """
    if folder is None or not model.frozen_features:
        return predict(model, loader, precision)
    accelerator = make_accelerator(precision)
    frozen = FrozenColumns(model, loader, accelerator, None, folder, log=lambda line: None)
    frozen.show(0)
    model.to(accelerator.device).eval()
    parts = []
    for features in frozen.columns[INPUTS].split(EVAL_BATCH):
        with accelerator.autocast():
            parts.append(model.logits(features.to(accelerator.device)).float().cpu())
    return torch.cat(parts), frozen.labels


def current_features(
    model: Method, batches: Batches, accelerator: Accelerator, frozen: FrozenColumns | None
) -> Batch:
    """Features of all images of `batches` as of now, cached if they never change."""
    if frozen and frozen.whole:
        frozen.show(0)
        return Batch(frozen.columns[INPUTS], frozen.labels, cached=True)
    return image_features(model, batches, accelerator)


@torch.no_grad()
def image_features(model: Method, batches: Batches, accelerator: Accelerator) -> Batch:
    """One batch of all images: features (N, feature_dim) in float32, on the CPU.

    Raises:
        InputError: a feature is not finite.
    """
    model.to(accelerator.device).eval()
    parts = []
    for batch in batches.prepared(accelerator):
        with accelerator.autocast():
            features = model.batch_features(batch)
        whole = (features.float(), batch.labels, batch.columns)
        parts.append(accelerator.gather_for_metrics(whole))
    features, labels, columns = zip(*parts, strict=True)
    features, labels = torch.cat(features).cpu(), torch.cat(labels).cpu()
    columns = {name: torch.cat([part[name] for part in columns]).cpu() for name in columns[0]}
    _check({INPUTS: features})
    return Batch(features, labels, columns, cached=True)


def _check(columns: dict[str, Tensor]) -> dict[str, Tensor]:
    if not all(column.isfinite().all() for column in columns.values()):
        raise InputError("features are not finite: check the backbone's weights, or lower train.lr")
    return columns


def _rows(names: Tensor) -> dict[bytes, int]:
    return {name.tobytes(): row for row, name in enumerate(names.numpy())}


def write_columns(path: Path, columns: dict[str, Tensor], key: str) -> None:
    """Write columns of one length under `key`, atomically, with their digest."""
    write_atomically(path, safetensors.torch.save(columns, {"sha256": digest(columns, key)}))


def read_columns(path: Path, key: str) -> dict[str, Tensor] | None:
    """The columns written under `key`; None if they are not there whole."""
    try:
        with safe_open(path, framework="pt") as file:
            columns = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            whole = file.metadata()["sha256"] == digest(columns, key)
            whole &= len({len(column) for column in columns.values()}) == 1
    except Exception:
        return None
    return columns if whole else None
