"""Base of all methods: a frozen backbone, a few tensors that train, logits out."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vpt.backbones.base import Backbone, Prompts, share
from vpt.backbones.text import Tokenizer
from vpt.config import Strict
from vpt.errors import InputError
from vpt.targets import Target
from vpt.targets.multiclass import Multiclass

# images or features, labels, and of a cross-fitted method the folds that hold them out
Batch = tuple[Tensor, ...]
Criterion = Callable[[Tensor, Tensor], Tensor]  # of logits (B, C) and labels: a mean loss


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
        criterion: the loss of logits (B, C) and labels; `fit` sets it to the one it is told.
        log_weights: (C,), how that loss weighs the classes; `fit` sets it. None: alike.
        solved: True where the method is solved in closed form from features, not by gradients;
            it then has `solve(features, labels)`.
        frozen_features: True where nothing that trains changes an image's features, so that
            they need be computed only once.
        cross_fitted: True where the loss of an image takes as a third argument, `folds` (B,), which
            fold holds it out.
        takes_names: True where an artefact can be loaded with other class names: nothing that is
            learned belongs to a class.
        from_names: tensors of an artefact that follow from the class names alone.
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
    is_folded = False
    target: Target = Multiclass()
    criterion: Criterion | None = None
    log_weights: Tensor | None = None

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
        """Features (B, feature_dim) that the read-out half reads: the tower's own."""
        return self.backbone(images, prompts)

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

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Training loss (a scalar) on labels (B,) or (B, C), and the logits (B, C)."""
        return self.feature_loss(self.features(images), labels)

    def feature_loss(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The same from image features (B, feature_dim)."""
        logits = self.logits(features)
        return (self.criterion or self.target.loss)(logits, labels), logits

    def before_epoch(
        self, epoch: int, epochs: int, batches: Iterable[Batch], features: Callable[[], Batch]
    ) -> None:
        """Called by `fit` before each epoch, on every process alike.

        Args:
            epoch: counts from 0.
            epochs: how many there are.
            batches: all training images without augmentation, (B, 3, H, W), labels (B,), and the
                folds (B,) of a cross-fitted method.
            features: computes their features (N, feature_dim) as of now; labels (N,), folds (N,).
        """

    def after_training(self, features: Callable[[], Batch]) -> None:
        """Called by `fit` after the last step, on every process alike; `features` as above."""

    def tunable_parameters(self) -> dict[str, nn.Parameter]:
        """The tensors that train, by name; everything else has `requires_grad` False."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def artifact_tensors(self) -> dict[str, Tensor]:
        """What an artefact stores: the method's own state, and backbone weights that trained."""
        tunable = self.tunable_parameters()
        return {
            name: tensor
            for name, tensor in self.state_dict().items()
            if name in tunable or not name.startswith("backbone.")
        }

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
