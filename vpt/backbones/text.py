"""A frozen text tower: texts to features in the joint space, with learned tokens among words."""

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import open_clip
import torch
from torch import Tensor, nn

from vpt.backbones.base import Backbone
from vpt.errors import InputError

Tokenizer = Callable[[Sequence[str]], Tensor]
TextPrompts = Sequence[Tensor] | Tensor
NamePosition = Literal["end", "middle", "front"]
CLIP_VOCABULARY = 49408


class TextTower(nn.Module):
    """Base of the families in `texts`, and by itself any text tower, for whole texts only.

    A family is one file. It knows where a tokenizer puts its own marks (begin, end, padding) and
    how token embeddings run through the tower, so that a context can be learned. A text with a
    context is "context name rest"; it is tokenised with as many placeholder words as the context
    has vectors, which then take their places.

    Attributes:
        model: the whole model of open_clip.
        tokenizer: texts → token ids (N, T); None where neither the model nor its name tells it.
        width: of token embeddings.
        num_layers: how many blocks there are.
    """

    family: ClassVar[str] = "whole texts"
    width: int
    num_layers: int
    start = 1  # position of a text's first word
    placeholder = "X"  # a word of one token
    is_causal = False  # True: tokens see only what stands before them
    knows_rows = False  # True: `run_shared` is spelled for this model's blocks
    checkpointing = False  # as in `Backbone`
    remember = Backbone.remember

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.tokenizer: Tokenizer | None = None
        if getattr(self.parts, "vocab_size", None) == CLIP_VOCABULARY:
            self.tokenizer = partial(_clip_tokens, self.parts.context_length)

    @staticmethod
    def fits(model: nn.Module) -> bool:
        """True if the text tower of `model` belongs to this family."""
        raise NotImplementedError

    @property
    def parts(self) -> nn.Module:
        """The module that holds the tower's parts: CLIP itself, or its own module."""
        return self.model if isinstance(self.model, open_clip.CLIP) else self.model.text

    def tokenize(self, texts: Sequence[str], tokenizer: Tokenizer | None = None) -> Tensor:
        """Token ids (len(texts), T).

        Raises:
            InputError: no tokenizer is known.
        """
        tokenizer = tokenizer or self.tokenizer
        if tokenizer is None:
            raise InputError(
                f"{type(self.model).__name__} with {self.parts.vocab_size} token ids has "
                "another tokenizer than CLIP: give tokenizer=open_clip.get_tokenizer(NAME)"
            )
        return tokenizer(list(texts))

    def encode(self, texts: Sequence[str], tokenizer: Tokenizer | None = None) -> Tensor:
        """Text features (len(texts), dim), not normalised."""
        ids = self.tokenize(texts, tokenizer).to(next(self.model.parameters()).device)
        return self.model.encode_text(ids, normalize=False)

    def words(self, text: str, tokenizer: Tokenizer | None = None) -> Tensor:
        """Token ids (N,) of the text's own words, without the tokenizer's marks.

        Raises:
            InputError: this tower takes no learned context.
        """
        raise self._no_context()

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings (…, width) of ids (…), before the position embedding.

        Raises:
            InputError: as `words`.
        """
        raise self._no_context()

    def run(
        self,
        embeddings: Tensor,
        ids: Tensor,
        prompts: TextPrompts | None = None,
        places: Tensor | None = None,
    ) -> Tensor:
        """Text features (C, dim), not normalised.

        Args:
            embeddings: (C, T, width), before the position embedding.
            ids: (C, T) of the texts with placeholders; they tell where to read.
            prompts: sets (M, width), which overwrite the context at the input of block 1, 2, …;
                after the last of them its outputs flow.
            places: (C, M), where the context stands; see `places`.

        Raises:
            InputError: as `words`.
        """
        raise self._no_context()

    def pack(self, ids: Tensor, words: int) -> nn.Module:
        """Make of texts (C, T) that begin with the same `words` what `run_shared` takes."""
        raise NotImplementedError

    def run_shared(
        self, prefixes: Tensor, suffixes: nn.Module, prompts: TextPrompts | None = None
    ) -> Tensor:
        """Text features (B, C, dim), not normalised, of all C texts after each prefix.

        Equal to `run`, but a prefix runs once for all texts, which only a causal tower allows.

        Args:
            prefixes: embeddings (B, P, width): one for all images, or one for each.
            suffixes: from `pack`.
            prompts: as in `run`.
        """
        raise NotImplementedError

    def insert(self, ids: Tensor, first: int, count: int) -> nn.Module:
        """Texts (C, T) that `count` learned tokens enter at block `first`; see `InsertedTexts`.

        Raises:
            InputError: another tower than a causal one that is read at EOT.
        """
        raise InputError(
            f"{type(self.parts).__name__} is no causal text tower read at EOT, which tokens from a "
            "later block on need: take coop, maple or promptsrc"
        )

    def order(
        self, count: int, names: Sequence[int], length: int, position: NamePosition
    ) -> Tensor:
        """(C, length): which token of "context name rest" stands at each position of the text.

        Args:
            count: tokens of the context.
            names: tokens of each name.
            length: of all texts.
            position: of the name: after the context, before it, or in its middle.
        """
        before = {"end": count, "middle": count // 2, "front": 0}[position]
        first, rows = self.start + count, []
        for name in names:
            token = list(range(length))
            context, own = token[self.start : first], token[first : first + name]
            middle = [*context[:before], *own, *context[before:]]
            rows.append([*token[: self.start], *middle, *token[first + name :]])
        return torch.tensor(rows)

    def places(self, order: Tensor, count: int) -> Tensor:
        """(C, count): the positions at which a context of `count` tokens stands in `order`."""
        return order.argsort(1)[:, self.start : self.start + count]

    def put(self, embeddings: Tensor, context: Tensor) -> Tensor:
        """Embeddings (N, T, width) with `context` (M, width) or (N, M, width) for the first words.

        One text takes many contexts, and one context goes to many texts.
        """
        context = context.to(embeddings.dtype)
        count = torch.broadcast_shapes(embeddings.shape[:1], context.shape[:-2])
        before, after = embeddings[:, : self.start], embeddings[:, self.start + context.shape[-2] :]
        return torch.cat([part.expand(*count, -1, -1) for part in (before, context, after)], 1)

    def _no_context(self) -> InputError:
        known = "; ".join(tower.family for tower in text_families())
        return InputError(
            f"{type(self.parts).__name__} takes no learned context: supported are {known}: "
            "take zero_shot, or vpt_deep on its images"
        )


def text_families() -> list[type[TextTower]]:
    """The tower of every family: the modules of `texts`."""
    folder = Path(__file__).parent / "texts"
    modules = [info.name for info in pkgutil.iter_modules([str(folder)])]
    modules = [name for name in modules if not name.startswith("_")]
    return [importlib.import_module(f"vpt.backbones.texts.{name}").Tower for name in modules]


def find_text_tower(model: nn.Module) -> type[TextTower]:
    """The family that fits the text tower of `model`; without one, that for whole texts."""
    return next((tower for tower in text_families() if tower.fits(model)), TextTower)


def _clip_tokens(context_length: int, texts: Sequence[str]) -> Tensor:
    return _clip_tokenizer(context_length)(texts)


@cache  # its vocabulary takes long to read, and to copy with each view of a backbone
def _clip_tokenizer(context_length: int) -> Any:
    return open_clip.SimpleTokenizer(context_length=context_length)
