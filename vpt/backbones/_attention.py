"""Attention over tokens and further keys and values, as all families spell it."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from vpt.backbones._prompts import LayerPrompts


def project(
    x: Tensor, weight: Tensor, bias: Tensor | None, num_heads: int, parts: slice
) -> tuple[Tensor, ...]:
    """The `parts` of (query, key, value) of x (B, N, width), each (B, heads, N, head_dim).

    Weight (3·dim, width) and bias (3·dim) hold the three projections one after the other.
    """
    head_dim = weight.shape[0] // (3 * num_heads)
    weight = weight.unflatten(0, (3, -1))[parts].flatten(0, 1)
    if bias is not None:
        bias = bias.unflatten(0, (3, -1))[parts].flatten()
    x = F.linear(x, weight, bias)
    return x.unflatten(-1, (-1, num_heads, head_dim)).permute(2, 0, 3, 1, 4).unbind(0)


def query_key_value(
    project: Callable[[Tensor, slice], tuple[Tensor, ...]], x: Tensor, queries: int | None
) -> tuple[Tensor, ...]:
    """`project(x, parts)`: queries of the first `queries` tokens (None: all), keys and values.

    Under training apart, so that backward does not keep keys and values a second time, with and
    without prompts.
    """
    if queries is None and not x.requires_grad:
        return project(x, slice(0, 3))
    return *project(x[:, :queries], slice(0, 1)), *project(x, slice(1, 3))


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompts: LayerPrompts | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attended values (B, Q, heads·head_dim) of (B, heads, N, head_dim), with prompts.

    `bias` (1 or B, heads, N, N) is of the first N tokens among each other; prompts, which come
    after them, have no position and so no bias.
    """
    if prompts is None:
        return _softmax(query, key, value, bias, None, scale)
    count = key.shape[2] - prompts.count
    if prompts.rows is not None:
        rows = (part.to(key.dtype).expand(len(key), -1, -1, -1) for part in prompts.rows[:2])
        key, value = (torch.cat(pair, 2) for pair in zip((key, value), rows, strict=True))
    mask, gate, gated = prompts.mask, prompts.gate, prompts.gated
    if gate is None:
        return _softmax(query, key, value, bias, mask, scale)
    tokens, flowing = query.tensor_split([count], 2)
    if gated is None:
        x = _softmax(tokens, key[:, :, :count], value[:, :, :count], bias, None, scale)
    else:
        # the samples without a gate see prompts here; the others do not
        x = _softmax(tokens, key, value, bias, mask & ~gated[:, None], scale)
        gated = gated & mask.any(1)
        gate, mask = gate * gated, mask | ~gated[:, None]  # a softmax over nothing is not a number
    beside = _softmax(tokens, key[:, :, count:], value[:, :, count:], None, mask, scale)
    x = x + gate.to(beside.dtype)[..., None, None] * beside
    if not flowing.shape[2]:
        return x
    return torch.cat([x, _softmax(flowing, key, value, None, prompts.mask, scale)], 1)


def _softmax(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    scale: float | None,
) -> Tensor:
    """Attended values (B, Q, heads·head_dim), `mask` (B, P) being of the last P keys."""
    queries, keys = query.shape[2], key.shape[2]
    if bias is not None:
        bias = bias[:, :, :queries].to(query.dtype)
        bias = F.pad(bias, (0, keys - bias.shape[3], 0, queries - bias.shape[2]))
    if mask is not None:
        hidden = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -torch.inf)
        hidden = F.pad(hidden, (keys - mask.shape[1], 0))[:, None, None]
        bias = hidden if bias is None else bias + hidden
    x = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)
    return x.transpose(1, 2).flatten(2)
