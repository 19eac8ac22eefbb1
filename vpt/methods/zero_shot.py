"""Zero-shot CLIP: hand-written prompts, an ensemble of templates (Radford et al. 2021, 3.1.4)."""

from collections.abc import Sequence

from torch import Tensor

from vpt.backbones.clip import Adapter
from vpt.backbones.text import Tokenizer
from vpt.config import Strict
from vpt.methods._templates import Templates
from vpt.methods._text import ClassEmbeddings, embed_classes


class Options(Strict):
    """Options of zero-shot classification."""

    templates: Templates = ["a photo of a {}."]  # noqa: RUF012


class ZeroShot(ClassEmbeddings):
    """Class embeddings: the mean over templates of normalised text features. Nothing trains."""

    Options = Options
    solved = True
    frozen_features = True
    from_names = frozenset({"class_embeddings"})

    def __init__(
        self,
        backbone: Adapter,
        class_names: Sequence[str],
        options: Options,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        super().__init__(backbone, class_names, options, tokenizer)
        embeddings = embed_classes(backbone, class_names, options.templates, tokenizer)
        self.register_buffer("class_embeddings", embeddings)

    def solve(self, features: Tensor, labels: Tensor) -> None:
        """Nothing to learn: the templates are the classifier."""
