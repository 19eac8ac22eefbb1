"""Texts that begin alike: the common prefix runs once, each text only its own tokens after it."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vpt.backbones._resblock import attend, mix, project

if TYPE_CHECKING:
    from vpt.backbones.clip import Adapter


class PackedSuffixes(nn.Module):
    """What follows a common prefix in each of C texts, up to EOT, packed without padding.

    In a causal tower the prefix cannot see what follows, so its keys and values are the same for
    all texts; and nothing that stands after EOT matters. Exact.
    """

    def __init__(self, tokens: Tensor, prefix_length: int) -> None:
        """Tokens (C, T) of the whole texts; EOT is the highest id in each row."""
        super().__init__()
        lengths = tokens.argmax(1) + 1 - prefix_length
        order = lengths.argsort(stable=True)  # texts of equal length stand together
        suffixes = [tokens[c, prefix_length : prefix_length + lengths[c]] for c in order]
        positions = [prefix_length + torch.arange(len(suffix)) for suffix in suffixes]
        counts = torch.unique(lengths, return_counts=True)
        self.groups = list(zip(*(part.tolist() for part in counts), strict=True))
        self.register_buffer("ids", torch.cat(suffixes), persistent=False)
        self.register_buffer("positions", torch.cat(positions), persistent=False)
        self.register_buffer("ends", lengths[order].cumsum(0) - 1, persistent=False)
        self.register_buffer("inverse", order.argsort(), persistent=False)

    def forward(self, backbone: "Adapter", prefix: Tensor) -> Tensor:
        """Text features (C, feature_dim) for prefix embeddings (P, text_width), not normalised."""
        model = backbone.model
        position = model.positional_embedding
        prefix = (prefix + position[: len(prefix)])[None]
        x = backbone.embed_tokens(self.ids) + position[self.positions]
        *blocks, last = model.transformer.resblocks
        for block in blocks:
            x = mix(block, x, self._attention(block, x, prefix))
            prefix = attend(block, prefix, causal=True)
        x = mix(last, x[self.ends], self._attention(last, x, prefix, only_ends=True))
        return backbone.finish_text(x)[self.inverse]

    def _attention(
        self, block: nn.Module, x: Tensor, prefix: Tensor, only_ends: bool = False
    ) -> Tensor:
        """Attended values (queries, width) of packed tokens x (N, width) in their texts."""
        rows = torch.stack(project(block, prefix, slice(1, 3)))
        if only_ends:
            (query,) = project(block, x[None, self.ends], slice(0, 1))
            key, value = project(block, x[None], slice(1, 3))
        else:
            query, key, value = project(block, x[None], slice(0, 3))
        attended = []
        start = asked = 0
        for length, count in self.groups:
            end = start + count * length
            queries = 1 if only_ends else length
            own = torch.stack([key, value])[:, 0, :, start:end].unflatten(2, (count, length))
            shared = rows[:, 0, :, None].expand(-1, -1, count, -1, -1)
            keys, values = torch.cat([shared, own], dim=3).transpose(1, 2)
            asking = query[0, :, asked : asked + count * queries]
            asking = asking.unflatten(1, (count, queries)).transpose(0, 1)
            visible = torch.ones(queries, keys.shape[2], dtype=torch.bool, device=x.device)
            # the last query sees everything, each one before it one token less
            visible = visible.tril(keys.shape[2] - queries)
            out = F.scaled_dot_product_attention(asking, keys, values, attn_mask=visible)
            attended.append(out.transpose(1, 2).flatten(0, 1).flatten(1))
            start, asked = end, asked + count * queries
        return torch.cat(attended)
