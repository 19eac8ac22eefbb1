"""Prompts on their way through the blocks of one forward pass."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vpt.backbones._prompts import LayerPrompts, Mixed, Prompts, Rows

if TYPE_CHECKING:
    from vpt.backbones.base import Backbone


class Flow:
    """Place of the prompts among the tokens, block by block.

    Attributes:
        count: how many tokens are prompts now: the last ones, or those after the prefix tokens.
    """

    def __init__(self, backbone: "Backbone", prompts: Prompts, prepend: bool) -> None:
        self.backbone, self.prompts, self.prepend = backbone, prompts, prepend
        self.count = 0
        self._mask: Tensor | None = None  # (B, count), of a mixed batch
        self._entered: Tensor | None = None  # the prompts before the block, where outputs are mixed

    def enter(self, index: int, tokens: Tensor) -> tuple[Tensor, LayerPrompts | None]:
        """Tokens that enter block `index`, and how it meets the prompts."""
        backbone, prompts = self.backbone, self.prompts
        own = prompts.at(index)
        if own is not None and not isinstance(own, Mixed) and prompts.mix is None:
            tokens, self.count = self.strip(tokens), 0
        tokens, rows = backbone.enter(index, tokens, self.count), None
        width = backbone.widths[index]
        if isinstance(own, Mixed):
            rows, self._mask = own.rows, own.mask
            if own.tokens is not None:
                tokens = self._put(tokens, self._mixed(index, own, tokens, width))
        elif isinstance(own, Rows):
            tokens, self.count, rows = self.strip(tokens), 0, own
        elif own is not None:
            own = own[..., :width]
            if backbone.as_rows(index, prompts):
                rows = backbone.rows(index, own)
            else:
                own = own.to(tokens.dtype).expand(len(tokens), -1, -1)
                if self.count:
                    own = self._blend(index, self.among(tokens), own)
                tokens = self._put(tokens, own)
        if prompts.mix is not None:
            self._entered = self.among(tokens)
        return tokens, self._seen(index, tokens, rows)

    def leave(self, index: int, tokens: Tensor) -> Tensor:
        """Tokens after block `index`, its outputs of prompts mixed with what entered it."""
        last = index == self.backbone.num_layers - 1
        following = self.prompts.at(index + 1)
        mixed_there = following is not None and not isinstance(following, Mixed)
        if self.prompts.mix is None or not self.count or last or mixed_there:
            return tokens
        outputs = self.among(tokens)
        mixed = self._blend(index + 1, outputs, self._entered)
        if following is not None:
            mixed = torch.where(following.own[:, None, None], outputs, mixed)
        return self._put(tokens, mixed)

    def among(self, tokens: Tensor) -> Tensor:
        """The prompts (B, count, width) among tokens."""
        start = self.backbone.num_prefix_tokens if self.prepend else tokens.shape[1] - self.count
        return tokens[:, start : start + self.count]

    def strip(self, tokens: Tensor) -> Tensor:
        """Tokens without the prompts."""
        if not self.count:
            return tokens
        if not self.prepend:
            return tokens[:, : -self.count]
        start = self.backbone.num_prefix_tokens
        return torch.cat([tokens[:, :start], tokens[:, start + self.count :]], 1)

    def _put(self, tokens: Tensor, prompts: Tensor) -> Tensor:
        """Tokens with other prompts (B, P, width)."""
        tokens = self.strip(tokens)
        self.count = prompts.shape[1]
        start = self.backbone.num_prefix_tokens if self.prepend else tokens.shape[1]
        return torch.cat([tokens[:, :start], prompts, tokens[:, start:]], 1)

    def _mixed(self, index: int, own: Mixed, tokens: Tensor, width: int) -> Tensor:
        """Prompts (B, S, width) of samples with a set of their own here, and of the others."""
        sets = own.tokens[..., :width].to(tokens.dtype)
        if not self.count:
            return sets
        flowing = self.among(tokens)
        if self.prompts.mix is not None:
            sets = self._blend(index, flowing, sets)
        return torch.where(own.own[:, None, None], sets, flowing)

    def _blend(self, index: int, outputs: Tensor, others: Tensor) -> Tensor:
        """Prompts (B, P, width) that enter block `index`, from outputs of the block before."""
        kept = self.prompts.mix[..., index - self.prompts.layers[0] - 1, None, None]
        return kept * outputs + (1 - kept) * others

    def _seen(self, index: int, tokens: Tensor, rows: Rows | None) -> LayerPrompts | None:
        prompts, mask, gate = self.prompts, None, None
        masks = [self._mask if self.count else None, rows.mask if rows is not None else None]
        if any(part is not None for part in masks):
            counts = self.count, 0 if rows is None else rows.key.shape[2]
            mask = torch.cat(
                [
                    torch.ones(len(tokens), count, dtype=torch.bool, device=tokens.device)
                    if part is None
                    else part
                    for part, count in zip(masks, counts, strict=True)
                ],
                1,
            )
        if prompts.gates is not None and index >= prompts.layers[0]:
            gate = prompts.gates[..., index - prompts.layers[0]]
        if rows is None and not (self.count and (mask is not None or gate is not None)):
            return None
        return LayerPrompts(rows, self.count, mask, gate, prompts.gated)
