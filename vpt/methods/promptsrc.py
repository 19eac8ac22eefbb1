"""PromptSRC: IVLP held near the frozen CLIP, averaged over epochs (Khattak et al. 2023b)."""

from collections.abc import Sequence

import torch
from pydantic import Field, PositiveInt
from torch import Tensor
from torch.nn import functional as F

from vpt.backbones.clip import Adapter
from vpt.backbones.text import Tokenizer
from vpt.losses import Loss
from vpt.methods._clip_templates import CLIP_TEMPLATES
from vpt.methods._templates import TemplateOptions
from vpt.methods.base import Batch, Epoch, Step
from vpt.methods.ivlp import IVLP


class Options(TemplateOptions):
    """Options of PromptSRC."""

    num_tokens: PositiveInt = 4  # of the text
    text_depth: PositiveInt = 9  # blocks with prompts
    num_image_tokens: PositiveInt = 4
    image_depth: PositiveInt = 9
    init: str | None = "a photo of a"  # words after `num_tokens` stay; None: N(0, 0.02²)
    templates: list[str] | None = Field(
        None, min_length=1
    )  # of the teacher's texts; None: the 60 published ones
    text_weight: float = Field(25.0, ge=0)
    image_weight: float = Field(10.0, ge=0)
    # the result is a mean over epochs, weighted by a Gaussian around this one (the first is 1);
    # None: the last step's prompts
    average_epoch: float | None = 15.0
    average_std: float = Field(1.0, gt=0)  # in epochs


class PromptSRC(IVLP):
    """IVLP whose features and logits stay near those of the frozen towers, the teacher.

    The teacher's text features are means over templates before normalisation (trainers/promptsrc.py
    there). Prompts alone are averaged; the original's average covers frozen weights too, in half
    precision.

    Attributes:
        teacher_texts: (C, dim), once a step has needed them.
    """

    Options = Options
    teacher_texts: Tensor | None

    def __init__(
        self,
        backbone: Adapter,
        class_names: Sequence[str],
        options: Options,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        super().__init__(backbone, class_names, options, tokenizer)
        self._names, self._tokenizer = list(class_names), tokenizer
        self.register_buffer("teacher_texts", None, persistent=False)
        if options.average_epoch is not None:
            for name, parameter in self.tunable_parameters().items():
                self.register_buffer(f"average_{name}", torch.zeros_like(parameter))

    def frozen_columns(self, images: Tensor) -> dict[str, Tensor]:
        """`teacher`: image features (B, feature_dim) of the bare tower."""
        return {"teacher": self.backbone(images)}

    def step(self, batch: Batch, loss: Loss) -> Step:
        """The loss, and the mean distances to the teacher's texts, images and logits."""
        features, texts = self.batch_features(batch), self.text_features()
        teacher, teacher_texts = batch.columns["teacher"], self._teach()
        logits = self.similarities(features, texts)
        with torch.no_grad():
            teacher_logits = self.similarities(teacher, teacher_texts)
        terms = {
            loss.name: loss(logits, batch.labels),
            "text": self.options.text_weight * self._distance(texts, teacher_texts),
            "image": self.options.image_weight * self._distance(features, teacher),
            "logits": self.target.divergence(logits, teacher_logits),
        }
        return Step(torch.stack(list(terms.values())).sum(), logits, terms)

    def _distance(self, one: Tensor, other: Tensor) -> Tensor:
        """Mean absolute difference of normalised features (N, dim)."""
        dtype = self.context.dtype
        units = (F.normalize(features.to(dtype), dim=-1) for features in (one, other))
        return F.l1_loss(*units)

    @torch.compiler.disable
    @torch.no_grad()
    def _teach(self) -> Tensor:
        """`teacher_texts`, computed the first time: a loaded model classifies without them."""
        if self.teacher_texts is None:
            names = [name.replace("_", " ") for name in self._names]
            templates = self.options.templates or CLIP_TEMPLATES
            with torch.autocast(self.context.device.type, enabled=False):
                total = sum(
                    self.backbone.encode_texts([t.replace("{}", n) for n in names], self._tokenizer)
                    for t in templates  # one after the other, so that memory is that of C texts
                )
            self.teacher_texts = total / len(templates)
        return self.teacher_texts

    def training_tensors(self) -> dict[str, Tensor]:
        """The artefact's, and the average so far."""
        return super().training_tensors() | self._averages()

    def artifact_tensors(self) -> dict[str, Tensor]:
        """The prompts."""
        averages = self._averages()
        return {n: t for n, t in super().artifact_tensors().items() if n not in averages}

    def _averages(self) -> dict[str, Tensor]:
        return {n: t for n, t in self.named_buffers() if n.startswith("average_")}

    @torch.no_grad()
    def before_epoch(self, at: Epoch) -> None:
        """Begin the average."""
        super().before_epoch(at)
        if at.number == 0:
            for average in self._averages().values():
                average.zero_()

    @torch.no_grad()
    def after_epoch(self, at: Epoch) -> None:
        """Add this epoch's prompts to the average."""
        super().after_epoch(at)
        for name, average in self._averages().items():
            weight = epoch_weights(at.count, self.options.average_epoch, self.options.average_std)
            average.add_(getattr(self, name.removeprefix("average_")), alpha=weight[at.number])

    @torch.no_grad()
    def after_training(self, at: Epoch) -> None:
        """Take the average."""
        super().after_training(at)
        for name, average in self._averages().items():
            getattr(self, name.removeprefix("average_")).copy_(average)


def epoch_weights(count: int, mean: float, std: float) -> list[float]:
    """Weights of epochs 1 to `count`, of sum 1: a normal density, however far off its mean is."""
    epochs = torch.arange(1, count + 1, dtype=torch.float64)
    return (-(((epochs - mean) / std) ** 2) / 2).softmax(0).tolist()
