"""timm's Eva: EVA, EVA-02, DINOv3, Perception Encoder, ViTs with rotary position embedding."""

import math
from functools import partial

import torch
from timm.layers import apply_rot_embed_cat
from timm.layers.pos_embed_sincos import get_mixed_freqs, get_mixed_grid
from timm.models.eva import AttentionRope, Eva, EvaAttention, EvaBlock
from torch import Tensor, nn

from vpt.backbones import vit
from vpt.backbones._attention import attend, project, query_key_value
from vpt.backbones._known import is_exactly
from vpt.backbones.base import LayerPrompts


class Adapter(vit.Adapter):
    """Prompts have no position: their queries and keys are not rotated.

    DINOv3 pools by average where timm loads it; make it with `global_pool="token"` for CLS.
    """

    family = "timm Eva"
    appends_prompts = True

    @staticmethod
    def fits(model: nn.Module) -> bool:
        """Exactly timm's Eva."""
        return type(model) is Eva

    @staticmethod
    def is_known(block: nn.Module) -> bool:
        """A pre-norm block whose attention is neither gated nor of grouped heads."""
        attn = block.attn
        known = is_exactly(block, EvaBlock) and is_exactly(attn, EvaAttention, AttentionRope)
        plain = getattr(attn, "gate", None) is None and getattr(attn, "num_kv_groups", 1) == 1
        # of one projection the weights are read; three are called
        return known and plain and (attn.qkv is None or is_exactly(attn.qkv, nn.Linear))

    def embed(self, images: Tensor) -> Tensor:
        """Patch embedding, class and register tokens, position embedding, `norm_pre`."""
        self.check_size(images)
        tokens, _ = self.model._pos_embed(self.model.patch_embed(images))
        return self.model.norm_pre(tokens)

    def block(
        self,
        index: int,
        tokens: Tensor,
        prompts: LayerPrompts | None = None,
        queries: int | None = None,
    ) -> Tensor:
        """The block itself, or, with prompts or fewer queries, its forward spelled out."""
        block, rope = self.model.blocks[index], self._rope(index, tokens)
        if prompts is None and queries is None:
            return block(tokens, rope=rope)
        attn, scale1, scale2 = block.attn, block.gamma_1, block.gamma_2
        query, key, value = query_key_value(partial(self.qkv, block), block.norm1(tokens), queries)
        query = _rotate(attn, attn.q_norm(query), rope).type_as(value)
        key = _rotate(attn, attn.k_norm(key), rope).type_as(value)
        x = attn.proj_drop(attn.proj(attn.norm(attend(query, key, value, prompts))))
        tokens = tokens[:, :queries] + block.drop_path1(x if scale1 is None else scale1 * x)
        x = block.mlp(block.norm2(tokens))
        return tokens + block.drop_path2(x if scale2 is None else scale2 * x)

    def qkv(self, block: nn.Module, x: Tensor, parts: slice) -> tuple[Tensor, ...]:
        """The `parts` of (query, key, value) of normed tokens x (B, N, width)."""
        attn = block.attn
        if attn.qkv is None:
            layers = (attn.q_proj, attn.k_proj, attn.v_proj)[parts]
            split = (layer(x).unflatten(-1, (attn.num_heads, -1)) for layer in layers)
            return tuple(part.transpose(1, 2) for part in split)
        bias = attn.qkv.bias
        if type(attn) is EvaAttention and attn.q_bias is not None:
            bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        return project(x, attn.qkv.weight, bias, attn.num_heads, parts)

    def _rope(self, index: int, tokens: Tensor) -> Tensor | None:
        """Sines and cosines (…, N, 2·head_dim) of all tokens but the prefix; prompts: 0 and 1."""
        rope, grid = self.model.rope, self.model.patch_embed.grid_size
        if rope is None:
            return None
        if self.model.rope_mixed:  # `get_embed` would compute those of all blocks
            x, y = get_mixed_grid(grid, grid_indexing=rope.grid_indexing, device=self.device)
            turns = get_mixed_freqs(rope.freqs[:, index], x, y)
        else:
            turns = rope.get_embed(shape=grid)
        num_prompts = tokens.shape[1] - self.num_prefix_tokens - math.prod(grid)
        still = turns.new_zeros(*turns.shape[:-2], num_prompts, turns.shape[-1])
        still[..., turns.shape[-1] // 2 :] = 1
        return torch.cat([turns, still], -2)


def _rotate(attn: nn.Module, x: Tensor, rope: Tensor | None) -> Tensor:
    """Queries or keys x (B, heads, N, head_dim), rotated but for the prefix tokens."""
    if rope is None:
        return x
    prefix, rest = x[:, :, : attn.num_prefix_tokens], x[:, :, attn.num_prefix_tokens :]
    rope = rope[..., : rest.shape[2], :]
    return torch.cat([prefix, apply_rot_embed_cat(rest, rope, half=attn.rotate_half)], 2)
