"""open_clip's causal text towers read out at EOT: CLIP's, native and in CustomTextCLIP."""

import torch
from torch import Tensor, nn

from vpt.backbones._inserted import InsertedTexts
from vpt.backbones._packed import PackedSuffixes
from vpt.backbones._resblock import is_plain
from vpt.backbones.text import TextPrompts
from vpt.backbones.texts._blocks import Blocks


class Tower(Blocks):
    """Texts are BOS, words, EOT (the highest id), padding; what follows EOT can't be seen."""

    family = "causal text towers read at EOT, as CLIP's"
    is_causal = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.knows_rows = all(map(is_plain, self.parts.transformer.resblocks))

    @staticmethod
    def fits(model: nn.Module) -> bool:
        """Any with a causal mask that pools by the highest id and appends no token of its own."""
        text = getattr(model, "text", model)
        pool = getattr(text, "text_pool_type" if text is model else "pool_type", None)
        causal = pool == "argmax" and text.attn_mask is not None
        return causal and getattr(text, "cls_emb", None) is None

    def mask(self, ids: Tensor) -> Tensor:
        """The causal one (T, T)."""
        return self.parts.attn_mask[: ids.shape[1], : ids.shape[1]]

    def read(self, tokens: Tensor, ids: Tensor) -> Tensor:
        """EOT tokens (C, width)."""
        ends = ids.argmax(1).to(tokens.device)
        return tokens[torch.arange(len(tokens), device=tokens.device), ends]

    def pack(self, ids: Tensor, words: int) -> PackedSuffixes:
        """Pack what follows the first `words` in texts (C, T), up to EOT."""
        return PackedSuffixes(ids, ids.argmax(1) + 1, self.start + words)

    def run_shared(
        self, prefixes: Tensor, suffixes: PackedSuffixes, prompts: TextPrompts | None = None
    ) -> Tensor:
        """Text features (B, C, dim), not normalised, of all C texts after each prefix."""
        return suffixes(self, prefixes, [] if prompts is None else prompts)

    def insert(self, ids: Tensor, first: int, count: int) -> InsertedTexts:
        """Texts (C, T) that `count` learned tokens enter at block `first`."""
        return InsertedTexts(self, ids, first, count)
