"""CoOp: learnable context vectors before the class name (Zhou et al. 2022, trainers/coop.py)."""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from vpt.backbones.clip import Adapter, Tokenizer
from vpt.config import Strict
from vpt.methods._context import ContextMethod


class Options(Strict):
    """Options of CoOp."""

    num_tokens: PositiveInt = 16  # ignored where `init` gives the words
    init: str | None = None  # words to start from, such as "a photo of a"; None: N(0, 0.02²)
    class_specific: bool = False  # a context for each class
    position: Literal["end", "middle", "front"] = "end"  # of the class name


class Prompted(ContextMethod):
    """One context for all images, of all classes or of each class its own.

    Attributes:
        context: (num_tokens, text_width), or (C, num_tokens, text_width) if class-specific.
        tokens: (C, T) ids of the text with placeholders; the class name always stands at the end
            in it, also for other positions.
    """

    Options = Options

    def __init__(
        self,
        backbone: Adapter,
        class_names: Sequence[str],
        options: Options,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        super().__init__(backbone, class_names, options, tokenizer)
        if options.class_specific:
            context = self.context.detach().repeat(len(class_names), 1, 1)
            if not options.init:
                context = 0.02 * torch.randn_like(context)
            self.context = nn.Parameter(context)
        lengths = [len(backbone.tokenize([name], tokenizer)[0]) - 2 for name in self.names]
        self.register_buffer("order", self._order(lengths), persistent=False)
        self.register_buffer("folded", None, persistent=False)  # (C, dim), in the inference form

    def _order(self, lengths: Sequence[int]) -> Tensor:
        """(C, T): where in the text that ends with the name each embedding is taken from."""
        count, total = self.context.shape[-2], self.tokens.shape[1]
        before = {"end": count, "middle": count // 2, "front": 0}[self.options.position]
        rows = []
        for length in lengths:
            context = list(range(1, 1 + count))
            name = list(range(1 + count, 1 + count + length))
            rest = list(range(1 + count + length, total))
            rows.append([0, *context[:before], *name, *context[before:], *rest])
        return torch.tensor(rows)

    def prompt_embeddings(self) -> Tensor:
        """Text embeddings (C, T, text_width) with the context in place, before the positions."""
        embeddings = self.backbone.embed_tokens(self.tokens)
        context = self.context.to(embeddings.dtype)
        if context.dim() == 2:
            context = context.expand(len(embeddings), -1, -1)
        count = context.shape[1]
        x = torch.cat([embeddings[:, :1], context, embeddings[:, 1 + count :]], dim=1)
        return x.gather(1, self.order[..., None].expand_as(x))

    def text_features(self) -> Tensor:
        """Class embeddings (C, dim), differentiable, not normalised."""
        if self.folded is not None:
            return self.folded
        if self.shares_prefix():
            return self.suffixes(self.backbone, self.prefix(self.context)[None])[0]
        return self.backbone.encode_embeddings(self.prompt_embeddings(), self.tokens.argmax(1))

    def shares_prefix(self) -> bool:
        """Whether SOS and context run once: they come first and are the same for all classes."""
        generic = self.context.dim() == 2 and self.options.position == "end"
        return generic and super().shares_prefix()

    def logits(self, features: Tensor) -> Tensor:
        """Scaled cosine similarities (B, C)."""
        return self.similarities(features, self.text_features())

    def make_constants(self) -> None:
        """Keep the class embeddings: no text tower at test time."""
        super().make_constants()
        self.folded = self.text_features()
