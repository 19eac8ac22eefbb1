"""open_clip's CLIP, CustomTextCLIP and CoCa: an image tower of any family, and a text tower."""

from collections.abc import Callable, Sequence
from functools import cache, partial

import open_clip
import torch
from open_clip.model import CustomTextCLIP
from open_clip.timm_model import TimmModel
from torch import Tensor, nn

from vpt.backbones._families import find_family
from vpt.backbones._resblock import is_plain
from vpt.backbones.base import Backbone, LayerPrompts, Rows
from vpt.data.transforms import Preprocess
from vpt.errors import InputError

Tokenizer = Callable[[Sequence[str]], Tensor]
CLIP_VOCABULARY = 49408


class Adapter(Backbone):
    """Images go through the adapter of the image tower's own family, then into the joint space.

    Attributes:
        tower: the image tower's adapter.
        tokenizer: texts → token ids (N, T); None where neither the model nor its name tells it.
    """

    family = "open_clip CLIP, CustomTextCLIP, CoCa"

    def __init__(self, model: open_clip.CLIP | CustomTextCLIP | open_clip.CoCa) -> None:
        super().__init__(model)
        visual, text = self.model.visual, self.text_tower
        trunk = visual.trunk if isinstance(visual, TimmModel) else visual
        self.tower = find_family(trunk)(trunk)
        self.tower.model = trunk  # the tower's own copy has lost its head, here a projection
        self.width = self.tower.width
        self.num_layers = self.tower.num_layers
        self.num_prefix_tokens = self.tower.num_prefix_tokens
        self.patch_size = self.tower.patch_size
        self.readout_tokens = self.tower.readout_tokens
        self.knows_rows = self.tower.knows_rows
        self.appends_prompts = self.tower.appends_prompts
        self.preprocess = Preprocess.from_open_clip(open_clip.get_model_preprocess_cfg(model))
        self.feature_dim = self.tower.feature_dim
        if isinstance(visual, TimmModel):  # whose head may project; texts have the same space
            in_clip = text is self.model
            self.feature_dim = text.text_projection.shape[1] if in_clip else text.output_dim
        self.knows_text_rows = self.reads_eot and all(map(is_plain, text.transformer.resblocks))
        is_clips = text.vocab_size == CLIP_VOCABULARY
        self.tokenizer = partial(_clip_tokens, text.context_length) if is_clips else None

    @staticmethod
    def fits(model: nn.Module) -> bool:
        """Any model of open_clip with both towers; the image tower's family may refuse."""
        return isinstance(model, open_clip.CLIP | CustomTextCLIP | open_clip.CoCa)

    @property
    def image_tower(self) -> nn.Module:
        """The image tower and what projects its features."""
        return self.model.visual

    @property
    def text_tower(self) -> nn.Module:
        """The module that holds the text tower's parts: CLIP itself, or its own module."""
        return self.model if isinstance(self.model, open_clip.CLIP) else self.model.text

    @property
    def reads_eot(self) -> bool:
        """Whether the text tower is causal and read out at EOT, as CLIP's."""
        text = self.text_tower
        pool = getattr(text, "text_pool_type" if text is self.model else "pool_type", None)
        causal = pool == "argmax" and text.attn_mask is not None
        return causal and getattr(text, "cls_emb", None) is None

    @property
    def text_width(self) -> int:
        """Width of the text tower's embeddings.

        Raises:
            InputError: a text tower that takes no learned context.
        """
        self._require_eot()
        return self.text_tower.token_embedding.embedding_dim

    @property
    def widths(self) -> list[int]:
        """Width of the tokens in each block."""
        return self.tower.widths

    def grid(self, index: int, images: Tensor) -> tuple[int, int]:
        """Rows and columns of patches in block `index`."""
        return self.tower.grid(index, images)

    def embed(self, images: Tensor) -> Tensor:
        """Images to the tokens that enter block 0 of the image tower."""
        return self.tower.embed(images)

    def enter(self, index: int, tokens: Tensor, num_prompts: int) -> Tensor:
        """What stands before block `index` of the image tower."""
        return self.tower.enter(index, tokens, num_prompts)

    def block(
        self,
        index: int,
        tokens: Tensor,
        prompts: LayerPrompts | None = None,
        queries: int | None = None,
    ) -> Tensor:
        """One block of the image tower."""
        return self.tower.block(index, tokens, prompts, queries)

    def rows(self, index: int, prompts: Tensor) -> Rows:
        """Keys and values of prompts in a block of the image tower."""
        return self.tower.rows(index, prompts)

    def input_norm(self, prompts: Tensor) -> Tensor:
        """The image tower's."""
        return self.tower.input_norm(prompts)

    def final_norm(self, tokens: Tensor) -> Tensor:
        """The image tower's."""
        return self.tower.final_norm(tokens)

    def pool(self, tokens: Tensor) -> Tensor:
        """The image tower's."""
        return self.tower.pool(tokens)

    def project(self, pooled: Tensor) -> Tensor:
        """Into the joint space."""
        visual = self.model.visual
        is_timm = isinstance(visual, TimmModel)
        return visual.head(pooled) if is_timm else self.tower.project(pooled)

    def tokenize(self, texts: Sequence[str], tokenizer: Tokenizer | None = None) -> Tensor:
        """Token ids (len(texts), T), cut after the longest text: what follows EOT can't be seen.

        Raises:
            InputError: a text that is longer than the text tower's context; a text tower that is
                not read at EOT.
        """
        self._require_eot()
        tokens = self._ids(texts, tokenizer)
        # a tokenizer that truncates leaves no room for its padding, so the last column tells
        too_long = tokens.ne(0).all(1).nonzero()
        if len(too_long):
            text = texts[int(too_long[0])]
            raise InputError(
                f"{text!r} does not fit the text tower's {tokens.shape[1]} tokens: shorten it"
            )
        return tokens[:, : int(tokens.argmax(1).max()) + 1]

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """Token ids (C, T) to embeddings (C, T, text_width), before the position embedding."""
        return self.text_tower.token_embedding(tokens.to(self.device))

    def encode_embeddings(self, embeddings: Tensor, eot: Tensor) -> Tensor:
        """Text features (C, feature_dim), not normalised, read out at positions `eot` (C,)."""
        model, length = self.text_tower, embeddings.shape[1]
        x = embeddings + model.positional_embedding[:length]
        x = model.transformer(x, attn_mask=model.attn_mask[:length, :length])
        return self.finish_text(x[torch.arange(len(x), device=x.device), eot])

    def finish_text(self, tokens: Tensor) -> Tensor:
        """EOT tokens (C, text_width) after the last block to text features (C, feature_dim)."""
        text = self.text_tower
        x, projection = text.ln_final(tokens), text.text_projection
        return projection(x) if isinstance(projection, nn.Linear) else x @ projection

    def encode_texts(self, texts: Sequence[str], tokenizer: Tokenizer | None = None) -> Tensor:
        """Text features (len(texts), feature_dim), not normalised."""
        if not self.reads_eot:
            tokens = self._ids(texts, tokenizer).to(self.device)
            return self.model.encode_text(tokens, normalize=False)
        tokens = self.tokenize(texts, tokenizer)
        return self.encode_embeddings(self.embed_tokens(tokens), tokens.argmax(1).to(self.device))

    def _ids(self, texts: Sequence[str], tokenizer: Tokenizer | None) -> Tensor:
        tokenizer = tokenizer or self.tokenizer
        if tokenizer is None:
            raise InputError(
                f"{type(self.model).__name__} with {self.text_tower.vocab_size} token ids has "
                "another tokenizer than CLIP: give tokenizer=open_clip.get_tokenizer(NAME)"
            )
        return tokenizer(list(texts))

    def _require_eot(self) -> None:
        if not self.reads_eot:
            raise InputError(
                f"{type(self.text_tower).__name__} takes no learned context: supported are causal "
                "text towers read at EOT, as CLIP's: take zero_shot, or vpt_deep on its images"
            )

    def similarity(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Logits (B, C): scaled cosine similarities of (B, dim) and (C, dim) or (B, C, dim).

        In the weights' own precision: bf16 steps of a logit near 25 are 0.125, and classes tie.
        """
        scale, bias = self.model.logit_scale.exp(), self.model.logit_bias
        with torch.autocast(scale.device.type, enabled=False):
            images = nn.functional.normalize(image_features.to(scale.dtype), dim=-1)
            texts = nn.functional.normalize(text_features.to(scale.dtype), dim=-1)
            logits = (scale * images[:, None] @ texts.mT)[:, 0]
        return logits if bias is None else logits + bias


def _clip_tokens(context_length: int, texts: Sequence[str]) -> Tensor:
    return _clip_tokenizer(context_length)(texts)


@cache  # its vocabulary takes long to read, and to copy with each view of a backbone
def _clip_tokenizer(context_length: int) -> open_clip.SimpleTokenizer:
    return open_clip.SimpleTokenizer(context_length=context_length)
