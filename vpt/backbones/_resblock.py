"""open_clip's residual attention block, spelled with extra keys and values."""

from functools import partial

from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from vpt.backbones import _attention
from vpt.backbones._known import is_exactly
from vpt.backbones.base import LayerPrompts


def is_plain(block: nn.Module) -> bool:
    """True if `attend` computes this block's forward."""
    return (
        is_exactly(block, ResidualAttentionBlock)
        and is_exactly(block.attn, nn.MultiheadAttention)
        and is_exactly(block.attn.out_proj, NonDynamicallyQuantizableLinear)
        and block.attn.batch_first
        and block.attn.in_proj_weight is not None
        and not hasattr(block, "ln_1_kv")
    )


def project(block: ResidualAttentionBlock, tokens: Tensor, parts: slice) -> tuple[Tensor, ...]:
    """The `parts` of (query, key, value) of tokens (B, N, width): (B, heads, N, head_dim)."""
    attn = block.attn
    tokens = block.ln_1(tokens)
    return _attention.project(tokens, attn.in_proj_weight, attn.in_proj_bias, attn.num_heads, parts)


def attend(
    block: ResidualAttentionBlock,
    tokens: Tensor,
    prompts: LayerPrompts | None = None,
    queries: int | None = None,
) -> Tensor:
    """The block on tokens (B, N, width) with prompts; the first `queries` of its output."""
    parts = _attention.query_key_value(partial(project, block), tokens, queries)
    return mix(block, tokens[:, :queries], _attention.attend(*parts, prompts))


def mix(block: ResidualAttentionBlock, tokens: Tensor, attended: Tensor) -> Tensor:
    """Apply the part after attention: output projection, residual, MLP, residual."""
    tokens = tokens + block.ls_1(block.attn.out_proj(attended))
    return tokens + block.ls_2(block.mlp(block.ln_2(tokens)))
