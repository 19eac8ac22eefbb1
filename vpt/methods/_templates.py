"""Read-out halves of methods that know hand-written templates."""

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from vpt.backbones.clip import Adapter
from vpt.backbones.text import Tokenizer
from vpt.config import Strict
from vpt.methods._text import ClassEmbeddings, TextReadout, embed_classes, embed_templates

CLIP_NORM = 9.0  # of OpenAI's text features, which have 7 to 11
CLIP_NORMS = 5.0, 15.0  # taken as they are


class TemplateOptions(Strict):
    """Options of hand-written prompts."""

    templates: list[str] = Field(["a photo of a {}."], min_length=1)

    @field_validator("templates")
    @classmethod
    def _one_name(cls, templates: list[str] | None) -> list[str] | None:
        for template in templates or []:
            if template.count("{}") != 1:
                raise ValueError(f"template {template!r} needs {{}} once, for the class name")
        return templates


class Templates(ClassEmbeddings):
    """Class embeddings of hand-written prompts; the image tower runs without prompts.

    Attributes:
        keeps_norms: True where embeddings are learned at the scale of text features: they are the
            mean over templates as they come, at the norm of CLIP's, on which learning rates and
            penalties depend. False: the mean of normalised ones.
        class_embeddings: (C, dim), of the templates.
    """

    Options = TemplateOptions
    frozen_features = True
    keeps_norms: ClassVar[bool] = False

    def __init__(
        self,
        backbone: Adapter,
        class_names: Sequence[str],
        options: TemplateOptions,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        super().__init__(backbone, class_names, options, tokenizer)
        texts = embed_templates(backbone, class_names, options.templates, tokenizer)
        embeddings = at_clip_norm(texts.mean(1)) if self.keeps_norms else unit(texts).mean(1)
        self.register_buffer("class_embeddings", embeddings, persistent=False)
        self.make_state()


class Prototypes(Templates):
    """Class embeddings that start at the templates' and belong to the classes.

    Attributes:
        prototypes: (C, dim).
    """

    takes_names = False

    def make_state(self) -> None:
        """Start the prototypes."""
        self.prototypes = nn.Parameter(self.class_embeddings.clone())

    def text_features(self, features: Tensor | None = None) -> Tensor:
        """The prototypes (C, dim), not normalised."""
        return self.prototypes


class TaughtContext(TextReadout):
    """CoOp's context beside a teacher; the image tower runs without prompts.

    Attributes:
        teacher: (C, dim), class embeddings of the templates.
    """

    frozen_features = True

    def __init__(
        self,
        backbone: Adapter,
        class_names: Sequence[str],
        options: TemplateOptions,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        super().__init__(backbone, class_names, options, tokenizer)
        teacher = embed_classes(backbone, class_names, options.templates, tokenizer)
        self.register_buffer("teacher", teacher, persistent=False)


def unit(features: Tensor) -> Tensor:
    """Features (…, dim) of norm 1."""
    return F.normalize(features, dim=-1)


def at_clip_norm(embeddings: Tensor) -> Tensor:
    """Embeddings (C, dim) as they are, or scaled together to the mean norm of CLIP's."""
    norm, (low, high) = embeddings.norm(dim=-1).mean(), CLIP_NORMS
    return embeddings if low <= norm <= high else embeddings * (CLIP_NORM / norm)
