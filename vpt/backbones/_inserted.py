"""Fixed texts of a causal tower that learned tokens enter at a later block (MMRL)."""

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vpt.backbones._packed import PackedSuffixes

if TYPE_CHECKING:
    from vpt.backbones.texts.causal_eot import Tower


class InsertedTexts(nn.Module):
    """C texts of which `count` tokens stand after BOS from block `first` on, without a position.

    What the blocks before make of the texts is computed once. The tokens see only BOS and each
    other, so where the blocks are known they run once for all texts; see `PackedSuffixes`.
    """

    def __init__(self, tower: "Tower", ids: Tensor, first: int, count: int) -> None:
        """Ids (C, T) of the texts, without the tokens."""
        super().__init__()
        self.first, self.count, length = first, count, ids.shape[1]
        with torch.no_grad():
            x = tower.embed(ids) + tower.parts.positional_embedding[:length]
            mask = tower.parts.attn_mask[:length, :length]
            for block in tower.parts.transformer.resblocks[:first]:
                x = block(x, attn_mask=mask)
        ends = ids.argmax(1)
        self.register_buffer("states", x, persistent=False)
        self.register_buffer("ends", ends + count, persistent=False)
        self.packed = None
        if tower.knows_rows:
            room = ids.new_zeros(len(ids), count)
            longer = torch.cat([ids[:, : tower.start], room, ids[:, tower.start :]], 1)
            self.packed = PackedSuffixes(longer, ends + 1 + count, tower.start + count)

    def forward(self, tower: "Tower", prompts: Tensor, mix: float, exact: bool = False) -> Tensor:
        """Text features (C, dim), not normalised.

        Args:
            tower: the one that it was made with.
            prompts: (blocks from `first` on, count, width).
            mix: proportion of the tokens' outputs of the block before in what enters the next.
            exact: all texts apart, with padding.
        """
        if self.packed and not exact:
            return self.packed.resume(tower, self.states, self.first, prompts, mix)
        blocks, start = tower.parts.transformer.resblocks[self.first :], tower.start
        x, total = self.states, self.states.shape[1] + self.count
        mask = torch.full((total, total), -torch.inf, dtype=x.dtype, device=x.device).triu(1)
        x = torch.cat([x[:, :start], prompts[0].expand(len(x), -1, -1), x[:, start:]], 1)
        for index, block in enumerate(blocks):
            if index:
                x = blend(x, start, prompts[index], mix)
            x = tower.remember(partial(block, attn_mask=mask), x)
        return tower.finish(x[torch.arange(len(x), device=x.device), self.ends])


def blend(x: Tensor, start: int, prompt: Tensor, mix: float) -> Tensor:
    """Tokens x (B, N, width) whose prompts, from `start` on, are mixed with new ones (M, width)."""
    stop = start + len(prompt)
    mixed = mix * x[:, start:stop] + (1 - mix) * prompt
    return torch.cat([x[:, :start], mixed, x[:, stop:]], 1)
