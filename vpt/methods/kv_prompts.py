"""Key and value prompts beside VPT-deep's, the least of which are pruned (E2VPT, Han et al. 2023).

Pruned half-way, then trained on, where the paper rewinds the rest and trains anew.
"""

from collections.abc import Iterable, Sequence

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from vpt.backbones.base import Backbone, Prompts, Rows
from vpt.backbones.clip import Tokenizer
from vpt.errors import InputError
from vpt.losses import Loss
from vpt.methods import vpt_deep
from vpt.methods._tokens import init_bound
from vpt.methods.base import Batch, Epoch


class Options(vpt_deep.Options):
    """Options of key/value prompts."""

    project: None = None
    layers: None = None  # all
    num_rows: PositiveInt = 5  # keys, and values, of their own in each block
    segments: PositiveInt = 8  # parts of a token's width that are pruned as one
    prune_tokens: float = Field(0.0, ge=0, lt=1)  # proportion of each block's tokens
    prune_segments: float = Field(0.0, ge=0, lt=1)  # proportion of each token's segments


class KVPrompts(vpt_deep.VPTDeep):
    """VPT-deep with `kv_prompts`, put into each block's keys and values as they are.

    Attributes:
        kv_prompts: (num_layers, 2, heads, num_rows, head_dim).
        mask: (num_layers, num_tokens, segments), 0 where pruned; a pruned segment is all zeros.
    """

    Options = Options

    def __init__(
        self,
        backbone: Backbone,
        class_names: Sequence[str],
        options: Options,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        """Make the prompts, one set for each block.

        Raises:
            InputError: blocks that take no keys and values; segments that do not divide the width.
        """
        if not backbone.knows_rows:
            raise InputError(
                "kv_prompts needs attention that takes keys and values of its own, which this "
                "backbone's blocks do not: take vpt_deep"
            )
        if len(set(backbone.widths)) > 1:
            raise InputError(f"kv_prompts needs blocks of one width, not {backbone.family}'s")
        if backbone.width % options.segments:
            raise InputError(
                f"method.segments={options.segments} does not divide the width {backbone.width}"
            )
        super().__init__(backbone, class_names, options, tokenizer)
        _, heads, _, head_dim = backbone.rows(0, self.prompts[0]).key.shape
        bound = init_bound(backbone, backbone.width)
        kv_prompts = torch.empty(backbone.num_layers, 2, heads, options.num_rows, head_dim)
        self.kv_prompts = nn.Parameter(kv_prompts.uniform_(-bound, bound))
        mask = torch.ones(backbone.num_layers, options.num_tokens, options.segments)
        self.register_buffer("mask", mask)

    def layer_prompts(self) -> Tensor:
        """Prompts (num_layers, num_tokens, width), zero where pruned."""
        segments = self.prompts.unflatten(-1, (self.options.segments, -1))
        return (segments * self.mask[..., None]).flatten(-2)

    def learned_prompts(self, count: int) -> Prompts:
        """Keys and values of the tokens, and those of `kv_prompts` beside them."""
        prompts = super().learned_prompts(count)
        rows = zip(prompts.layers, prompts.sets, self.kv_prompts, strict=True)
        return prompts._replace(sets=[self._rows(*each) for each in rows])

    def _rows(self, index: int, tokens: Tensor, own: Tensor) -> Rows:
        made = self.backbone.rows(index, tokens)[:2]
        own = own[:, None].to(made[0].dtype).expand(-1, len(made[0]), -1, -1, -1)
        return Rows(*(torch.cat(pair, 2) for pair in zip(made, own, strict=True)))

    def before_epoch(self, at: Epoch) -> None:
        """Prune half-way.

        Raises:
            InputError: one epoch alone, of which half is nothing trained.
        """
        super().before_epoch(at)
        if not (self.options.prune_tokens or self.options.prune_segments):
            return
        if at.count == 1:
            raise InputError("kv_prompts prunes half-way: give train.epochs=2 or more")
        if at.number == at.count // 2:
            self.prune(at.batches, at.loss)
            super().before_epoch(at)  # a probe of what is left

    def prune(self, batches: Iterable[Batch], loss: Loss) -> None:
        """Set `mask` by importance, |∂loss/∂mask| summed over batches, of tokens and segments."""
        tokens, segments = torch.zeros_like(self.mask[..., 0]), torch.zeros_like(self.mask)
        self.eval()
        self.mask.requires_grad_()
        for batch in batches:
            total = self.step(batch.to(self.mask.device), loss).total
            (gradient,) = torch.autograd.grad(total, self.mask)
            tokens += gradient.sum(-1).abs()
            segments += gradient.abs()
        self.mask.requires_grad_(False)
        kept = _keep(tokens, self.options.prune_tokens)[..., None]
        self.mask.copy_(kept * _keep(segments, self.options.prune_segments))


def _keep(importance: Tensor, pruned: float) -> Tensor:
    """Ones, but 0 for the least proportion `pruned` of the last dimension, rounded down."""
    least = importance.argsort(-1)[..., : int(pruned * importance.shape[-1])]
    return torch.ones_like(importance).scatter(-1, least, 0)
