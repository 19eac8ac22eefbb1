"""timm's plain vision transformer: ViT, DeiT, DeiT-III, DINOv2 (with registers), AugReg, CLIP."""

from functools import partial

import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from vpt.backbones._attention import attend, project, query_key_value
from vpt.backbones._known import is_exactly
from vpt.backbones.base import Backbone, LayerPrompts, Rows
from vpt.config import BackboneConfig
from vpt.data.transforms import Preprocess


class Adapter(Backbone):
    """Prompts enter after position embedding and `norm_pre`; the classifier head is left out.

    Where the model pools its tokens (MAE's fine-tuned form: their average; SigLIP: attention), it
    pools without the prompts; KMnP/vpt's variant for MAE averages them in. Where it does not pool
    (Virchow), the class token stands beside the patches' mean, as its card says.
    """

    family = "timm VisionTransformer"

    def __init__(self, model: VisionTransformer) -> None:
        super().__init__(model)
        self.model.reset_classifier(0)
        self.width = model.embed_dim
        self.num_layers = len(model.blocks)
        self.num_prefix_tokens = model.num_prefix_tokens
        self.patch_size = self.patch_embedding().feat_ratio(as_scalar=False)
        self.feature_dim = model.num_features * (1 if model.global_pool else 2)
        self.preprocess = Preprocess.from_timm(model)
        self.readout_tokens = 1 if model.global_pool == "token" else None
        self.config = hub_config(model)
        self.knows_rows = all(self.is_known(block) for block in model.blocks)
        self.require_known()

    @staticmethod
    def fits(model: nn.Module) -> bool:
        """Exactly timm's VisionTransformer: subclasses pool or embed in other ways."""
        return type(model) is VisionTransformer

    @property
    def takes_sizes(self) -> bool:
        """True unless a stem makes the patches (hybrids)."""
        return hasattr(self.model.patch_embed, "set_input_size")

    def set_size(self, height: int, width: int) -> None:
        """Resample the position embeddings; `preprocess` stays that of the pretrained size."""
        self.identity()  # of the weights as they are
        self.model.patch_embed.strict_img_size = False  # which compares with `preprocess`
        self.model.set_input_size((height, width))

    def patch_embedding(self) -> nn.Module:
        """The module that makes tokens of images; a hybrid's has a convolutional stem."""
        return self.model.patch_embed

    @staticmethod
    def is_known(block: nn.Module) -> bool:
        """True if `block` below computes this block's forward."""
        attn = getattr(block, "attn", None)
        known = is_exactly(block, Block) and is_exactly(attn, Attention)
        # an attention that gates its output is another forward
        return known and is_exactly(attn.qkv, nn.Linear) and getattr(attn, "gate", None) is None

    def embed(self, images: Tensor) -> Tensor:
        """Patch embedding, class and register tokens, position embedding, `norm_pre`."""
        if getattr(self.model.patch_embed, "strict_img_size", False):
            self.check_size(images)
        tokens = self.model._pos_embed(self.model.patch_embed(images))
        return self.model.norm_pre(self.model.patch_drop(tokens))

    def block(
        self,
        index: int,
        tokens: Tensor,
        prompts: LayerPrompts | None = None,
        queries: int | None = None,
    ) -> Tensor:
        """The block itself, or, with prompts or fewer queries, its forward spelled out."""
        block = self.model.blocks[index]
        if prompts is None and queries is None:
            return block(tokens)
        attn = block.attn
        query, key, value = query_key_value(partial(self.qkv, block), block.norm1(tokens), queries)
        x = attend(attn.q_norm(query), attn.k_norm(key), value, prompts)
        x = attn.proj_drop(attn.proj(attn.norm(x)))
        tokens = tokens[:, :queries] + block.drop_path1(block.ls1(x))
        return tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens))))

    def qkv(self, block: nn.Module, x: Tensor, parts: slice) -> tuple[Tensor, ...]:
        """The `parts` of (query, key, value) of normed tokens x (B, N, width)."""
        qkv = block.attn.qkv
        return project(x, qkv.weight, qkv.bias, block.attn.num_heads, parts)

    def rows(self, index: int, prompts: Tensor) -> Rows:
        """The prompts through the block's norm and its key and value projections."""
        block = self.model.blocks[index]
        prompts = block.norm1(prompts.view(-1, *prompts.shape[-2:]))
        key, value = self.qkv(block, prompts, slice(1, 3))
        return Rows(block.attn.k_norm(key), value)

    def own_features(self, images: Tensor) -> Tensor:
        """Features (B, feature_dim) by the model's own forward."""
        outputs = self.model(images)
        return outputs if self.model.global_pool else self._beside(outputs)

    def final_norm(self, tokens: Tensor) -> Tensor:
        """The model's `norm`."""
        return self.model.norm(tokens)

    def pool(self, tokens: Tensor) -> Tensor:
        """Final norm, then the model's own pooling."""
        tokens = self.final_norm(tokens)
        return self.model.forward_head(tokens) if self.model.global_pool else self._beside(tokens)

    def _beside(self, tokens: Tensor) -> Tensor:
        """Class token and the patches' mean (B, 2 · width)."""
        return torch.cat([tokens[:, 0], tokens[:, self.num_prefix_tokens :].mean(1)], -1)


def hub_config(model: nn.Module) -> BackboneConfig | None:
    """The hub's name of the model's weights, if timm made it; their fingerprint decides."""
    hub = getattr(model, "pretrained_cfg", None) or {}
    if not hub.get("architecture"):
        return None
    tag = f".{hub['tag']}" if hub.get("tag") else ""
    return BackboneConfig(name=f"timm:{hub['architecture']}{tag}")
