"""Texts that begin alike: the common prefix runs once, each text only its own tokens after it."""

from typing import TYPE_CHECKING

import torch
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn
from torch.nn import functional as F

from vpt.backbones._resblock import mix, project

if TYPE_CHECKING:
    from vpt.backbones.text import TextPrompts
    from vpt.backbones.texts.causal_eot import Tower


class PackedSuffixes(nn.Module):
    """The tokens that follow a common prefix in each of C texts, packed without padding.

    In a causal tower the prefix cannot see what follows, so its keys and values are the same for
    all texts; and nothing that stands after EOT matters. So the prefix and the texts' own tokens
    pass norms, projections and MLPs as one sequence, and attention runs over texts of equal
    length together. A context that the next block overwrites gives keys and values only. Exact.
    """

    def __init__(self, ids: Tensor, lengths: Tensor, prefix_length: int) -> None:
        """Ids (C, T) of the whole texts, of which the first `lengths` (C,) matter."""
        super().__init__()
        lengths = lengths - prefix_length
        order = lengths.argsort(stable=True)  # texts of equal length stand together
        suffixes = [ids[c, prefix_length : prefix_length + lengths[c]] for c in order]
        starts = [prefix_length + torch.arange(len(suffix)) for suffix in suffixes]
        counts = torch.unique(lengths, return_counts=True)
        self.prefix_length = prefix_length
        self.groups = list(zip(*(part.tolist() for part in counts), strict=True))
        positions = torch.cat([torch.arange(prefix_length), *starts])
        ends = prefix_length + lengths[order].cumsum(0) - 1
        self.register_buffer("ids", torch.cat(suffixes), persistent=False)
        self.register_buffer("positions", positions, persistent=False)
        texts = order.repeat_interleave(lengths[order])  # whose each packed token is
        self.register_buffer("texts", texts, persistent=False)
        self.register_buffer("ends", ends, persistent=False)
        longest = int(lengths.max())
        # of each token of a text, the prefix's first: itself and what stands before it
        visible = torch.ones([prefix_length + longest] * 2, dtype=torch.bool).tril()
        self.register_buffer("visible", visible, persistent=False)
        self.register_buffer("inverse", order.argsort(), persistent=False)

    def forward(self, tower: "Tower", prefixes: Tensor, prompts: "TextPrompts") -> Tensor:
        """Text features (B, C, dim), not normalised, of all texts after each prefix.

        Args:
            tower: one that `knows_rows`.
            prefixes: embeddings (B, P, width): one for all images, or one for each.
            prompts: sets (M, width) that overwrite the context at the input of block 1, 2, …
        """
        parts, start = tower.parts, tower.start
        suffixes = tower.embed(self.ids).expand(len(prefixes), -1, -1)
        x = torch.cat([prefixes, suffixes], 1) + parts.positional_embedding[self.positions]
        *blocks, last = parts.transformer.resblocks
        for index, block in enumerate(blocks):
            # the context is spent in this block if the next one brings another
            count = prompts[index].shape[-2] if index < len(prompts) else 0
            spent = range(start, start + count)
            x = tower.remember(self._block, block, x, spent)
            if spent:
                prompt = prompts[index].to(x.dtype).expand(len(x), -1, -1)
                x = torch.cat([x[:, :start], prompt, x[:, start:]], 1)
        return self._finish(tower, last, x)

    def resume(
        self, tower: "Tower", states: Tensor, first: int, prompts: Tensor, proportion: float
    ) -> Tensor:
        """Text features (C, dim) of texts that have run through the blocks before `first`.

        Args:
            tower: one that `knows_rows`.
            states: (C, T, width), without the prefix's prompts.
            first: block that the prompts enter at.
            prompts: (blocks from `first` on, M, width): the prefix is BOS and these.
            proportion: of the prompts' outputs in what enters the next block.
        """
        start, count = tower.start, prompts.shape[1]
        places = self.positions[self.prefix_length :] - count
        x = torch.cat([states[0, :start], prompts[0], states[self.texts, places]])[None]
        *blocks, last = tower.parts.transformer.resblocks[first:]
        for prompt, block in zip(prompts[1:], blocks, strict=True):
            spent = range(start, start + (0 if proportion else count))
            x = tower.remember(self._block, block, x, spent)
            old = x[:, start : start + count] if proportion else 0
            new = (proportion * old + (1 - proportion) * prompt).to(x.dtype)
            new = new.expand(len(x), -1, -1)
            x = torch.cat([x[:, :start], new, x[:, start + count - len(spent) :]], 1)
        return self._finish(tower, last, x)[0]

    def _finish(self, tower: "Tower", last: ResidualAttentionBlock, x: Tensor) -> Tensor:
        """Text features (B, C, dim): the last block needs the queries of the texts' ends alone."""
        ends = x[:, self.ends]
        queries = project(last, ends, slice(0, 1))
        x = mix(last, ends, self._attend(*queries, *project(last, x, slice(1, 3))))
        return tower.finish(x)[:, self.inverse]

    def _block(self, block: ResidualAttentionBlock, x: Tensor, spent: range) -> Tensor:
        """The block on all packed tokens (B, N, width), but without the outputs of `spent`."""
        if not spent:
            return mix(block, x, self._attend(*project(block, x, slice(0, 3))))
        rest = torch.cat([x[:, : spent.start], x[:, spent.stop :]], 1)
        queries = project(block, rest, slice(0, 1))
        return mix(block, rest, self._attend(*queries, *project(block, x, slice(1, 3)), spent))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, spent: range = range(0)) -> Tensor:
        """Attended values (B, queries, width), each token in its own text.

        Keys and values (B, heads, N, head_dim) are of all packed tokens; the queries of all but
        `spent`, or of the texts' ends alone (B, heads, C, head_dim).
        """
        prefix = self.prefix_length
        sizes = [prefix, *(length * count for length, count in self.groups)]
        (shared_key, *keys), (shared_value, *values) = key.split(sizes, 2), value.split(sizes, 2)
        attended = []
        if query.shape[2] == key.shape[2] - len(spent):
            first, *queries = query.split([prefix - len(spent), *sizes[1:]], 2)
            visible = None
            if spent:
                rows = self.visible[:prefix, :prefix]
                visible = torch.cat([rows[: spent.start], rows[spent.stop :]])
            x = F.scaled_dot_product_attention(
                first, shared_key, shared_value, visible, is_causal=visible is None
            )
            attended.append(x)
        else:
            queries = query.split([count for _, count in self.groups], 2)
        groups = zip(self.groups, queries, keys, values, strict=True)
        for (length, count), query, key, value in groups:
            # the texts of a group stand where attention has its heads, so nothing is transposed
            key, value = _after(shared_key, key, count), _after(shared_value, value, count)
            query = query.unflatten(2, (count, -1)).flatten(0, 1)
            # the end sees everything
            seen = prefix + length
            visible = self.visible[prefix:seen, :seen] if query.shape[2] == length else None
            x = F.scaled_dot_product_attention(query, key, value, attn_mask=visible)
            attended.append(x.unflatten(0, shared_key.shape[:2]).flatten(2, 3))
        return torch.cat(attended, 2).transpose(1, 2).flatten(2)


def _after(shared: Tensor, own: Tensor, count: int) -> Tensor:
    """(B, heads, P, D) before each of (B, heads, count·L, D): (B·heads, count, P+L, D)."""
    own = own.unflatten(2, (count, -1))
    shared = shared[:, :, None].expand(-1, -1, count, -1, -1)
    return torch.cat([shared, own], 3).flatten(0, 1)
