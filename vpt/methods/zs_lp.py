"""ZS-LP: a linear probe that starts from class embeddings (Silva-Rodríguez et al. 2024)."""

from collections.abc import Sequence

from torch import Tensor, nn

from vpt.backbones.clip import Adapter
from vpt.backbones.text import Tokenizer
from vpt.methods._templates import TemplateOptions, Templates


class ZSLP(Templates):
    """Logits are cosine similarities to learned prototypes, which start at the templates.

    Unlike there (jusiro/CLAP, trainers/adapters.py): names lose their underscores, and an epoch has
    each image once, in the view whose turn it is.

    Attributes:
        prototypes: (C, dim), at the scale of CLIP's text features: see `keeps_norms`.
    """

    takes_names = False
    keeps_norms = True

    def __init__(
        self,
        backbone: Adapter,
        class_names: Sequence[str],
        options: TemplateOptions,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        super().__init__(backbone, class_names, options, tokenizer)
        self.prototypes = nn.Parameter(self.class_embeddings.clone())

    def text_features(self, features: Tensor | None = None) -> Tensor:
        """The prototypes (C, dim), not normalised."""
        return self.prototypes
