"""Pixel prompts: a learned border or corner patch added to the image (Bahng et al. 2022)."""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from vpt.backbones.base import Backbone
from vpt.backbones.clip import Tokenizer
from vpt.errors import InputError
from vpt.methods._templates import TemplateOptions
from vpt.methods._text import embed_classes
from vpt.methods.base import Epoch, Head, Method
from vpt.methods.linear_probe import solve_head


class Options(TemplateOptions):
    """Options of pixel prompts; `templates` count where there is a text tower."""

    shape: Literal["border", "patch"] = "border"  # patch: at the top left
    size: PositiveInt | None = None  # pixels: the border's width, the patch's side; None: 30 of 224


class PixelPrompts(Method):
    """Trains pixels only. The classifier is zero-shot CLIP's, else a linear probe solved by `fit`.

    Attributes:
        prompts: (channels, pixels), added to normalised images, so in units of the preprocessing's
            std; they start at 0, the image as it is (hjbahng/visual_prompting: at N(0, 1)).
        head: Linear(feature_dim → C), frozen; None where class embeddings take its place.
    """

    Options = Options
    reads_text = True
    from_names = frozenset({"class_embeddings"})

    def __init__(
        self,
        backbone: Backbone,
        class_names: Sequence[str],
        options: Options,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        """Make the pixels, zero.

        Raises:
            InputError: a border or patch that is larger than the image.
        """
        super().__init__(backbone, class_names, options, tokenizer)
        side = backbone.preprocess.image_size
        size = options.size or round(side * 30 / 224)
        largest = side // 2 if options.shape == "border" else side
        if size > largest:
            raise InputError(f"method.size={size}: a {options.shape} has at most {largest} pixels")
        where = torch.zeros(side, side, dtype=torch.bool)
        if options.shape == "border":
            where[:] = True
            where[size:-size, size:-size] = False
        else:
            where[:size, :size] = True
        self.register_buffer("where", where.flatten().nonzero()[:, 0], persistent=False)
        self.prompts = nn.Parameter(torch.zeros(backbone.preprocess.channels, len(self.where)))
        self.register_buffer("folded", None, persistent=False)  # in the inference form
        if hasattr(backbone, "encode_texts"):
            embeddings = embed_classes(backbone, class_names, options.templates, tokenizer)
            self.register_buffer("class_embeddings", embeddings)
            self.takes_names = True
            self.head = None
        else:
            self.head = Head(backbone.feature_dim, len(class_names)).requires_grad_(False)

    def before_epoch(self, at: Epoch) -> None:
        """Before the first epoch, solve the head."""
        if at.number == 0 and self.head is not None:
            seen = at.features()
            solve_head(self.head, self.target, seen.inputs, seen.labels)

    def pixels(self, images: Tensor) -> Tensor:
        """Images with the prompt on them."""
        return images + (self.image() if self.folded is None else self.folded)

    def image(self) -> Tensor:
        """The prompt as an image (channels, H, W), 0 where it has no pixels."""
        side = self.backbone.preprocess.image_size
        blank = self.prompts.new_zeros(len(self.prompts), side * side)
        return blank.index_copy(1, self.where, self.prompts).unflatten(1, (side, side))

    def text_features(self, features: Tensor | None = None) -> Tensor:
        """Class embeddings (C, dim) of CLIP, not normalised."""
        return self.class_embeddings

    def make_constants(self) -> None:
        """Keep the prompt as one image."""
        super().make_constants()
        self.folded = self.image()

    def logits(self, features: Tensor) -> Tensor:
        """Scaled cosine similarities (B, C), or the head's."""
        if self.head is None:
            return self.similarities(features, self.class_embeddings)
        return self.head(features)
