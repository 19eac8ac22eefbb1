"""open_clip's causal text towers read out at EOT: CLIP's, native and in CustomTextCLIP."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vpt.backbones._inserted import InsertedTexts
from vpt.backbones._packed import PackedSuffixes
from vpt.backbones._resblock import is_plain
from vpt.backbones.text import TextPrompts, TextTower, Tokenizer
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

    def tokenize(self, texts: Sequence[str], tokenizer: Tokenizer | None = None) -> Tensor:
        """Token ids (len(texts), T), cut after the longest text.

        The tower itself says where texts end, so a tokenizer need not show its marks.

        Raises:
            InputError: a text that is longer than the tower's context; no tokenizer is known.
        """
        ids = TextTower.tokenize(self, texts, tokenizer)
        # a tokenizer that truncates leaves no room for its padding
        too_long = ids.ne(0).all(1).nonzero()
        if len(too_long):
            raise self._too_long(texts[int(too_long[0])], ids)
        return ids[:, : int(ids.argmax(1).max()) + 1]

    def words(self, text: str, tokenizer: Tokenizer | None = None) -> Tensor:
        """Token ids (N,) of the text's own words."""
        return self.tokenize([text], tokenizer)[0, self.start : -1]

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
