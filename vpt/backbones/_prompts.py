"""Prompts as a value: one for all images, one for each, or many tasks' in one batch."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Position = Literal["prepend", "append"]


class Rows(NamedTuple):
    """Keys and values of prompts, each (1 or B, heads, P, head_dim), beside a block's own.

    `mask` (B, P) is True where a sample has a prompt; None: everywhere.
    """

    key: Tensor
    value: Tensor
    mask: Tensor | None = None


class Mixed(NamedTuple):
    """One layer's sets of a batch in which samples have tokens, rows or nothing.

    Attributes:
        own: (B,), True where a sample has a set at this layer; others go on with what they have.
        mask: (B, S), True where one of the S tokens is a prompt, from this layer on.
        tokens: (B, S, width), or None where no sample has tokens.
        rows: or None where no sample has rows.
    """

    own: Tensor
    mask: Tensor
    tokens: Tensor | None
    rows: Rows | None


class LayerPrompts(NamedTuple):
    """Prompts as one block meets them: further keys and values, and the last of its tokens.

    Without a gate, tokens attend to them and to each other in one softmax (Jia et al. 2022). With
    one, prompts have a softmax of their own, and `gate` times its output is added: at 0 the block
    is as without prompts (zero-init attention, Zhang et al. 2023, section 3.2). Prompts that are
    tokens attend to everything in one softmax.

    Attributes:
        rows: their `mask` is in `mask`.
        count: how many of the block's tokens are prompts.
        mask: (B, count + P), True where a sample has a prompt; None: everywhere.
        gate: a scalar, or (B,).
        gated: (B,), which samples have a gate; None: all.
    """

    rows: Rows | None = None
    count: int = 0
    mask: Tensor | None = None
    gate: Tensor | None = None
    gated: Tensor | None = None

    def repeat(self, times: int) -> "LayerPrompts":
        """Prompts of `times` as many samples: each sample so often in a row."""
        return map_tensors(
            self, lambda t: t.repeat_interleave(times, 0) if t.dim() and len(t) > 1 else t
        )


class Prompts(NamedTuple):
    """Prompts of an image tower, for `Backbone.forward`.

    Before block `layers[i]` the prompt tokens are overwritten with `sets[i]`; in the blocks
    between, prompts are ordinary tokens (Jia et al. 2022, eq. 4-6).

    Attributes:
        sets: for each of `layers` tokens (P, width) or (B, P, width), one set a sample, or `Rows`,
            which one block sees. A narrower block takes the leading columns.
        layers: ascending.
        position: after the prefix tokens, or after the last patch. The output is the same, since
            prompts carry no position embedding.
        gates: (num_layers - layers[0],), or (B, …): see `LayerPrompts`.
        mix: (num_layers - layers[0] - 1,), or (B, …), of each block after the first prompted one:
            the proportion of the prompts' output of the block before in what enters it; the rest
            is the block's own set, or where it has none what entered the block before. None:
            own sets overwrite, others flow.
        read: whether the prompts' outputs of the last block are wanted.
        gated: (B,), which samples `gates` are of; None: all.
    """

    sets: Sequence[Tensor | Rows | Mixed]
    layers: Sequence[int]
    position: Position = "prepend"
    gates: Tensor | None = None
    mix: Tensor | None = None
    read: bool = False
    gated: Tensor | None = None

    @property
    def mixed(self) -> bool:
        """True if samples differ in more than values."""
        return any(isinstance(each, Mixed) for each in self.sets)

    def at(self, index: int) -> Tensor | Rows | Mixed | None:
        """The set of block `index`; None where it has none of its own."""
        return self.sets[self.layers.index(index)] if index in self.layers else None

    def take(self, ids: Sequence[int] | Tensor) -> "Prompts":
        """Prompts of a batch whose sample b has set `ids[b]`: of a stack, or of a set a sample."""
        if not self.layers:
            return self
        some = next(iter(tensors(self)))
        index = torch.as_tensor(ids, device=some.device)
        return map_tensors(self, lambda tensor: tensor[index])

    def sample(self, number: int) -> "Prompts":
        """Prompts of one sample of a mixed batch, as they were before the stacking."""
        sets, layers = [], []
        for layer, each in zip(self.layers, self.sets, strict=True):
            if each.own[number]:
                layers.append(layer)
                sets.append(_unpad(each, number))
        gated = self.gates is not None and (self.gated is None or bool(self.gated[number]))
        skipped = layers[0] - self.layers[0] if layers else 0
        mix = None if self.mix is None else self.mix[number, skipped:]
        if mix is not None and bool(((mix == 0) | (mix == 1)).all()):
            mix = None  # filled in by the stacking
        return self._replace(
            sets=sets,
            layers=layers,
            gates=self.gates[number, skipped:] if gated and layers else None,
            mix=mix if layers else None,
            gated=None,
        )

    @staticmethod
    def stack(many: "Sequence[Prompts | None]") -> "Prompts":
        """One value of many, each with one set for all samples; `take(ids)` makes a batch of it.

        They may differ in anything: layers, number and kind (tokens or rows), gates, mix; None is
        without prompts. Those that differ in values alone need no mask.
        """
        members = [each or Prompts([], []) for each in many]
        if len({_form(each) for each in members}) == 1:
            return _stack_alike(members)
        return _stack_mixed(members)


def map_tensors(value: "Rows | Mixed | LayerPrompts | Prompts", change: Callable) -> "NamedTuple":
    """`value` with every tensor changed, those of its parts too."""

    def changed(part: object) -> object:
        if isinstance(part, Tensor):
            return change(part)
        if isinstance(part, tuple) and hasattr(part, "_fields"):
            return map_tensors(part, change)
        if isinstance(part, list | tuple) and part and not isinstance(part[0], int):
            return [changed(each) for each in part]
        return part

    return type(value)(*map(changed, value))


def tensors(value: "Rows | Mixed | Prompts") -> list[Tensor]:
    """All tensors of `value`, in an order that is always the same."""
    found: list[Tensor] = []
    map_tensors(value, found.append)
    return found


def _form(prompts: Prompts) -> tuple:
    """Alike for prompts that differ in values alone."""
    shapes = [(type(each), *(part.shape for part in _parts(each))) for each in prompts.sets]
    both = [None if part is None else part.shape for part in (prompts.gates, prompts.mix)]
    return (*prompts.layers, *shapes, *both, prompts.read)


def _parts(each: Tensor | Rows) -> tuple[Tensor, ...]:
    return (each,) if isinstance(each, Tensor) else each[:2]


def _stack_alike(members: list[Prompts]) -> Prompts:
    first = members[0]
    sets = [
        Rows(*(torch.cat(parts) for parts in zip(*(rows[:2] for rows in same), strict=True)))
        if isinstance(same[0], Rows)
        else torch.stack(same)
        for same in zip(*(member.sets for member in members), strict=True)
    ]
    gates = None if first.gates is None else torch.stack([m.gates for m in members])
    mix = None if first.mix is None else torch.stack([m.mix for m in members])
    return first._replace(sets=sets, gates=gates, mix=mix)


def _stack_mixed(members: list[Prompts]) -> Prompts:
    layers = sorted({layer for member in members for layer in member.layers})
    first = layers[0]
    sets = [each for member in members for each in member.sets]
    slots = max((len(each) for each in sets if isinstance(each, Tensor)), default=0)
    like = _parts(sets[0])[0]
    counts = [0] * len(members)
    stacked = []
    for layer in layers:
        own = [member.at(layer) for member in members]
        for number, each in enumerate(own):
            if each is not None:
                counts[number] = len(each) if isinstance(each, Tensor) else 0
        have = torch.tensor([each is not None for each in own], device=like.device)
        places = torch.arange(slots, device=like.device)
        mask = places < torch.tensor(counts, device=like.device)[:, None]
        stacked.append(Mixed(have, mask, _pad_tokens(own, slots), _pad_rows(own)))
    gated = [member.gates is not None for member in members]
    return Prompts(
        stacked,
        layers,
        gates=_align([(m.gates, m.layers) for m in members], first, 0),
        mix=_align_mix(members, first),
        read=any(member.read for member in members),
        gated=torch.tensor(gated, device=like.device) if any(gated) else None,
    )


def _pad_tokens(own: Sequence[Tensor | Rows | None], slots: int) -> Tensor | None:
    tokens = [each if isinstance(each, Tensor) else None for each in own]
    like = next((each for each in tokens if each is not None), None)
    if like is None:
        return None
    width = max(each.shape[-1] for each in tokens if each is not None)
    blank = like.new_zeros(slots, width)
    padded = [
        blank if each is None else F.pad(each, (0, width - each.shape[-1], 0, slots - len(each)))
        for each in tokens
    ]
    return torch.stack(padded)


def _pad_rows(own: Sequence[Tensor | Rows | None]) -> Rows | None:
    rows = [each if isinstance(each, Rows) else None for each in own]
    like = next((each for each in rows if each is not None), None)
    if like is None:
        return None
    counts = [0 if each is None else each.key.shape[2] for each in rows]
    most = max(counts)
    blank = like.key.new_zeros(1, like.key.shape[1], most, like.key.shape[3])
    key, value = (
        torch.cat(
            [
                blank if each is None else F.pad(each[part], (0, 0, 0, most - each.key.shape[2]))
                for each in rows
            ]
        )
        for part in (0, 1)
    )
    counted = torch.tensor(counts, device=key.device)
    return Rows(key, value, torch.arange(most, device=key.device) < counted[:, None])


def _align(
    values: Sequence[tuple[Tensor | None, Sequence[int]]], first: int, fill: float
) -> Tensor | None:
    """(N, layers after `first`) of vectors that start at the first layer of each member."""
    like = next((value for value, _ in values if value is not None), None)
    if like is None:
        return None
    total = max(layers[0] - first + len(value) for value, layers in values if value is not None)
    rows = [
        like.new_full((total,), fill)
        if value is None
        else F.pad(value, (layers[0] - first, 0), value=fill)
        for value, layers in values
    ]
    return torch.stack(rows)


def _align_mix(members: Sequence[Prompts], first: int) -> Tensor | None:
    """`mix` of all: 1, for flowing, and 0 at their own layers, for those that have none."""
    mix = _align([(m.mix, m.layers) for m in members], first, 1)
    if mix is None:
        return None
    own = torch.zeros_like(mix, dtype=torch.bool)
    for number, member in enumerate(members):
        if member.mix is None:
            own[number, [layer - first - 1 for layer in member.layers if layer > first]] = True
    return mix.masked_fill(own, 0)


def _unpad(each: Mixed, number: int) -> Tensor | Rows:
    if each.rows is not None and (kept := each.rows.mask[number]).any():
        return Rows(*(part[number : number + 1, :, kept] for part in each.rows[:2]))
    return each.tokens[number, each.mask[number]]
