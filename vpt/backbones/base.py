"""What every frozen image model is to this package: embed → blocks → finish, with prompts."""

import copy
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vpt.config import BackboneConfig
from vpt.data.transforms import Preprocess
from vpt.errors import InputError

Position = Literal["prepend", "append"]


class Rows(NamedTuple):
    """Keys and values of prompts, each (1 or B, heads, P, head_dim), beside a block's own.

    Without a `gate`, tokens attend to both in one softmax (Jia et al. 2022). With one, a scalar,
    prompts have a softmax of their own, and `gate` times what it gives is added: at 0 the block is
    as without prompts (zero-init attention, Zhang et al. 2023, section 3.2).
    """

    key: Tensor
    value: Tensor
    gate: Tensor | None = None


class Among(NamedTuple):
    """Prompts that are the last `count` tokens of a block, and see all of them.

    What the tokens before them see of them is gated as in `Rows`.
    """

    count: int
    gate: Tensor


def share(model: nn.Module) -> nn.Module:
    """A copy of the module tree in eval mode whose frozen parameters are views of `model`'s.

    No weight is copied, and nothing done to the copy (mode, gradients, hooks, heads) is seen by
    other users of `model`.
    """
    memo: dict[int, object] = {
        id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()
    }
    memo |= {id(buffer): buffer for buffer in model.buffers()}
    return copy.deepcopy(model, memo).eval()


class Backbone(nn.Module):
    """Adapter of one family: a subclass sets the attributes and says how to embed and finish.

    Tokens are (B, N, width); the first `num_prefix_tokens` of them are not patches.
    """

    family: ClassVar[str]
    model: nn.Module
    width: int
    num_layers: int
    num_prefix_tokens: int
    patch_size: tuple[int, int]
    feature_dim: int
    preprocess: Preprocess
    readout_tokens: int | None = None  # how many leading tokens `finish` reads; None: all
    appends_prompts = False  # True: blocks know each token's place, so prompts stand after all
    knows_rows = False  # whether `block` and `rows` are spelled for this model's blocks
    exact_tokens = False  # True: prompts always take the plain path, as tokens
    checkpointing = False  # True: blocks run again in the backward pass, nothing inside is kept

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = share(model)
        self.config: BackboneConfig | None = None  # how to load it again, where that is known
        self._fingerprint: str | None = None
        self._answers: dict[int, list[float]] = {}

    @staticmethod
    def fits(model: nn.Module) -> bool:
        """Whether `model` belongs to this family."""
        raise NotImplementedError

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

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to the tokens (B, N, width) that enter block 0."""
        raise NotImplementedError

    def enter(self, index: int, tokens: Tensor, num_prompts: int) -> Tensor:
        """What stands before block `index`: patch merging in hierarchical families.

        The last `num_prompts` of tokens (B, N, width) are prompts there.
        """
        return tokens

    def block(
        self,
        index: int,
        tokens: Tensor,
        rows: Rows | Among | None = None,
        queries: int | None = None,
    ) -> Tensor:
        """Tokens through block `index`.

        Args:
            index: of the block.
            tokens: (B, N, width).
            rows: keys and values (see `rows`) that all tokens attend to beside the tokens' own, or
                which tokens are gated prompts.
            queries: compute only the first so many tokens of the output; None: all.
        """
        raise NotImplementedError

    def rows(self, index: int, prompts: Tensor) -> Rows:
        """Keys and values of prompts (P, width) or (B, P, width) in block `index`."""
        raise NotImplementedError

    def finish(self, tokens: Tensor) -> Tensor:
        """Tokens after the last block to features (B, feature_dim)."""
        raise NotImplementedError

    def forward(
        self,
        images: Tensor,
        prompts: Sequence[Tensor] | Tensor = (),
        layers: Sequence[int] = (),
        position: Position = "prepend",
        gates: Sequence[Tensor] | Tensor | None = None,
    ) -> Tensor:
        """Features (B, feature_dim) of images (B, 3, H, W), with prompts.

        Before block `layers[i]` the prompt slots are (over)written with `prompts[i]`; in the blocks
        between, prompts are ordinary tokens (Jia et al. 2022, eq. 4-6). A prompt that the next
        block overwrites needs no output, so only its keys and values are computed: exact, and
        chosen where the blocks are known (`knows_rows`) unless `exact_tokens` is set.

        Args:
            images: normalised as `preprocess` says.
            prompts: for each of `layers` (P, width), (B, P, width) for one set a sample, or the
                keys and values that `fold_prompts` made of them. A narrower block takes the leading
                columns.
            layers: ascending.
            position: after the prefix tokens, or after the last patch. The output is the same,
                since prompts carry no position embedding.
            gates: a scalar for each block from `layers[0]` on, see `Rows` and `Among`; only for a
                backbone that knows rows.
        """
        return self.finish(self._run(images, prompts, layers, position, None, gates))

    def forward_intermediates(
        self,
        images: Tensor,
        prompts: Sequence[Tensor] | Tensor = (),
        layers: Sequence[int] = (),
        position: Position = "prepend",
        indices: Sequence[int] | None = None,
        gates: Sequence[Tensor] | Tensor | None = None,
    ) -> list[Tensor]:
        """Feature maps (B, width, rows, columns) after the blocks `indices`; None: after all.

        Of patches only, without prompts, prefix tokens and final norm: timm's
        `forward_intermediates` with `norm=False`. The other arguments are those of `forward`.
        """
        maps: dict[int, Tensor] = {}
        self._run(images, prompts, layers, position, maps, gates)
        return [maps[index] for index in (maps if indices is None else indices)]

    def _run(
        self,
        images: Tensor,
        prompts: Sequence[Tensor] | Tensor,
        layers: Sequence[int],
        position: Position,
        maps: dict[int, Tensor] | None,
        gates: Sequence[Tensor] | Tensor | None,
    ) -> Tensor:
        """Tokens after the last block, without prompts; `maps` takes the feature maps."""
        fast = self.knows_rows and not self.exact_tokens
        last_place = fast or self.appends_prompts or gates is not None
        prepend = position == "prepend" and not last_place
        tokens, widths, num_prompts = self.embed(images), self.widths, 0
        for index in range(self.num_layers):
            last = index == self.num_layers - 1
            rows = queries = gate = None
            if gates is not None and index >= layers[0]:
                gate = gates[index - layers[0]]
            if index in layers:
                tokens, num_prompts = self._strip(tokens, num_prompts, prepend), 0
            tokens = self.enter(index, tokens, num_prompts)
            if index in layers:
                prompt = prompts[layers.index(index)][..., : widths[index]]
                if prompt.dim() == 5:  # folded
                    rows = Rows(*prompt, gate)
                elif fast and (last or index + 1 in layers):
                    rows = self.rows(index, prompt)._replace(gate=gate)
                else:
                    prompt = prompt.to(tokens.dtype).expand(len(tokens), -1, -1)
                    start = self.num_prefix_tokens if prepend else tokens.shape[1]
                    tokens = torch.cat([tokens[:, :start], prompt, tokens[:, start:]], 1)
                    num_prompts = prompt.shape[1]
            if num_prompts and gate is not None:
                rows = Among(num_prompts, gate)
            if fast and last:
                count, num_prompts = tokens.shape[1] - num_prompts, 0
                queries = count if maps is not None else self.readout_tokens or count
            tokens = self.remember(self.block, index, tokens, rows, queries)
            if maps is not None:
                patches = self._strip(tokens, num_prompts, prepend)[:, self.num_prefix_tokens :]
                maps[index] = patches.mT.unflatten(2, self.grid(index, images))
        return self._strip(tokens, num_prompts, prepend)

    def _strip(self, tokens: Tensor, num_prompts: int, prepend: bool) -> Tensor:
        """Tokens without their prompts."""
        if not num_prompts:
            return tokens
        if not prepend:
            return tokens[:, :-num_prompts]
        start = self.num_prefix_tokens
        return torch.cat([tokens[:, :start], tokens[:, start + num_prompts :]], 1)

    def remember(self, block: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """What `block` makes of `inputs`; with `checkpointing` only these are kept for backward."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def fold_prompts(self, prompts: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """`prompts` for `forward`; where it would make rows of them, keys and values, stacked."""
        fast = self.knows_rows and not self.exact_tokens
        last = self.num_layers - 1
        return [
            torch.stack(self.rows(index, prompt[..., : self.widths[index]])[:2])
            if fast and (index == last or index + 1 in layers)
            else prompt
            for index, prompt in zip(layers, prompts, strict=True)
        ]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def fingerprint(self) -> str:
        """SHA-256 of all pretrained weights as float32, computed once."""
        if self._fingerprint is not None:
            return self._fingerprint
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy())
        self._fingerprint = digest.hexdigest()
        return self._fingerprint

    @torch.no_grad()
    def answer(self) -> list[float]:
        """The first 16 features of a fixed image of `preprocess`'s size, computed once a size.

        They tell apart what the same weights may belong to: another activation, another pooling.
        """
        size = self.preprocess.image_size
        if size not in self._answers:
            waves = torch.arange(3.0 * size * size).sin().view(1, 3, size, size)
            self._answers[size] = self(waves.to(next(self.model.parameters())))[0, :16].tolist()
        return self._answers[size]

    def identity(self) -> dict[str, Any]:
        """What an artefact knows its backbone by: `fingerprint` and `answer`."""
        return {"fingerprint": self.fingerprint(), "answer": self.answer()}
