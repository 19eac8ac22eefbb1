"""open_clip's CLIP, CustomTextCLIP and CoCa: an image tower of any family, and a text tower."""

from collections.abc import Sequence

import open_clip
import torch
from open_clip.model import CustomTextCLIP
from open_clip.timm_model import TimmModel
from torch import Tensor, nn

from vpt.backbones._families import find_family
from vpt.backbones.base import Backbone, LayerPrompts, Rows
from vpt.backbones.text import Tokenizer, find_text_tower
from vpt.data.transforms import Preprocess


class Adapter(Backbone):
    """Images go through the adapter of the image tower's own family, then into the joint space.

    Attributes:
        tower: the image tower's adapter.
        text: the text tower.
    """

    family = "open_clip CLIP, CustomTextCLIP, CoCa"

    def __init__(self, model: open_clip.CLIP | CustomTextCLIP | open_clip.CoCa) -> None:
        super().__init__(model)
        visual = self.model.visual
        self.text = find_text_tower(self.model)(self.model)
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
            parts = self.text.parts
            in_clip = parts is self.model
            self.feature_dim = parts.text_projection.shape[1] if in_clip else parts.output_dim

    @staticmethod
    def fits(model: nn.Module) -> bool:
        """Any model of open_clip with both towers; the image tower's family may refuse."""
        return isinstance(model, open_clip.CLIP | CustomTextCLIP | open_clip.CoCa)

    @property
    def image_tower(self) -> nn.Module:
        """The image tower and what projects its features."""
        return self.model.visual

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Texts → token ids (N, T); None where neither the model nor its name tells it."""
        return self.text.tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Tokenizer) -> None:
        self.text.tokenizer = tokenizer

    @property
    def checkpointing(self) -> bool:
        """Checkpointing of both towers; see `Backbone`."""
        return self.text.checkpointing

    @checkpointing.setter
    def checkpointing(self, checkpointing: bool) -> None:
        self.text.checkpointing = checkpointing

    @property
    def takes_sizes(self) -> bool:
        """The image tower's."""
        return self.tower.takes_sizes

    def set_size(self, height: int, width: int) -> None:
        """The image tower's; `identity` is of both towers as they are."""
        self.identity()
        self.tower.set_size(height, width)

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
        """Tokens that enter block `index` of the image tower."""
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

    def own_features(self, images: Tensor) -> Tensor:
        """Features (B, feature_dim) by the model's own forward."""
        return self.model.encode_image(images, normalize=False)

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

    def encode_texts(self, texts: Sequence[str], tokenizer: Tokenizer | None = None) -> Tensor:
        """Text features (len(texts), feature_dim), not normalised."""
        return self.text.encode(texts, tokenizer)

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
