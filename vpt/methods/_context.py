"""Learnable context vectors in CLIP's text tower: what CoOp's family shares."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vpt.backbones._packed import PackedSuffixes
from vpt.backbones.clip import Adapter, Tokenizer
from vpt.config import Strict
from vpt.methods.base import Method, require_clip


class ContextMethod(Method):
    """Text is `context + name + "."`; the image tower and the text tower stay frozen.

    Attributes:
        context: (num_tokens, text_width), from the option `init` or N(0, 0.02²).
        tokens: (C, T) ids of the text with placeholders for the context.
        names: as the text tower reads them.
        suffixes: the texts' tokens after the context.
    """

    frozen_features = True
    reads_text = True

    def __init__(
        self,
        backbone: Adapter,
        class_names: Sequence[str],
        options: Strict,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        super().__init__(require_clip(backbone, self.name), class_names, options, tokenizer)
        self.names = [name.replace("_", " ") for name in class_names]
        if options.init:
            words = options.init.replace("_", " ")
            ids = backbone.tokenize([words], tokenizer)
            with torch.no_grad():
                context = backbone.embed_tokens(ids)[0, 1:-1].clone()
        else:
            words = " ".join(["X"] * options.num_tokens)
            context = 0.02 * torch.randn(options.num_tokens, backbone.text_width)
        self.context = nn.Parameter(context)
        tokens = backbone.tokenize([f"{words} {name}." for name in self.names], tokenizer)
        self.register_buffer("tokens", tokens, persistent=False)
        self.suffixes = PackedSuffixes(tokens, 1 + len(context))

    def shares_prefix(self) -> bool:
        """Whether SOS and context run once for all classes: exact where they come first."""
        return self.backbone.knows_text_rows and not self.backbone.exact_tokens

    def prefix(self, context: Tensor) -> Tensor:
        """Embeddings (…, 1 + num_tokens, text_width) of SOS and a context (…, num_tokens, ·)."""
        start = self.backbone.embed_tokens(self.tokens[:1, :1])[0].to(context.dtype)
        return torch.cat([start.expand(*context.shape[:-2], -1, -1), context], -2)
