"""Prompts among tokens whose blocks know their places, against independent computations."""

import copy
import itertools

import pytest
import torch
from families import MODELS, build
from tiny import images

from vpt import backbones
from vpt.backbones._attention import attend
from vpt.backbones.base import LayerPrompts, Rows
from vpt.errors import InputError


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("queries", [2, 5, 7])
def test_prompts_get_no_position_bias(queries):
    """5 tokens with a bias; 2 prompts as further tokens, and 3 as rows."""
    query, key, value = random(2, 4, queries, 8), random(2, 4, 7, 8), random(2, 4, 7, 8)
    rows, bias = random(2, 1, 4, 3, 8), random(1, 4, 5, 5)
    keys = torch.cat([key, rows[0].expand(2, -1, -1, -1)], 2)
    values = torch.cat([value, rows[1].expand(2, -1, -1, -1)], 2)
    scores = query @ keys.mT / 8**0.5
    biased = min(queries, 5)
    scores[:, :, :biased, :5] += bias[:, :, :biased]
    expected = (scores.softmax(-1) @ values).transpose(1, 2).flatten(2)
    same(attend(query, key, value, LayerPrompts(Rows(*rows)), bias), expected)


@pytest.mark.parametrize("name", sorted({"eva02", "dinov3", "pe", "rope_mixed"} & MODELS.keys()))
def test_prompts_are_not_rotated(name):
    """timm's own block, told that the prompts are prefix tokens, which it does not rotate."""
    model = build(name).double()
    backbone = backbones.adapt(model)
    tokens, prompts = backbone.embed(images().double()), random(3, 4, 32)
    block = copy.deepcopy(model.blocks[1])
    prefix = backbone.num_prefix_tokens
    block.attn.num_prefix_tokens = prefix + 4
    _, rope = model._pos_embed(model.patch_embed(images().double()))
    between = torch.cat([tokens[:, :prefix], prompts, tokens[:, prefix:]], 1)
    expected = block(between, rope=rope[1] if model.rope_mixed else rope)
    actual = backbone.block(1, torch.cat([tokens, prompts], 1))
    same(actual[:, :prefix], expected[:, :prefix])
    same(actual[:, prefix:-4], expected[:, prefix + 4 :])
    same(actual[:, -4:], expected[:, prefix : prefix + 4])
    same(backbone.block(1, tokens, LayerPrompts(backbone.rows(1, prompts))), actual[:, :-4])


@pytest.mark.parametrize("name", ["eva", "dinov3", "swin"])
def test_other_image_sizes_are_refused(name):
    with pytest.raises(InputError, match="images of 64×64, but the backbone takes 32×32"):
        backbones.adapt(build(name))(images(size=64))


def region(place, size, window, shift):
    """Part of the shifted map that a place belongs to: parts in a window do not mix."""
    return (place >= size - window) + (place >= size - shift) if shift else 0


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("name", ["swin", "swin_padded"])
def test_swin_windows(name, index):
    """One head at a time, one query at a time, from the definition."""
    model = build(name).double()
    block = model.layers[0].blocks[index]
    attn, (window, _), (shift, _) = block.attn, block.window_size, block.shift_size
    size = 8
    padded = size + -size % window
    assert bool(shift) == bool(index)
    tokens, prompts = random(2, size * size, 16), random(2, 3, 16)

    def heads(x):
        return attn.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)

    patches = torch.zeros(2, padded, padded, 16, dtype=torch.float64)  # as shifted and padded
    rolled = torch.roll(block.norm1(tokens).unflatten(1, (size, size)), (-shift, -shift), (1, 2))
    patches[:, :size, :size] = rolled
    query, key, value = heads(patches.flatten(1, 2))
    _, prompt_key, prompt_value = heads(block.norm1(prompts))
    attended = torch.zeros_like(tokens)
    places = list(itertools.product(range(padded), repeat=2))

    for row, column in itertools.product(range(size), repeat=2):
        near = [
            p
            for p in places
            if (p[0] // window, p[1] // window) == (row // window, column // window)
        ]
        columns = torch.tensor([r * padded + c for r, c in near])
        table = [
            (row - r + window - 1) * (2 * window - 1) + column - c + window - 1 for r, c in near
        ]
        parts = [[region(x, padded, window, shift) for x in p] for p in (*near, (row, column))]
        masked = torch.tensor([-100.0 * (part != parts[-1]) for part in parts[:-1]])
        bias = attn.relative_position_bias_table[table].T + masked
        one = query[:, :, row * padded + column, None] / 8**0.5
        scores = torch.cat([one @ key[:, :, columns].mT + bias[:, None], one @ prompt_key.mT], -1)
        weighed = scores.softmax(-1) @ torch.cat([value[:, :, columns], prompt_value], 2)
        home = (row + shift) % size * size + (column + shift) % size
        attended[:, home] = weighed.transpose(1, 2).flatten(1)
    expected = tokens + attn.proj(attended)
    expected = expected + block.mlp(block.norm2(expected))
    backbone = backbones.adapt(model)
    same(backbone.block(index, tokens, LayerPrompts(backbone.rows(index, prompts))), expected)
    with_prompts = backbone.block(index, torch.cat([tokens, prompts], 1))
    same(with_prompts[:, :-3], expected)


def test_patch_merging_takes_a_prompt_as_four_equal_patches():
    model = build("swin").double()
    backbone = backbones.adapt(model)
    tokens, prompts = random(2, 64, 16), random(2, 3, 16)
    merged = backbone.enter(2, torch.cat([tokens, prompts], 1), 3)
    merging = model.layers[1].downsample
    same(merged[:, :16], merging(tokens.unflatten(1, (8, 8))).flatten(1, 2))
    same(merged[:, 16:], merging.reduction(merging.norm(torch.cat([prompts] * 4, -1))))
    assert backbone.enter(1, tokens, 0) is tokens
