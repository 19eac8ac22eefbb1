"""Prompts as a value: batches whose samples have different ones, outputs that are mixed or read."""

import functools

import pytest
import tiny
import torch
from families import MODELS, build

from vpt import backbones
from vpt.backbones._prompts import tensors
from vpt.backbones.base import Prompts, Rows

same = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)


@functools.cache
def adapted(name):
    return backbones.adapt(build(name).double())


def sets(backbone, count, layers, seed):
    width = max(backbone.widths)
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(len(layers), count, width, generator=generator, dtype=torch.float64)
    return [each.requires_grad_() for each in made]


def vector(length, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(length, generator=generator, dtype=torch.float64).requires_grad_()


def kinds(backbone):
    """Deep, shallow, folded, gated, mixed and no prompts, of different numbers and layers."""
    depth = backbone.num_layers

    def prompts(count, layers, seed, **options):
        return Prompts(sets(backbone, count, layers, seed), layers, **options)

    many = {
        "deep": prompts(4, list(range(depth)), 1),
        "shallow": prompts(2, [0], 2),
        "none": None,
        "late": prompts(3, [depth - 1], 3),
        "first and last": prompts(1, [0, depth - 1], 4),
        "blended": prompts(3, [0], 5, mix=vector(depth - 1, 6)),
        "blended with own": prompts(2, [0, 1], 13, mix=vector(depth - 1, 14)),
    }
    if backbone.knows_rows:
        folded = backbone.fold(prompts(5, list(range(depth)), 7))
        leaves = [
            Rows(*(part.detach().requires_grad_() for part in each[:2])) for each in folded.sets
        ]
        many |= {
            "folded": folded._replace(sets=leaves),
            "gated deep": prompts(2, list(range(depth)), 8, gates=vector(depth, 9)),
            "gated shallow": prompts(6, [1], 10, gates=vector(depth - 1, 11)),
        }
    return many


def gradients(output, many):
    leaves = [leaf for each in many if each is not None for leaf in tensors(each)]
    if not leaves:
        return []
    found = torch.autograd.grad(output.square().sum(), leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]


def check(backbone, many):
    images = tiny.images(len(many) + 1).double()
    ids = [*range(len(many)), 0]
    together = backbone(images, Prompts.stack(many).take(ids))
    apart = [backbone(images[i : i + 1], many[of]) for i, of in enumerate(ids)]
    same(together, torch.cat(apart))
    for one, other in zip(
        gradients(together, many), gradients(torch.cat(apart), many), strict=True
    ):
        same(one, other)
    return together


@pytest.mark.parametrize("exact_tokens", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_batch_of_all_kinds_equals_separate_runs(name, exact_tokens):
    backbone = adapted(name)
    many = list(kinds(backbone).values())
    backbone.exact_tokens = exact_tokens
    together = check(backbone, many)
    assert (together[0] - together[1]).abs().max() > 1e-6
    backbone.exact_tokens = False


@pytest.mark.parametrize(
    "chosen",
    [
        ("deep", "shallow"),
        ("deep", "none"),
        ("folded", "shallow"),
        ("folded", "deep"),
        ("gated deep", "deep"),
        ("gated shallow", "shallow"),
        ("gated shallow", "gated deep"),
        ("gated shallow", "folded"),
        ("blended", "deep"),
        ("blended", "blended with own"),
        ("late", "none"),
        ("none", "none"),
    ],
    ids="-".join,
)
@pytest.mark.parametrize("name", ["vit", "swin", "swinv2_padded", "eva02", "beit", "clip"])
def test_pairs(name, chosen):
    backbone = adapted(name)
    many = kinds(backbone)
    check(backbone, [many[kind] for kind in chosen])


@pytest.mark.parametrize(
    "kind", ["deep", "shallow", "folded", "gated deep", "gated shallow", "blended"]
)
@pytest.mark.parametrize("name", ["vit", "swin", "clip"])
def test_prompts_that_differ_in_values_alone_need_no_mask(name, kind):
    backbone = adapted(name)
    one, other = kinds(backbone)[kind], kinds(backbone)[kind]
    for leaf in tensors(other):
        leaf.data += 0.3
    stacked = Prompts.stack([one, other])
    assert not stacked.mixed
    check(backbone, [one, other])


@pytest.mark.parametrize("name", ["vit", "swin", "clip", "dinov3"])
def test_feature_maps_of_a_mixed_batch(name):
    backbone = adapted(name)
    many = list(kinds(backbone).values())
    images = tiny.images(len(many)).double()
    together = backbone.feature_maps(images, Prompts.stack(many).take(range(len(many))))
    apart = [backbone.feature_maps(images[i : i + 1], each) for i, each in enumerate(many)]
    for index, maps in enumerate(together):
        same(maps, torch.cat([own[index] for own in apart]))


@pytest.mark.parametrize("exact_tokens", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_of_prompts_can_be_read(name, exact_tokens):
    backbone = adapted(name)
    backbone.exact_tokens = exact_tokens
    images = tiny.images().double()
    prompts = Prompts(sets(backbone, 4, [0, 1, 2], 1), [0, 1, 2], read=True)
    read = backbone.tokens(images, prompts)
    assert read.prefix.shape[1] == backbone.num_prefix_tokens
    assert read.prompts.shape[1] == 4
    assert read.patches.shape[1] == torch.tensor(backbone.grid(2, images)).prod()
    without = backbone.tokens(images, prompts._replace(read=False))
    assert without.prompts.shape[1] == 0
    same(without.prefix, read.prefix)
    same(without.patches, read.patches)
    same(backbone(images, prompts), backbone(images, prompts._replace(read=False)))
    backbone.exact_tokens = not exact_tokens
    same(backbone.tokens(images, prompts).prompts, read.prompts)
    backbone.exact_tokens = False
    assert isinstance(backbone.fold(prompts).sets[-1], torch.Tensor)  # rows have no outputs


def test_tokens_by_hand():
    model = build("vit").double()
    backbone, images = backbones.adapt(model), tiny.images().double()
    (prompts,) = sets(backbone, 4, [0], 1)
    x = torch.cat([backbone.embed(images), prompts.expand(3, -1, -1)], 1)
    for block in model.blocks:
        x = block(x)
    x = model.norm(x)
    read = backbone.tokens(images, Prompts([prompts], [0], read=True))
    same(torch.cat([read.prefix, read.patches, read.prompts], 1), x)


def test_reading_a_mixed_batch():
    backbone = adapted("vit")
    many = [
        Prompts(sets(backbone, count, layers, count), layers, read=True)
        for count, layers in ((2, [0]), (5, [0, 1, 2]))
    ]
    images = tiny.images(2).double()
    stacked = Prompts.stack(many).take([0, 1])
    for backbone.exact_tokens in (True, False):
        together = backbone.tokens(images, stacked)
        for number, each in enumerate(many):
            alone = backbone.tokens(images[number : number + 1], each)
            count = alone.prompts.shape[1]
            assert stacked.sets[-1].mask[number].sum() == count
            same(together.prompts[number : number + 1, :count], alone.prompts)
            same(together.patches[number : number + 1], alone.patches)


@pytest.mark.parametrize("name", ["vit", "swin", "clip"])
def test_outputs_mixed_into_the_next_layers_set_by_hand(name):
    """β·output + (1 - β)·own at block 1, then flowing, as MMRL++ mixes them."""
    backbone, images = adapted(name), tiny.images().double()
    own = sets(backbone, 4, [0, 1], 3)
    x = backbone.enter(0, backbone.embed(images), 0)
    narrow = own[0][:, : backbone.widths[0]].expand(3, -1, -1)
    x = backbone.enter(1, backbone.block(0, torch.cat([x, narrow], 1)), 4)
    entering = 0.3 * x[:, -4:] + 0.7 * own[1][:, : backbone.widths[1]]
    x = backbone.block(1, torch.cat([x[:, :-4], entering], 1))
    x = backbone.block(2, backbone.enter(2, x, 4))[:, :-4]
    mix = torch.tensor([0.3, 1.0], dtype=torch.float64)
    features = backbone(images, Prompts(own, [0, 1], mix=mix))
    same(features, backbone.project(backbone.pool(x)))


def test_rows_with_a_mask_of_ones_own():
    backbone, images = adapted("vit"), tiny.images().double()
    (tokens,) = sets(backbone, 4, [1], 1)
    rows = backbone.rows(1, tokens)
    mask = torch.tensor([[True] * 4, [True, False, True, False], [False] * 4])
    together = backbone(images, Prompts([rows._replace(mask=mask)], [1]))
    apart = [
        backbone(
            images[i : i + 1], Prompts([Rows(*(part[:, :, mask[i]] for part in rows[:2]))], [1])
        )
        for i in range(3)
    ]
    same(together, torch.cat(apart))
    same(together[2:], backbone(images[2:]))
