"""MMRL++: representation tokens shared by both towers' upper blocks (Guo and Gu 2025)."""

import math
from collections.abc import Sequence

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from vpt.backbones.base import Prompts
from vpt.backbones.clip import Adapter
from vpt.backbones.text import Tokenizer
from vpt.errors import InputError
from vpt.losses import Loss
from vpt.methods._templates import TemplateOptions
from vpt.methods._text import CHUNK, ClassEmbeddings, in_parts
from vpt.methods._tokens import ImagePrompts
from vpt.methods.base import Batch, Step


class Options(TemplateOptions):
    """Options of MMRL++, whose paper chooses `beta` and `weight` for each data set; these are one.

    The first of `templates` is the classes' text.
    """

    num_tokens: PositiveInt = 5
    dim: PositiveInt = 512  # of the tokens, before they are mapped to a tower's width
    first_block: PositiveInt = 6  # of both towers, from which on all get tokens; counts from 1
    rank: PositiveInt | None = 4  # of what a block's map has beside the shared; None: maps apart
    projection_rank: PositiveInt | None = 64  # of what is added to the projection; None: a new one
    beta: float = Field(0.9, gt=0, le=1)  # of a block's own tokens; the rest are outputs before it
    alpha: float = Field(0.7, ge=0, le=1)  # of the class token's logits; the rest are the tokens'
    weight: float = Field(0.5, ge=0)  # of the cosine distances to the frozen towers' features
    final_norm: float = Field(0.0, ge=0)  # AlignedNorm's weights; there .1 both
    sequence_norm: float = Field(0.0, ge=0)
    cache_blocks: bool = True  # keep what blocks without tokens give: .6 MB a view, ViT-B/16


class MMRLpp(ImagePrompts, ClassEmbeddings):
    """Logits of the class token and of the representation tokens, the texts' features being one.

    Logits are `alpha` of those and the rest of these for every class, as in AlignedNorm; MMRL's
    code takes the class token's alone where it is told that classes are new. They have the
    backbone's own scale; there, 100.

    Attributes:
        representations: (num_tokens, dim).
        image_maps, text_maps: representations to the tokens of each block.
        projection: of the tokens' mean, beside the tower's own or instead of it.
    """

    Options = Options
    spare_columns = frozenset({"lower"})
    teacher_texts: Tensor

    def __init__(
        self,
        backbone: Adapter,
        class_names: Sequence[str],
        options: Options,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        """Build the method.

        Raises:
            InputError: an image tower that is not read at its class token, linearly.
        """
        super().__init__(backbone, class_names, options, tokenizer)
        own = linear_projection(backbone) if backbone.readout_tokens == 1 else None
        if own is None:
            raise InputError(
                f"{self.name} needs an image tower that is read at its class token and projected "
                "linearly, without a bias: take promptsrc"
            )
        self.register_buffer("own_projection", own, persistent=False)
        self.first = min(options.first_block, backbone.num_layers) - 1
        text_first = min(options.first_block, backbone.text.num_layers) - 1
        self.representations = nn.Parameter(0.02 * torch.randn(options.num_tokens, options.dim))
        count = backbone.num_layers - self.first
        self.image_maps = Maps(count, options.dim, backbone.width, options.rank)
        count = backbone.text.num_layers - text_first
        self.text_maps = Maps(count, options.dim, backbone.text.width, options.rank)
        self.projection = Projection(*own.shape, options.projection_rank)
        names = [name.replace("_", " ") for name in class_names]
        texts = [options.templates[0].replace("{}", name) for name in names]
        ids = backbone.text.tokenize(texts, tokenizer)
        self.texts = nn.ModuleList(
            backbone.text.insert(part, text_first, options.num_tokens) for part in ids.split(CHUNK)
        )
        with torch.no_grad():
            teacher = backbone.text.run(backbone.text.embed(ids), ids)
        self.register_buffer("teacher_texts", teacher, persistent=False)
        self.register_buffer("class_embeddings", None, persistent=False)

    def learned_prompts(self, count: int) -> Prompts:
        """Tokens of the blocks from the first on."""
        sets = self.image_maps(self.representations)
        mixed = self.options.beta < 1 or self.options.sequence_norm
        mix = sets.new_full((len(sets) - 1,), 1 - self.options.beta) if mixed else None
        layers = range(self.first, self.backbone.num_layers)
        return Prompts(list(sets), layers, "append", mix=mix, read=True)

    def text_features(self, features: Tensor | None = None) -> Tensor:
        """Class embeddings (C, dim), differentiable, not normalised."""
        if self.class_embeddings is not None:
            return self.class_embeddings
        prompts, mix = self.text_maps(self.representations), 1 - self.options.beta
        tower, exact = self.backbone.text, self.backbone.exact_tokens
        return in_parts(lambda part: part(tower, prompts, mix, exact), list(self.texts))

    def make_constants(self) -> None:
        """Keep the class embeddings: no text tower at test time."""
        super().make_constants()
        self.class_embeddings = self.text_features()

    def read(self, images: Tensor, prompts: Prompts | None) -> Tensor:
        """Features (B, 2 · dim) of the class token, then of the representation tokens."""
        return self._project(*self.backbone.tokens(images, prompts)[:2])

    @property
    def feature_dim(self) -> int:
        """Width of what `read` gives."""
        return 2 * self.backbone.feature_dim

    def _project(self, prefix: Tensor, tokens: Tensor) -> Tensor:
        projection = self.projection(self.own_projection)
        parts = self.backbone.project(prefix[:, 0]), tokens.mean(1) @ projection
        return torch.cat(parts, 1)

    def logits(self, features: Tensor) -> Tensor:
        """Logits (B, C) of both branches, fused."""
        texts = self.text_features()
        return self._fuse(*(self.similarities(part, texts) for part in features.chunk(2, 1)))

    def _fuse(self, own: Tensor, tokens: Tensor) -> Tensor:
        return self.options.alpha * own + (1 - self.options.alpha) * tokens

    def frozen_columns(self, images: Tensor) -> dict[str, Tensor]:
        """`teacher`: features of the bare tower; `lower`: what its blocks without tokens give."""
        lower = self.backbone.until(images, self.first)
        prefix = self.backbone.tokens(lower if self.first else images, begin=self.first).prefix
        columns = {"teacher": self.backbone.project(prefix[:, 0])}
        keep = self.options.cache_blocks and self.first
        return columns | {"lower": lower} if keep else columns

    def step(self, batch: Batch, loss: Loss) -> Step:
        """Both branches' losses, distances to the frozen features, and AlignedNorm's two gaps."""
        options, gaps = self.options, []

        def watch(index: int, prefix: Tensor, tokens: Tensor) -> None:
            # of batch means, block by block and token by token
            if index >= self.first and options.sequence_norm:
                norms = tokens.norm(dim=-1).mean(0) - prefix[:, 0].norm(dim=-1).mean().detach()
                gaps.append(norms.abs())

        features = batch.inputs
        if not batch.cached:
            lower = batch.columns.get("lower")
            images, begin = (batch.inputs, 0) if lower is None else (lower, self.first)
            prompts = self.image_prompts(images)
            features = self._project(*self.backbone.tokens(images, prompts, begin, watch)[:2])
        texts = self.text_features()
        own, tokens = features.chunk(2, 1)
        logits = [self.similarities(part, texts) for part in (own, tokens)]
        terms = {
            "classes": options.alpha * loss(logits[0], batch.labels),
            "representations": (1 - options.alpha) * loss(logits[1], batch.labels),
            "image": options.weight * distance(own, batch.columns["teacher"]),
            "text": options.weight * distance(texts, self.teacher_texts),
        }
        if options.final_norm:
            gap = (tokens.norm(dim=-1) - own.norm(dim=-1).detach()).abs().mean()
            terms["final_norm"] = options.final_norm * gap
        if gaps:
            terms["sequence_norm"] = options.sequence_norm * torch.stack(gaps).mean()
        return Step(torch.stack(list(terms.values())).sum(), self._fuse(*logits), terms)


class Maps(nn.Module):
    """Affine maps dim → width of each of `count` blocks: apart, or one and a low rank beside it."""

    def __init__(self, count: int, dim: int, width: int, rank: int | None) -> None:
        super().__init__()
        linear = nn.Linear(dim, width)  # all blocks start alike
        weight = linear.weight.detach()[None]
        self.weight = nn.Parameter(weight if rank else weight.repeat(count, 1, 1))
        self.bias = nn.Parameter(linear.bias.detach().repeat(count, 1))
        self.left = self.right = None
        if rank:
            bound = 1 / math.sqrt(rank)
            self.left = nn.Parameter(torch.empty(count, width, rank).uniform_(-bound, bound))
            self.right = nn.Parameter(torch.zeros(count, rank, dim))

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (count, M, width) of representations (M, dim)."""
        weight = self.weight if self.left is None else self.weight + self.left @ self.right
        return tokens @ weight.mT + self.bias[:, None]


class Projection(nn.Module):
    """A projection width → dim: a low rank beside a frozen one, or one drawn anew."""

    def __init__(self, width: int, dim: int, rank: int | None) -> None:
        super().__init__()
        self.weight = self.left = self.right = None
        if rank is None:
            self.weight = nn.Parameter(width**-0.5 * torch.randn(width, dim))
        else:
            bound = 1 / math.sqrt(rank)
            self.left = nn.Parameter(torch.empty(width, rank).uniform_(-bound, bound))
            self.right = nn.Parameter(torch.zeros(rank, dim))

    def forward(self, frozen: Tensor) -> Tensor:
        """The projection (width, dim) where the tower's own is `frozen`."""
        return frozen + self.left @ self.right if self.weight is None else self.weight


@torch.no_grad()
def linear_projection(backbone: Adapter) -> Tensor | None:
    """The matrix (width, feature_dim) that projects pooled features; None: another function."""
    scale = backbone.model.logit_scale
    unit = torch.eye(backbone.width, dtype=scale.dtype, device=scale.device)
    projection = backbone.project(unit)
    is_odd = torch.allclose(backbone.project(-2 * unit), -2 * projection, atol=1e-5)
    return projection if is_odd else None


def distance(one: Tensor, other: Tensor) -> Tensor:
    """Mean of 1 - cosine of the pairs of features (N, dim)."""
    precise = torch.promote_types(one.dtype, torch.float32)
    return 1 - F.cosine_similarity(one.to(precise), other.to(precise), dim=-1).mean()
