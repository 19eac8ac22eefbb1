"""The image half of prompts that each image picks by its bare features, the query."""

from typing import Literal

import torch
from pydantic import NonNegativeFloat
from torch import Tensor
from torch.nn import functional as F

from vpt.backbones.base import Backbone, Prompts, Rows
from vpt.errors import InputError
from vpt.losses import Loss
from vpt.methods._linear import LinearOptions, LinearReadout
from vpt.methods.base import Batch, Step


class QueryOptions(LinearOptions):
    """Options of methods with a query pass, whose heads steps train."""

    head: Literal["random"] = "random"


class PullOptions(QueryOptions):
    """Options of methods that pull keys to the queries that pick them."""

    pull: NonNegativeFloat = 0.1  # weight of the keys' cosine to the query


class QueryPrompts(LinearReadout):
    """Prompts are a function of an image's query (B, feature_dim), each sample's its own.

    In training the query is a frozen column, so it costs one pass an image and view. At test the
    query pass and the prompted one are the same until the first prompted block.
    """

    Options = QueryOptions
    starts_small = True

    def first_layer(self) -> int:
        """The first prompted block."""
        raise NotImplementedError

    def pick(self, query: Tensor) -> Prompts:
        """Prompts of B images by their queries (B, feature_dim)."""
        raise NotImplementedError

    def penalties(self, query: Tensor) -> dict[str, Tensor]:
        """Terms that training adds to the loss."""
        return {}

    @property
    def passes(self) -> float:  # type: ignore[override]
        """Two, but for the blocks that both share."""
        return 2 - self.first_layer() / self.backbone.num_layers

    def frozen_columns(self, images: Tensor) -> dict[str, Tensor]:
        """The query (B, feature_dim)."""
        return {"query": self.backbone(images)}

    def image_prompts(self, images: Tensor) -> Prompts:
        """Prompts that the images' queries pick."""
        return self.pick(self.backbone(images))

    def read(self, images: Tensor, prompts: Prompts | None, begin: int = 0) -> Tensor:
        """Features of images, or of the tokens that enter block `begin`."""
        return self.backbone.project(self.backbone.pooled(images, prompts, begin=begin))

    def features(self, images: Tensor) -> Tensor:
        """Image features (B, feature_dim), the first blocks run once."""
        first = self.first_layer()
        tokens = self.backbone.until(images, first) if first else images
        query = self.backbone.project(self.backbone.pooled(tokens, begin=first))
        return self.read(tokens, self.pick(query), first)

    def step(self, batch: Batch, loss: Loss) -> Step:
        """The loss, and what `penalties` adds to it."""
        query = batch.columns["query"]
        features = batch.inputs if batch.cached else self.read(batch.inputs, self.pick(query))
        logits = self.logits(features)
        terms = {"cross_entropy": loss(logits, batch.labels), **self.penalties(query)}
        return Step(torch.stack([*terms.values()]).sum(), logits, terms)


def cosines(query: Tensor, keys: Tensor) -> Tensor:
    """Cosines (…, B, M) of queries (B, dim) and keys (…, M, dim)."""
    return F.normalize(query, dim=-1) @ F.normalize(keys, dim=-1).mT


def as_rows(values: Tensor, heads: int) -> Rows:
    """Rows of keys and values (2, B, P, width), whose width is split head by head."""
    return Rows(*values.unflatten(-1, (heads, -1)).transpose(2, 3))


def num_heads(backbone: Backbone, method: str) -> int:
    """Number of attention heads.

    Raises:
        InputError: blocks that take no keys and values, or of several widths.
    """
    if not backbone.knows_rows or len(set(backbone.widths)) > 1:
        raise InputError(
            f"{method} needs blocks of one width that take keys and values of its own, which this "
            "backbone's do not: take l2p"
        )
    blank = torch.zeros(1, backbone.width, device=backbone.device)
    return backbone.rows(0, blank).key.shape[1]
