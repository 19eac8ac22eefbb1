"""timm's BEiT and BEiT-v2: a bias for each relative position is added to the attention scores."""

from functools import partial

import torch
from timm.models.beit import Attention, Beit, Block
from torch import Tensor, nn

from vpt.backbones import vit
from vpt.backbones._attention import attend, project, query_key_value
from vpt.backbones._known import is_exactly
from vpt.backbones.base import LayerPrompts, Rows


class Adapter(vit.Adapter):
    """Prompts have no position: the bias between them and any token is zero."""

    family = "timm Beit"
    appends_prompts = True
    runs_blocks = False

    @staticmethod
    def fits(model: nn.Module) -> bool:
        """Exactly timm's Beit."""
        return type(model) is Beit

    @staticmethod
    def is_known(block: nn.Module) -> bool:
        """The family's own block and attention."""
        known = is_exactly(block, Block) and is_exactly(block.attn, Attention)
        return known and is_exactly(block.attn.qkv, nn.Linear)

    def embed(self, images: Tensor) -> Tensor:
        """Patch embedding, class token, position embedding where the model has one."""
        model, tokens = self.model, self.model.patch_embed(images)
        tokens = torch.cat([model.cls_token.expand(len(tokens), -1, -1), tokens], 1)
        return tokens if model.pos_embed is None else tokens + model.pos_embed

    def block(
        self,
        index: int,
        tokens: Tensor,
        prompts: LayerPrompts | None = None,
        queries: int | None = None,
    ) -> Tensor:
        """The block's forward spelled out: timm's takes no tokens without a position."""
        block = self.model.blocks[index]
        attn, scale1, scale2 = block.attn, block.gamma_1, block.gamma_2
        parts = query_key_value(partial(self.qkv, block), block.norm1(tokens), queries)
        x = attn.proj_drop(attn.proj(attend(*parts, prompts, self._bias(attn))))
        tokens = tokens[:, :queries] + block.drop_path1(x if scale1 is None else scale1 * x)
        x = block.mlp(block.norm2(tokens))
        return tokens + block.drop_path2(x if scale2 is None else scale2 * x)

    def qkv(self, block: nn.Module, x: Tensor, parts: slice) -> tuple[Tensor, ...]:
        """The `parts` of (query, key, value) of normed tokens x (B, N, width)."""
        attn = block.attn
        bias = None if attn.q_bias is None else torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        return project(x, attn.qkv.weight, bias, attn.num_heads, parts)

    def rows(self, index: int, prompts: Tensor) -> Rows:
        """The prompts through the block's norm and its key and value projections."""
        block = self.model.blocks[index]
        prompts = block.norm1(prompts.view(-1, *prompts.shape[-2:]))
        return Rows(*self.qkv(block, prompts, slice(1, 3)))

    def _bias(self, attn: nn.Module) -> Tensor | None:
        """Position bias (1, heads, N, N): the block's own and the one that all blocks share."""
        own = None if attn.relative_position_bias_table is None else attn._get_rel_pos_bias()
        shared = None if self.model.rel_pos_bias is None else self.model.rel_pos_bias()[None]
        if own is None or shared is None:
            return shared if own is None else own
        return own + shared
