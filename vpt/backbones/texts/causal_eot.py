"""open_clip's causal text towers read out at EOT: CLIP's, native and in CustomTextCLIP."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vpt.backbones._inserted import InsertedTexts
from vpt.backbones._packed import PackedSuffixes
from vpt.backbones._resblock import is_plain
from vpt.backbones.text import TextPrompts, TextTower, Tokenizer
from vpt.errors import InputError


class Tower(TextTower):
    """Texts are BOS, words, EOT (the highest id), padding; what follows EOT can't be seen."""

    family = "causal text towers read at EOT, as CLIP's"
    is_causal = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.width = self.parts.token_embedding.embedding_dim
        self.num_layers = len(self.parts.transformer.resblocks)
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

        Raises:
            InputError: a text that is longer than the tower's context; no tokenizer is known.
        """
        ids = super().tokenize(texts, tokenizer)
        # a tokenizer that truncates leaves no room for its padding, so the last column tells
        too_long = ids.ne(0).all(1).nonzero()
        if len(too_long):
            text = texts[int(too_long[0])]
            raise InputError(
                f"{text!r} does not fit the text tower's {ids.shape[1]} tokens: shorten it"
            )
        return ids[:, : int(ids.argmax(1).max()) + 1]

    def encode(self, texts: Sequence[str], tokenizer: Tokenizer | None = None) -> Tensor:
        """Text features (len(texts), dim), not normalised."""
        ids = self.tokenize(texts, tokenizer)
        return self.run(self.embed(ids), ids)

    def words(self, text: str, tokenizer: Tokenizer | None = None) -> Tensor:
        """Token ids (N,) of the text's own words."""
        return self.tokenize([text], tokenizer)[0, 1:-1]

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings (…, width) of ids (…), before the position embedding."""
        embedding = self.parts.token_embedding
        return embedding(ids.to(embedding.weight.device))

    def run(
        self,
        embeddings: Tensor,
        ids: Tensor,
        prompts: TextPrompts | None = None,
        places: Tensor | None = None,
    ) -> Tensor:
        """Text features (C, dim), not normalised."""
        length, deep = embeddings.shape[1], 0 if prompts is None else len(prompts)
        mask = self.parts.attn_mask[:length, :length]
        x = embeddings + self.parts.positional_embedding[:length]
        for index, block in enumerate(self.parts.transformer.resblocks):
            if 0 < index <= deep:
                prompt = prompts[index - 1].to(x.dtype).expand(len(x), -1, -1)
                x = x.scatter(1, places[..., None].expand_as(prompt), prompt)
            x = self.remember(_run_block, block, x, mask)
        ends = ids.argmax(1).to(x.device)
        return self.finish(x[torch.arange(len(x), device=x.device), ends])

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

    def finish(self, tokens: Tensor) -> Tensor:
        """EOT tokens (…, width) after the last block to text features (…, dim)."""
        x, projection = self.parts.ln_final(tokens), self.parts.text_projection
        return projection(x) if isinstance(projection, nn.Linear) else x @ projection


def _run_block(block: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    return block(x, attn_mask=mask)
