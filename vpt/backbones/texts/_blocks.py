"""The part of a text family that runs token embeddings through open_clip's own text transformer."""

from collections.abc import Sequence

from torch import Tensor, nn

from vpt.backbones.text import TextPrompts, Tokenizer
from vpt.backbones.texts._marked import Marked


class Blocks(Marked):
    """A family says what enters the first block, the mask, and which token is read."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.width = self.parts.token_embedding.embedding_dim
        self.num_layers = len(self.parts.transformer.resblocks)

    def encode(self, texts: Sequence[str], tokenizer: Tokenizer | None = None) -> Tensor:
        """Text features (len(texts), dim), not normalised."""
        ids = self.tokenize(texts, tokenizer)
        return self.run(self.embed(ids), ids)

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings (…, width) of ids (…), before the position embedding."""
        embedding = self.parts.token_embedding
        return embedding(ids.to(embedding.weight.device))

    def enter(self, embeddings: Tensor) -> Tensor:
        """Input of the first block, from embeddings (C, T, width)."""
        return embeddings + self.parts.positional_embedding[: embeddings.shape[1]]

    def mask(self, ids: Tensor) -> Tensor | None:
        """Additive mask of attention in texts of ids (C, T); None: all tokens see each other."""
        return None

    def read(self, tokens: Tensor, ids: Tensor) -> Tensor:
        """The token (C, width) that the texts are read at, of (C, T, width): the last."""
        return tokens[:, -1]

    def finish(self, tokens: Tensor) -> Tensor:
        """Tokens (…, width) that are read, after the last block, to text features (…, dim)."""
        x, projection = self.parts.ln_final(tokens), self.parts.text_projection
        return projection(x) if isinstance(projection, nn.Linear) else x @ projection

    def run(
        self,
        embeddings: Tensor,
        ids: Tensor,
        prompts: TextPrompts | None = None,
        places: Tensor | None = None,
    ) -> Tensor:
        """Text features (C, dim), not normalised."""
        deep = 0 if prompts is None else len(prompts)
        x, mask = self.enter(embeddings), self.mask(ids)
        for index, block in enumerate(self.parts.transformer.resblocks):
            if 0 < index <= deep:
                x = overwrite(x, prompts[index - 1], places)
            x = self.remember(_run_block, block, x, mask)
        return self.finish(self.read(x, ids))


def overwrite(tokens: Tensor, prompt: Tensor, places: Tensor) -> Tensor:
    """Tokens (C, T, width) with `prompt` (M, width) or (C, M, width) at `places` (C, M)."""
    prompt = prompt.to(tokens.dtype).expand(len(tokens), -1, -1)
    return tokens.scatter(1, places[..., None].expand_as(prompt), prompt)


def _run_block(block: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    return block(x, attn_mask=mask)
