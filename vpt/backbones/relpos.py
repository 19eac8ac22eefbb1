"""timm's ViT with relative position bias, a table (as Swin v1, BEiT) or an MLP (as Swin v2)."""

from functools import partial

import torch
from timm.models.vision_transformer_relpos import (
    RelPosAttention,
    RelPosBlock,
    VisionTransformerRelPos,
)
from torch import Tensor, nn

from vpt.backbones import vit
from vpt.backbones._attention import attend, query_key_value
from vpt.backbones._known import is_exactly
from vpt.backbones.base import LayerPrompts


class Adapter(vit.Adapter):
    """Prompts have no position: the bias between them and any token is zero."""

    family = "timm VisionTransformerRelPos (pre-norm)"
    appends_prompts = True
    runs_blocks = False

    @staticmethod
    def fits(model: nn.Module) -> bool:
        """timm's VisionTransformerRelPos, if its norms stand before attention and MLP."""
        if type(model) is not VisionTransformerRelPos:
            return False
        return all(type(block) is RelPosBlock for block in model.blocks)

    @staticmethod
    def is_known(block: nn.Module) -> bool:
        """The family's own block and attention."""
        known = is_exactly(block, RelPosBlock) and is_exactly(block.attn, RelPosAttention)
        return known and is_exactly(block.attn.qkv, nn.Linear)

    def embed(self, images: Tensor) -> Tensor:
        """Patch embedding, class token where the model has one."""
        tokens = self.model.patch_embed(images)
        if self.model.cls_token is None:
            return tokens
        return torch.cat([self.model.cls_token.expand(len(tokens), -1, -1), tokens], 1)

    def block(
        self,
        index: int,
        tokens: Tensor,
        prompts: LayerPrompts | None = None,
        queries: int | None = None,
    ) -> Tensor:
        """The block's forward spelled out: timm's takes no tokens without a position."""
        block = self.model.blocks[index]
        attn = block.attn
        query, key, value = query_key_value(partial(self.qkv, block), block.norm1(tokens), queries)
        bias = (attn.rel_pos or self.model.shared_rel_pos).get_bias()
        x = attend(attn.q_norm(query), attn.k_norm(key), value, prompts, bias)
        x = attn.proj_drop(attn.proj(x))
        tokens = tokens[:, :queries] + block.drop_path1(block.ls1(x))
        return tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens))))
