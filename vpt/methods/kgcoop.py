"""KgCoOp: CoOp's context, kept near hand-written prompts (Yao et al. 2023, trainers/kgcoop.py)."""

from collections.abc import Sequence

from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor
from torch.nn import functional as F

from vpt.backbones.clip import Adapter
from vpt.backbones.text import Tokenizer
from vpt.losses import Loss
from vpt.methods._templates import TemplateOptions
from vpt.methods._text import TextReadout, embed_classes
from vpt.methods.base import Batch, Step


class Options(TemplateOptions):
    """Options of KgCoOp; `templates` are what the context is kept near."""

    num_tokens: PositiveInt = 4  # ignored where `init` gives the words
    init: str | None = "a photo of a"  # words to start from; None: N(0, 0.02²)
    weight: NonNegativeFloat = 8.0  # of the distance


class KgCoOp(TextReadout):
    """The loss is cross-entropy + weight · (1 - mean over classes of the cosine to the templates).

    Unlike there, any words may be those to start from.

    Attributes:
        context: (num_tokens, text_width).
        teacher: (C, dim), class embeddings of the templates.
    """

    Options = Options
    frozen_features = True

    def __init__(
        self,
        backbone: Adapter,
        class_names: Sequence[str],
        options: Options,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        super().__init__(backbone, class_names, options, tokenizer)
        teacher = embed_classes(backbone, class_names, options.templates, tokenizer)
        self.register_buffer("teacher", teacher, persistent=False)

    def step(self, batch: Batch, loss: Loss) -> Step:
        """Training loss, with the terms `distance` and that of `loss`."""
        texts = self.text_features()
        logits = self.similarities(self.batch_features(batch), texts)
        own, distance = loss(logits, batch.labels), self.distance(texts)
        total = own + self.options.weight * distance
        return Step(total, logits, {loss.name: own, "distance": distance})

    def distance(self, texts: Tensor) -> Tensor:
        """1 - the mean cosine of class embeddings (C, dim) and the teacher's, a scalar."""
        return 1 - F.cosine_similarity(texts, self.teacher, dim=-1).mean()
