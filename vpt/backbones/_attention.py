"""Attention over tokens and further keys and values, as all families spell it."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from vpt.backbones.base import Among, Rows


def project(
    x: Tensor, weight: Tensor, bias: Tensor | None, num_heads: int, parts: slice
) -> tuple[Tensor, ...]:
    """Those `parts` of (query, key, value) of x (B, N, width), each (B, heads, N, head_dim).

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
    rows: Rows | Among | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attended values (B, Q, heads·head_dim) of (B, heads, N, head_dim) and further `rows`.

    `bias` (1 or B, heads, N, N) is of the first N tokens among each other; any others, and `rows`,
    are prompts, which have no position and so no bias.
    """
    if isinstance(rows, Among):
        count = key.shape[2] - rows.count
        (tokens, prompts), (key_of, key_of_prompts), (value_of, value_of_prompts) = (
            part.tensor_split([count], 2) for part in (query, key, value)
        )
        seen = Rows(key_of_prompts, value_of_prompts, rows.gate)
        x = attend(tokens, key_of, value_of, seen, bias, scale)
        if not prompts.shape[2]:
            return x
        return torch.cat([x, attend(prompts, key, value, scale=scale)], 1)
    if rows is not None:
        extra = [part.to(key.dtype).expand(len(key), -1, -1, -1) for part in rows[:2]]
        if rows.gate is not None:
            seen = attend(query, *extra, scale=scale)
            return attend(query, key, value, None, bias, scale) + rows.gate.to(seen.dtype) * seen
        key, value = (torch.cat(pair, 2) for pair in zip((key, value), extra, strict=True))
    if bias is not None:
        queries, keys = query.shape[2], key.shape[2]
        bias = bias[:, :, :queries].to(query.dtype)
        bias = F.pad(bias, (0, keys - bias.shape[3], 0, queries - bias.shape[2]))
    x = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)
    return x.transpose(1, 2).flatten(2)
