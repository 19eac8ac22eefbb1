"""Frozen image models as this package runs them: embed → blocks → pool, with prompts."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from vpt.backbones._flow import Flow
from vpt.backbones._identity import Identity
from vpt.backbones._prompts import LayerPrompts, Position, Prompts, Rows
from vpt.config import BackboneConfig
from vpt.data.transforms import Preprocess
from vpt.errors import InputError

__all__ = ["Backbone", "LayerPrompts", "Position", "Prompts", "Rows", "Tokens", "share"]

Watch = Callable[[int, Tensor, Tensor], None]


class Tokens(NamedTuple):
    """Outputs of the last block after the final norm, each (B, N, width)."""

    prefix: Tensor
    prompts: Tensor
    patches: Tensor


def share(model: nn.Module) -> nn.Module:
    """A copy of the module tree in eval mode whose frozen parameters are views of `model`'s.

    No weight is copied, and nothing done to the copy (mode, gradients, hooks, heads) is seen by
    other users of `model`.
    """
    memo: dict[int, object] = {
        id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()
    }
    memo |= {id(buffer): buffer for buffer in model.buffers()}
    for module in model.modules():  # a pruned weight is computed anew at each pass
        memo |= {id(v): v.detach() for v in vars(module).values() if isinstance(v, Tensor)}
    return copy.deepcopy(model, memo).eval()


class Backbone(Identity):
    """Adapter of one family: a subclass sets the attributes and says how to embed and pool.

    Tokens are (B, N, width); the first `num_prefix_tokens` of them are not patches.
    """

    family: ClassVar[str]
    width: int
    num_layers: int
    num_prefix_tokens: int
    patch_size: tuple[int, int]
    feature_dim: int
    preprocess: Preprocess
    readout_tokens: int | None = None  # how many leading tokens `pool` reads; None: all
    appends_prompts = False  # True: blocks know each token's place, so prompts stand after all
    knows_rows = False  # True: `block` and `rows` are spelled for this model's blocks
    runs_blocks = True  # False: the family's own blocks take no further tokens
    takes_sizes = False  # True: `set_size` takes other sizes than `preprocess` has
    exact_tokens = False  # True: prompts always take the plain path, as tokens
    checkpointing = False  # True: blocks run again in the backward pass, nothing inside is kept

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = share(model)
        self.config: BackboneConfig | None = None  # how to load it again, where that is known

    @staticmethod
    def fits(model: nn.Module) -> bool:
        """True if `model` belongs to this family."""
        raise NotImplementedError

    def require_known(self) -> None:
        """Refuse changed blocks where prompts can't run through the blocks themselves.

        Raises:
            InputError: a subclass, a hook, LoRA or another change in a block of such a family.
        """
        if not (self.runs_blocks or self.knows_rows):
            raise InputError(
                f"{type(self.model).__name__} has blocks that are changed (a hook, LoRA, a class "
                "of one's own), which this family can't run with prompts: give the model without"
            )

    @property
    def image_tower(self) -> nn.Module:
        """The part of the model that sees images."""
        return self.model

    @property
    def widths(self) -> list[int]:
        """Width of the tokens in each block."""
        return [self.width] * self.num_layers

    def grid(self, index: int, images: Tensor) -> tuple[int, int]:
        """Rows and columns of patches in block `index`."""
        height, width = images.shape[-2:]
        return height // self.patch_size[0], width // self.patch_size[1]

    def check_size(self, images: Tensor) -> None:
        """Refuse images of another size than `preprocess` gives.

        Raises:
            InputError: for families whose blocks know each token's place.
        """
        size = self.preprocess.image_size
        if images.shape[-2:] != (size, size):
            height, width = images.shape[-2:]
            raise InputError(
                f"images of {height}×{width}, but the backbone takes {size}×{size}: resize them, "
                "or make it with img_size=…"
            )

    def set_size(self, height: int, width: int) -> None:
        """Take images of this size from now on; multiples of the patch, see `takes_sizes`."""
        raise NotImplementedError

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, channels, H, W) to the tokens (B, N, width) that enter block 0."""
        raise NotImplementedError

    def enter(self, index: int, tokens: Tensor, num_prompts: int) -> Tensor:
        """Tokens that enter block `index`: after patch merging in hierarchical families.

        The last `num_prompts` of tokens (B, N, width) are prompts there.
        """
        return tokens

    def block(
        self,
        index: int,
        tokens: Tensor,
        prompts: LayerPrompts | None = None,
        queries: int | None = None,
    ) -> Tensor:
        """Tokens through block `index`.

        Args:
            index: of the block.
            tokens: (B, N, width).
            prompts: keys and values (see `rows`) that tokens attend to beside their own, and which
                tokens are prompts where these are gated or masked.
            queries: compute only the first so many tokens of the output; None: all.
        """
        raise NotImplementedError

    def rows(self, index: int, prompts: Tensor) -> Rows:
        """Keys and values of prompts (P, width) or (B, P, width) in block `index`."""
        raise NotImplementedError

    def input_norm(self, prompts: Tensor) -> Tensor:
        """Prompts (…, width) that stand before the tower's own input norm, after it."""
        return prompts

    def final_norm(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N, width) after the last block, after the norm that stands before pooling."""
        raise NotImplementedError

    def pool(self, tokens: Tensor) -> Tensor:
        """Tokens after the last block to what the tower pools of them, (B, …), not projected."""
        raise NotImplementedError

    def project(self, pooled: Tensor) -> Tensor:
        """Pooled outputs to features (B, feature_dim)."""
        return pooled

    def forward(self, images: Tensor, prompts: Prompts | None = None) -> Tensor:
        """Features (B, feature_dim) of images (B, 3, H, W), normalised as `preprocess` says.

        A model of timm made with `in_chans=1` takes (B, 1, H, W).

        A prompt that the next block overwrites needs no output, so only its keys and values are
        computed: exact, and chosen where the blocks are known (`knows_rows`) unless `exact_tokens`
        is set. Samples of a mixed batch (see `Prompts.stack`) then run together, else one by one.
        """
        return self.project(self.pooled(images, prompts))

    def pooled(
        self,
        images: Tensor,
        prompts: Prompts | None = None,
        index: Tensor | None = None,
        begin: int = 0,
    ) -> Tensor:
        """Features before the projection (B, …); the first arguments are those of `forward`.

        `index` (B,) is the image of each sample, where several samples are of the same; None:
        there are as many images. Blocks before the first prompts then run once an image. `begin`
        is as in `tokens`.
        """
        return self.pool(self._run(images, prompts, index=index, begin=begin))

    def tokens(
        self,
        images: Tensor,
        prompts: Prompts | None = None,
        begin: int = 0,
        watch: Watch | None = None,
    ) -> Tokens:
        """Outputs of all tokens after the final norm; those of prompts where `prompts.read` is set.

        A mixed batch has as many prompts as its longest set; `prompts.sets[-1].mask` says whose
        are whose.

        Args:
            images: (B, 3, H, W), or from `until` the tokens that enter block `begin`.
            prompts: of blocks from `begin` on.
            begin: the first block to run.
            watch: called after each block with its number, prefix tokens and prompts.
        """
        outputs: list[Tensor] = []
        tokens = self.final_norm(
            self._run(images, prompts, outputs=outputs, begin=begin, watch=watch)
        )
        prefix = self.num_prefix_tokens
        read = self.final_norm(outputs[0]) if outputs else tokens[:, :0]
        return Tokens(tokens[:, :prefix], read, tokens[:, prefix:])

    def until(self, images: Tensor, end: int) -> Tensor:
        """Tokens (B, N, width) of images that enter block `end`, without prompts."""
        tokens = self.embed(images)
        for index in range(end):
            tokens = self.block(index, self.enter(index, tokens, 0))
        return tokens

    def feature_maps(
        self,
        images: Tensor,
        prompts: Prompts | None = None,
        indices: Sequence[int] | None = None,
    ) -> list[Tensor]:
        """Feature maps (B, width, rows, columns) after the blocks `indices`; None: after all.

        Of patches only, without prompts, prefix tokens and final norm: timm's
        `forward_intermediates` with `norm=False`.
        """
        maps: dict[int, Tensor] = {}
        self._run(images, prompts, maps=maps)
        return [maps[index] for index in (maps if indices is None else indices)]

    def fold(self, prompts: Prompts) -> Prompts:
        """`prompts` with keys and values in the place of tokens where `forward` would make them."""
        return prompts._replace(
            sets=[
                self.rows(index, each[..., : self.widths[index]])
                if isinstance(each, Tensor) and self.as_rows(index, prompts)
                else each
                for index, each in zip(prompts.layers, prompts.sets, strict=True)
            ]
        )

    @property
    def _fast(self) -> bool:
        return self.knows_rows and not self.exact_tokens

    def as_rows(self, index: int, prompts: Prompts) -> bool:
        """True if no output of the prompts that enter block `index` is ever used."""
        last = index == self.num_layers - 1
        unused = not prompts.read if last else index + 1 in prompts.layers and prompts.mix is None
        return self._fast and unused

    def _run(
        self,
        images: Tensor,
        prompts: Prompts | None,
        maps: dict[int, Tensor] | None = None,
        outputs: list[Tensor] | None = None,
        begin: int = 0,
        watch: Watch | None = None,
        index: Tensor | None = None,
    ) -> Tensor:
        """Tokens after the last block, without prompts, whose own outputs `outputs` takes.

        `maps` takes the feature maps; `begin` and `watch` are as in `tokens`, `index` as in
        `pooled`.
        """
        channels = self.preprocess.channels
        if not begin and (images.ndim != 4 or images.shape[1] != channels):
            raise InputError(
                f"images of shape {tuple(images.shape)}, but the backbone takes (B, {channels}, "
                "height, width)"
            )
        prompts = prompts or Prompts([], [])
        if prompts.mixed and not self._fast:
            images = images if index is None else images[index]
            return self._one_by_one(images, prompts, maps, outputs)
        at_end = self._fast or self.appends_prompts
        at_end = at_end or prompts.gates is not None or prompts.mix is not None
        flow = Flow(self, prompts, prepend=prompts.position == "prepend" and not at_end)
        first = prompts.layers[0] if prompts.layers else self.num_layers
        tokens = images if begin else self.embed(images)
        for layer in range(begin, self.num_layers):
            if layer == first and index is not None:
                tokens = tokens[index]
            tokens, seen = flow.enter(layer, tokens)
            queries = None
            if self._fast and layer == self.num_layers - 1 and not (flow.count and prompts.read):
                count = tokens.shape[1] - flow.count
                all_read = maps is not None or outputs is not None
                queries = count if all_read else self.readout_tokens or count
                flow.count = 0
            tokens = self.remember(self.block, layer, tokens, seen, queries)
            if watch is not None:
                watch(layer, tokens[:, : self.num_prefix_tokens], flow.among(tokens))
            tokens = flow.leave(layer, tokens)
            if maps is not None:
                patches = flow.strip(tokens)[:, self.num_prefix_tokens :]
                maps[layer] = patches.mT.unflatten(2, self.grid(layer, images))
        if outputs is not None and prompts.read and flow.count:
            outputs.append(flow.among(tokens))
        tokens = flow.strip(tokens)
        return tokens if index is None or prompts.layers else tokens[index]

    def _one_by_one(
        self,
        images: Tensor,
        prompts: Prompts,
        maps: dict[int, Tensor] | None,
        outputs: list[Tensor] | None,
    ) -> Tensor:
        """`_run` for the samples of a mixed batch apart: blocks that know no mask, or as proof."""
        tokens, all_maps, read = [], [], []
        for number in range(len(images)):
            own_maps: dict[int, Tensor] = {}
            own_outputs: list[Tensor] = []
            image = images[number : number + 1]
            tokens.append(self._run(image, prompts.sample(number), own_maps, own_outputs))
            all_maps.append(own_maps)
            read.append(own_outputs[0][0] if own_outputs else tokens[-1][0, :0])
        if maps is not None:
            maps |= {index: torch.cat([own[index] for own in all_maps]) for index in all_maps[0]}
        if outputs is not None and prompts.read:
            outputs.append(pad_sequence(read, batch_first=True))
        return torch.cat(tokens)

    def remember(self, block: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """Output of `block` on `inputs`; with `checkpointing` only these are kept for backward."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.model.parameters()).device
