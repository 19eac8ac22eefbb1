"""KgCoOp: CoOp's context, kept near hand-written prompts (Yao et al. 2023, trainers/kgcoop.py)."""

from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor
from torch.nn import functional as F

from vpt.losses import Loss
from vpt.methods._templates import TaughtContext, TemplateOptions
from vpt.methods.base import Batch, Step


class Options(TemplateOptions):
    """Options of KgCoOp; `templates` are what the context is kept near."""

    num_tokens: PositiveInt = 4  # ignored where `init` gives the words
    init: str | None = "a photo of a"  # words to start from; None: N(0, 0.02²)
    weight: NonNegativeFloat = 8.0  # of the distance


class KgCoOp(TaughtContext):
    """The loss is cross-entropy + weight · (1 - mean over classes of the cosine to the templates).

    Unlike there, any words may be those to start from.
    """

    Options = Options

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
