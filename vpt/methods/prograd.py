"""ProGrad: CoOp's gradient without what contradicts hand-written prompts (Zhu et al. 2023)."""

from collections.abc import Sequence

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from vpt.backbones.clip import Adapter
from vpt.backbones.text import Tokenizer
from vpt.errors import InputError
from vpt.losses import Loss
from vpt.methods._templates import TaughtContext, TemplateOptions
from vpt.methods.base import Batch, Step


class Options(TemplateOptions):
    """Options of ProGrad; `templates` are the teacher's."""

    num_tokens: PositiveInt = 16
    # words of the last vectors, before which the others start at 0; None: N(0, 0.02²)
    init: str | None = "a photo of a"
    weight: float = Field(1.0, ge=0, le=1)  # of the contradicting part that is taken away
    temperature: PositiveFloat = 1.0


class ProGrad(TaughtContext):
    """The gradient is that of cross-entropy, projected where it goes against the teacher's.

    The teacher's is the gradient of the cross-entropy with zero-shot probabilities. Unlike there
    (BeierZhu/Prompt-align, trainers/prograd.py), the words of `init` are counted in tokens, so that
    none is left outside the context; on several processes each one projects its own.
    """

    Options = Options

    def __init__(
        self,
        backbone: Adapter,
        class_names: Sequence[str],
        options: Options,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        placeholders = options.model_copy(update={"init": None})
        super().__init__(backbone, class_names, placeholders, tokenizer)
        self.options = options
        if options.init:
            self._fill(backbone.text.words(options.init.replace("_", " "), tokenizer))

    @torch.no_grad()
    def _fill(self, ids: Tensor) -> None:
        """Set the context to zeros and then the embeddings of the words `ids`."""
        count = self.options.num_tokens
        if len(ids) > count:
            raise InputError(
                f"method.init={self.options.init!r} has {len(ids)} tokens, but num_tokens={count}: "
                "give fewer words, or more tokens"
            )
        self.context.zero_()
        self.context[count - len(ids) :] = self.backbone.text.embed(ids)

    def step(self, batch: Batch, loss: Loss) -> Step:
        """Training loss by `loss`, whose gradient is the projected one, and the term `teacher`."""
        features = self.batch_features(batch)
        logits, hints = self.logits(features), self.similarities(features, self.teacher)
        softness = self.options.temperature
        own = loss(logits, batch.labels)
        hoped = self.target.probabilities(hints / softness)
        general = softness**2 * self.target.loss(logits / softness, hoped)
        terms = {loss.name: own.detach(), "teacher": general.detach()}
        if not own.requires_grad:
            return Step(own, logits, terms)
        (gradient,) = torch.autograd.grad(own, self.context, retain_graph=True)
        (other,) = torch.autograd.grad(general, self.context)
        gradient = agreeing(gradient, other, self.options.weight)
        # the loss in value, and with this gradient
        total = own.detach() + ((self.context - self.context.detach()) * gradient).sum()
        return Step(total, logits, terms)


def agreeing(gradient: Tensor, general: Tensor, weight: float) -> Tensor:
    """`gradient` less `weight` times its part against `general`, a tensor of the same shape."""
    along = (gradient * general).sum() / general.square().sum().clamp(min=1e-30)
    return gradient - weight * along.clamp(max=0) * general
