"""Base of all methods: a frozen backbone, a few tensors that train, logits out."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from vpt.backbones.base import Backbone, Prompts, share
from vpt.backbones.text import Tokenizer
from vpt.config import Strict
from vpt.errors import InputError
from vpt.losses import Loss
from vpt.losses.cross_entropy import CrossEntropy
from vpt.targets import Target
from vpt.targets.multiclass import Multiclass

IMAGES = ("image", "images", "pixel_values", "img", "inputs", "x")  # names in a mapping
LABELS = ("label", "labels", "target", "targets", "y")


class Batch(NamedTuple):
    """B images, their labels, and named columns of B rows.

    Attributes:
        inputs: images (B, 3, H, W), or their features (B, feature_dim) where `cached`.
        labels: of the kind of the method's target.
        columns: `split` (B,), the split that holds the image out, and `place` (B,) among all
            images, of a cross-fitted method; those of `Method.frozen_columns`.
        cached: True where `inputs` are features.
    """

    inputs: Tensor
    labels: Tensor
    columns: dict[str, Tensor] = {}  # noqa: RUF012
    cached: bool = False

    @classmethod
    def of(cls, batch: Any) -> "Batch":
        """The batch that a loader gave: images, labels and what else; a mapping; or a Batch.

        Raises:
            InputError: it has no images and labels that are named or placed so.
        """
        if isinstance(batch, Batch):
            return batch
        if isinstance(batch, Mapping):
            found = [next((n for n in names if n in batch), None) for names in (IMAGES, LABELS)]
            if None not in found:
                return cls(*(batch[name] for name in found))
            raise InputError(
                f"it has {', '.join(map(str, batch))}: name its images one of {', '.join(IMAGES)}, "
                f"and its labels one of {', '.join(LABELS)}"
            )
        if isinstance(batch, Sequence) and len(batch) > 1:
            return cls(*batch[:2])
        raise InputError(f"it is a {type(batch).__name__}: give images and labels")

    @classmethod
    def read(cls, batch: Any, number: int, conform: Callable[[Any], Tensor] | None) -> "Batch":
        """The batch of somebody's loader, with labels as `conform` makes them; None: as it is.

        Raises:
            InputError: as `of` and `conform`; says the batch's number.
        """
        try:
            batch = cls.of(batch)
            if conform is None:
                return batch
            images = batch.inputs
            if not batch.cached and not (
                isinstance(images, Tensor) and images.is_floating_point() and images.ndim == 4
            ):
                shape = tuple(getattr(images, "shape", ()))
                kind = getattr(images, "dtype", type(images).__name__)
                raise InputError(f"images are {kind} of shape {shape}: give floats (B, 3, H, W)")
            return batch._replace(labels=conform(batch.labels).to(images.device))
        except InputError as error:
            raise InputError(f"batch {number} of the loader: {error}") from None

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on `device`."""
        columns = {name: column.to(device) for name, column in self.columns.items()}
        return Batch(self.inputs.to(device), self.labels.to(device), columns, self.cached)


class Step(NamedTuple):
    """Loss of a batch.

    Attributes:
        total: a scalar, which the step lowers.
        logits: (B, C).
        terms: parts of the total by name, scalars, to be logged.
    """

    total: Tensor
    logits: Tensor
    terms: dict[str, Tensor] = {}  # noqa: RUF012


class Epoch(NamedTuple):
    """The state of training that hooks are given, on every process alike.

    Attributes:
        number: counts from 0.
        count: how many epochs there are.
        loss: the one that steps are given.
        batches: all training images in order, without augmentation, with `split`.
        features: the features (N, feature_dim) of all of `batches`, on the CPU, as of now; or,
            before an epoch of images that never change, as the last one's steps computed them.
    """

    number: int
    count: int
    loss: Loss
    batches: Iterable[Batch]
    features: Callable[[], Batch]


class Method(nn.Module):
    """Base of all methods. A method is one file in this package, with its options beside it.

    It is made of two halves, each a subclass of this: an image half (`Tokens`, `Weights`, or none)
    overrides `image_prompts` or `pixels`, and a read-out half (`LinearReadout`, a text read-out)
    has `logits`. Each half calls `super().__init__`, and computes its own constants for `fold`.

    Attributes:
        name: the file's name; of a class outside this package, the class's.
        reads_text: True where it needs class names, on a backbone with a text tower.
        options: checked options.
        class_names: in label order.
        target: the kind of its labels.
        solved: True where the method is fitted to features at once, by `solve(features, labels)`,
            and not by the steps of `fit`.
        frozen_features: True where nothing that trains changes an image's features, so that
            they need be computed only once.
        cross_fitted: True where `step` needs the column `split`.
        spare_columns: frozen columns that `step` does without, more slowly, where they take more
            memory than there is for them.
        takes_names: True where an artefact can be loaded with other class names: nothing that is
            learned belongs to a class.
        from_names: tensors of an artefact that follow from the class names alone.
        statistics: tensors that later tasks of a stream need and no image does, so that artefacts
            lack them. A method that has some adds to them in `solve`, unless `task` is 0.
        passes: of the image tower, that an image takes at test.
        task: the number of a stream's task that it is trained on, counted from 0.
        is_folded: True for the result of `fold`: it cannot be trained or saved.
    """

    Options: ClassVar[type[Strict]] = Strict
    name: ClassVar[str]
    reads_text: ClassVar[bool] = False
    solved: ClassVar[bool] = False
    frozen_features: ClassVar[bool] = False
    cross_fitted = False
    takes_names = False
    from_names: ClassVar[frozenset[str]] = frozenset()
    statistics: ClassVar[frozenset[str]] = frozenset()
    spare_columns: ClassVar[frozenset[str]] = frozenset()
    task = 0
    passes = 1.0
    is_folded = False
    target: Target = Multiclass()

    def __init_subclass__(cls) -> None:
        package, _, module = cls.__module__.rpartition(".")
        cls.name = module if package == __package__ else cls.__name__

    def __init__(
        self,
        backbone: Backbone,
        class_names: Sequence[str],
        options: Strict,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.class_names = list(class_names)
        self.options = options

    def image_prompts(self, images: Tensor) -> Prompts | None:
        """Prompts of the image tower for images (B, 3, H, W); None: it runs without."""
        return None

    def pixels(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) as the image tower gets them."""
        return images

    def read(self, images: Tensor, prompts: Prompts | None) -> Tensor:
        """Features (B, feature_dim) that the read-out half reads: of what the tower pools.

        Others read outputs of prompts (`Backbone.tokens`).
        """
        if self.overrides("project"):
            return self.project(self.backbone.pooled(images, prompts))
        return self.backbone(images, prompts)

    def project(self, pooled: Tensor) -> Tensor:
        """Features (B, feature_dim) of the tower's pooled outputs (B, …): by its own projection."""
        return self.backbone.project(pooled)

    @property
    def feature_dim(self) -> int:
        """Width of what `read` gives."""
        return self.backbone.feature_dim

    def features(self, images: Tensor) -> Tensor:
        """Image features (B, feature_dim)."""
        return self.read(self.pixels(images), self.image_prompts(images))

    def feature_maps(self, images: Tensor, indices: Sequence[int] | None = None) -> list[Tensor]:
        """Feature maps (B, width, rows, columns) of patches after the blocks `indices`; None: all.

        With prompts, which are not among them; before the final norm.
        """
        return self.backbone.feature_maps(self.pixels(images), self.image_prompts(images), indices)

    def logits(self, features: Tensor) -> Tensor:
        """Logits (B, C) from image features (B, feature_dim)."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C) of images (B, 3, H, W), normalised as `backbone.preprocess` says."""
        return self.logits(self.features(images))

    def similarities(self, features: Tensor, texts: Tensor) -> Tensor:
        """Logits (B, C): scaled cosine similarities of features (B, dim) to the target's texts.

        Texts are (T, dim) or (B, T, dim), of the names that `Target.texts` gives.
        """
        return self.target.contrast(self.backbone.similarity(features, texts))

    def step(self, batch: Batch, loss: Loss) -> Step:
        """Training loss by `loss`, with the logits and the terms to log."""
        logits = self.logits(self.batch_features(batch))
        return Step(loss(logits, batch.labels), logits)

    def batch_features(self, batch: Batch) -> Tensor:
        """Image features (B, feature_dim), cached or computed."""
        return batch.inputs if batch.cached else self.features(batch.inputs)

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Training loss by cross-entropy, and the logits (B, C), for a loop of one's own."""
        with torch.no_grad():
            batch = Batch(images, labels, self.frozen_columns(images))
        step = self.step(batch, CrossEntropy(self.target))
        return step.total, step.logits

    def frozen_columns(self, images: Tensor) -> dict[str, Tensor]:
        """Columns (B, …) of what nothing that trains changes for images (B, 3, H, W).

        `fit` computes them without gradients, once for each view of an image where it can.
        """
        return {}

    @classmethod
    def overrides(cls, *names: str) -> bool:
        """True if the class has any of these methods from elsewhere than `Method`."""
        return any(getattr(cls, name) is not getattr(Method, name) for name in names)

    def begin_task(self, task: int, count: int) -> None:
        """Called by a stream of `count` tasks before the training on task number `task`."""
        self.task = task

    def first_session(self) -> "Method | None":
        """A method that `fit` trains on the same images before `solve`, which `adopt` is given."""
        return None

    def adopt(self, session: "Method") -> None:
        """Take over what `first_session` learned."""

    def before_epoch(self, at: Epoch) -> None:
        """Called by `fit` before the steps of each epoch."""

    def after_epoch(self, at: Epoch) -> None:
        """Called by `fit` after the steps of each epoch."""

    def after_training(self, at: Epoch) -> None:
        """Called by `fit` after the last epoch, last."""

    def tunable_parameters(self) -> dict[str, nn.Parameter]:
        """The tensors that train, by name; everything else has `requires_grad` False."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def artifact_tensors(self) -> dict[str, Tensor]:
        """Tensors of an artefact: the method's own state, and backbone weights that trained."""
        tunable = self.tunable_parameters()
        return {
            name: tensor
            for name, tensor in self.state_dict().items()
            if (name in tunable or not name.startswith("backbone.")) and name not in self.statistics
        }

    def training_tensors(self) -> dict[str, Tensor]:
        """Tensors that a checkpoint of unfinished training stores, and a stream between tasks."""
        kept = {name: t for name, t in self.state_dict().items() if name in self.statistics}
        return {**self.artifact_tensors(), **kept}

    def make_room(self, tensors: dict[str, Tensor]) -> None:
        """Size what has the size of the training set; called before `tensors` are loaded."""

    def fold(self) -> "Method":
        """The inference form: a frozen view with all that no image changes computed once."""
        folded = share(self)
        if not self.is_folded:
            with torch.no_grad():
                folded.make_constants()
            folded.is_folded = True
        return folded

    def make_constants(self) -> None:
        """Compute what no image changes; called for the inference form alone."""

    def conform(self, labels: Any) -> Tensor:
        """Labels of a batch from anybody's loader as the target has them; see `Target.conform`."""
        return self.target.conform(labels, len(self.class_names))

    def train(self, mode: bool = True) -> "Method":
        """Training mode for the method's own modules; the backbone always stays in eval mode."""
        super().train(mode)
        self.backbone.eval()
        return self


class Head(nn.Linear):
    """Linear classifier (feature_dim → C), initialised as KMnP/vpt does (src/models/mlp.py)."""

    def reset_parameters(self) -> None:
        """Kaiming normal by fan-out, bias -ln 99: every class starts at a probability of 1 %."""
        nn.init.normal_(self.weight, std=math.sqrt(2 / self.out_features))
        nn.init.constant_(self.bias, -math.log(99))

    def forward(self, features: Tensor) -> Tensor:
        """Logits (B, C) of features (B, feature_dim), in the head's own precision."""
        with torch.autocast(features.device.type, enabled=False):
            return super().forward(features.to(self.weight.dtype))


def require_clip(backbone: Backbone, method: str) -> Any:
    """The backbone, if it has a text tower.

    Raises:
        InputError: it has none.
    """
    if not hasattr(backbone, "encode_texts"):
        raise InputError(
            f"{method} needs a CLIP (image and text towers), not {backbone.family}: "
            "take an open_clip backbone, or vpt_deep"
        )
    return backbone
