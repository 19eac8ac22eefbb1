"""open_clip's residual attention block, spelled with extra keys and values."""

import torch
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn
from torch.nn import functional as F

from vpt.backbones.base import Rows


def is_plain(block: nn.Module) -> bool:
    """Whether `attend` is this block's forward."""
    return (
        type(block) is ResidualAttentionBlock
        and block.attn.batch_first
        and block.attn.in_proj_weight is not None
        and not hasattr(block, "ln_1_kv")
    )


def project(block: ResidualAttentionBlock, tokens: Tensor, parts: slice) -> tuple[Tensor, ...]:
    """Those `parts` of (query, key, value) of tokens (B, N, width): (B, heads, N, head_dim)."""
    weight = block.attn.in_proj_weight.unflatten(0, (3, -1))[parts].flatten(0, 1)
    bias = block.attn.in_proj_bias.unflatten(0, (3, -1))[parts].flatten()
    x = F.linear(block.ln_1(tokens), weight, bias)
    heads = block.attn.num_heads
    return x.unflatten(-1, (-1, heads, block.attn.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)


def attend(
    block: ResidualAttentionBlock,
    tokens: Tensor,
    rows: Rows | None = None,
    queries: int | None = None,
    causal: bool = False,
) -> Tensor:
    """The block on tokens (B, N, width) that also attend to `rows`; the first `queries` of them."""
    if queries is None:
        query, key, value = project(block, tokens, slice(0, 3))
    else:
        (query,) = project(block, tokens[:, :queries], slice(0, 1))
        key, value = project(block, tokens, slice(1, 3))
    if rows is not None:
        key, value = (
            torch.cat([own, extra.to(own.dtype).expand(len(own), -1, -1, -1)], 2)
            for own, extra in zip((key, value), rows, strict=True)
        )
    x = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
    return mix(block, tokens[:, :queries], x.transpose(1, 2).flatten(2))


def mix(block: ResidualAttentionBlock, tokens: Tensor, attended: Tensor) -> Tensor:
    """What follows attention: output projection, residual, MLP, residual."""
    tokens = tokens + block.ls_1(block.attn.out_proj(attended))
    return tokens + block.ls_2(block.mlp(block.ln_2(tokens)))
