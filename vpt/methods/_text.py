"""The read-out half of methods with a text tower: logits by class embeddings, a learned context."""

from collections.abc import Callable, Sequence
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vpt.backbones.clip import Adapter
from vpt.backbones.text import NamePosition, Tokenizer
from vpt.config import Strict
from vpt.errors import InputError
from vpt.methods.base import Method, require_clip

CHUNK = 1024  # texts whose activations are kept at once where they share a beginning
WHOLE = 256  # where they don't

Part = TypeVar("Part")


class ClassEmbeddings(Method):
    """Logits are scaled cosine similarities of an image's features and the class embeddings.

    Attributes:
        class_embeddings: (C, dim), or None where they change with what trains.
    """

    reads_text = True
    takes_names = True
    class_embeddings: Tensor | None

    def __init__(
        self,
        backbone: Adapter,
        class_names: Sequence[str],
        options: Strict,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        super().__init__(require_clip(backbone, self.name), class_names, options, tokenizer)

    def make_state(self) -> None:
        """Make a method's own parameters and buffers, once the half's class embeddings are made."""

    def text_features(self, features: Tensor | None = None) -> Tensor:
        """Class embeddings (C, dim), differentiable, not normalised.

        Args:
            features: (B, feature_dim), for a method that gives each image its own: (B, C, dim).
        """
        return self.class_embeddings

    def logits(self, features: Tensor) -> Tensor:
        """Scaled cosine similarities (B, C)."""
        return self.similarities(features, self.text_features(features))


class TextReadout(ClassEmbeddings):
    """The text of a class is `context name.`; the text tower stays frozen.

    Attributes:
        context: (num_tokens, text_width), from the words of the option `init`, then N(0, 0.02²);
            None where the text is fixed (`text_depth` is 0).
        text_prompts: (text_depth - 1, num_tokens, text_width), which overwrite the context at the
            input of the text tower's blocks from the second on, from N(0, 0.02²); None: nothing
            does.
        tokens: (C, T) ids of the text with placeholders; the class name always stands at the end
            in it, also for other positions.
        suffixes: the texts' tokens after what all of them begin with, CHUNK texts each; None where
            the text tower can't share a beginning.

    Raises:
        InputError: the text tower takes no learned context; a fixed text without words.
    """

    freezes_words: ClassVar[bool] = False  # words of `init` after `num_tokens`; False: all train

    def __init__(
        self,
        backbone: Adapter,
        class_names: Sequence[str],
        options: Strict,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        super().__init__(backbone, class_names, options, tokenizer)
        init = (options.init or "").replace("_", " ")
        names = [name.replace("_", " ") for name in class_names]
        self.context = self.text_prompts = self.suffixes = None
        embeddings = None
        if self.text_depth():
            self._start(init, names, tokenizer)
        elif not init:
            raise InputError("method.text_depth=0 fixes the text: give its words as method.init")
        else:
            with torch.no_grad():
                embeddings = backbone.encode_texts([f"{init} {n}." for n in names], tokenizer)
        self.register_buffer("class_embeddings", embeddings, persistent=False)
        self.make_state()

    def _start(self, init: str, names: Sequence[str], tokenizer: Tokenizer | None) -> None:
        """Start the prompts, the context from words as far as there are any, and lay out texts."""
        tower, count = self.backbone.text, self.options.num_tokens
        ids = tower.words(init, tokenizer)
        if init and not self.freezes_words:
            count = len(ids)
        with torch.no_grad():
            known = tower.embed(ids[:count])
        drawn = 0.02 * torch.randn(count - len(known), tower.width)
        self.context = nn.Parameter(torch.cat([known, drawn.to(known)]))
        depth = min(self.text_depth(), tower.num_layers)
        if depth > 1:
            self.text_prompts = nn.Parameter(0.02 * torch.randn(depth - 1, count, tower.width))
        words = " ".join([*init.split(), *[tower.placeholder] * len(drawn)])
        tokens = tower.tokenize([f"{words} {name}." for name in names], tokenizer)
        first = len(ids) + len(drawn)
        if len(tower.words(words, tokenizer)) != first:
            raise InputError(
                f"the tokenizer makes not one token of {tower.placeholder!r}: give the context's "
                "words as method.init"
            )
        # before a name stands a word, on which its tokens may depend
        lengths = [len(tower.words(f"{words} {name}", tokenizer)) - first for name in names]
        order = tower.order(count, lengths, tokens.shape[1], self.name_position())
        self.register_buffer("tokens", tokens, persistent=False)
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("places", tower.places(order, count), persistent=False)
        if tower.is_causal and tower.knows_rows:
            alike = max(count, len(ids))
            self.suffixes = nn.ModuleList(tower.pack(part, alike) for part in tokens.split(CHUNK))

    def text_depth(self) -> int:
        """Number of blocks of the text tower with a context of their own; 0: the text is fixed."""
        return 1

    def name_position(self) -> NamePosition:
        """Position of the class name among the context's vectors."""
        return "end"

    def text_features(self, features: Tensor | None = None) -> Tensor:
        """Class embeddings (C, dim), differentiable, not normalised."""
        if self.class_embeddings is not None:
            return self.class_embeddings
        return self.encode(self.context[None])[0]

    def encode(self, contexts: Tensor) -> Tensor:
        """Class embeddings (B, C, dim) with each of the contexts.

        Args:
            contexts: (B, num_tokens, text_width), or (B, C, num_tokens, text_width).
        """
        if not self.shares_prefix():
            return self._encode_whole(contexts)
        tower = self.backbone.text
        words = tower.embed(self.tokens[:1, : self.suffixes[0].prefix_length])
        prefixes = tower.put(words, contexts)
        return in_parts(
            lambda part: tower.run_shared(prefixes, part, self.text_prompts), list(self.suffixes)
        )

    def _encode_whole(self, contexts: Tensor) -> Tensor:
        columns = (
            torch.cat([self.prompt_embeddings(context) for context in contexts]),
            self.tokens.repeat(len(contexts), 1),
            self.places.repeat(len(contexts), 1),
        )
        chunk = len(columns[0]) if self.backbone.exact_tokens else WHOLE
        parts = list(zip(*(column.split(chunk) for column in columns), strict=True))

        def run(part: tuple[Tensor, Tensor, Tensor]) -> Tensor:
            embeddings, tokens, places = part
            return self.backbone.text.run(embeddings, tokens, self.text_prompts, places)

        return in_parts(run, parts).unflatten(0, (len(contexts), -1))

    def prompt_embeddings(self, context: Tensor) -> Tensor:
        """Text embeddings (C, T, text_width) with a context in place, before the positions.

        Args:
            context: (num_tokens, text_width), or (C, num_tokens, text_width), one for each class.
        """
        tower = self.backbone.text
        x = tower.put(tower.embed(self.tokens), context)
        return x.gather(1, self.order[..., None].expand_as(x))

    def shares_prefix(self) -> bool:
        """True if what all texts begin with runs once: the same context comes first in each."""
        first = self.context.dim() == 2 and self.name_position() == "end"
        return first and self.suffixes is not None and not self.backbone.exact_tokens

    def make_constants(self) -> None:
        """Keep the class embeddings: no text tower at test time."""
        super().make_constants()
        self.class_embeddings = self.text_features()


def in_parts(run: Callable[[Part], Tensor], parts: Sequence[Part]) -> Tensor:
    """Text features (…, C, dim) that `run` gives of each part, one after the other.

    Of several, each runs again in the backward pass, so that only one's activations are kept.
    """
    if len(parts) > 1 and torch.is_grad_enabled():
        features = [checkpoint(run, part, use_reentrant=False) for part in parts]
    else:
        features = [run(part) for part in parts]
    return torch.cat(features, -2)


@torch.no_grad()
def embed_templates(
    backbone: Adapter,
    class_names: Sequence[str],
    templates: Sequence[str],
    tokenizer: Tokenizer | None = None,
) -> Tensor:
    """Text features (C, templates, dim) of each class in each template, not normalised."""
    names = [name.replace("_", " ") for name in class_names]
    texts = [template.replace("{}", name) for name in names for template in templates]
    return backbone.encode_texts(texts, tokenizer).unflatten(0, (len(names), -1))


def embed_classes(
    backbone: Adapter,
    class_names: Sequence[str],
    templates: Sequence[str],
    tokenizer: Tokenizer | None = None,
) -> Tensor:
    """Class embeddings (C, dim): the mean over templates of normalised text features."""
    features = embed_templates(backbone, class_names, templates, tokenizer)
    return F.normalize(features, dim=-1).mean(1)
