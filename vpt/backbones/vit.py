"""timm's plain vision transformer: ViT, DeiT, DeiT-III, DINOv2 (with registers), AugReg, CLIP."""

import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from vpt.backbones.base import Backbone, Rows
from vpt.config import BackboneConfig
from vpt.data.transforms import Preprocess


class Adapter(Backbone):
    """Prompts enter after position embedding and `norm_pre`; the classifier head is left out."""

    family = "timm VisionTransformer"

    def __init__(self, model: VisionTransformer) -> None:
        super().__init__(model)
        self.model.reset_classifier(0)
        self.width = model.embed_dim
        self.num_layers = len(model.blocks)
        self.num_prefix_tokens = model.num_prefix_tokens
        self.patch_size = model.patch_embed.patch_size
        self.feature_dim = model.num_features
        self.preprocess = Preprocess.from_timm(model)
        self.readout_tokens = 1 if model.global_pool == "token" else None
        self.config = _hub_config(model)
        self.knows_rows = all(_is_plain(block) for block in model.blocks)

    @staticmethod
    def fits(model: nn.Module) -> bool:
        """Exactly timm's VisionTransformer: subclasses pool or embed in other ways."""
        return type(model) is VisionTransformer

    def embed(self, images: Tensor) -> Tensor:
        """Patch embedding, class and register tokens, position embedding, `norm_pre`."""
        tokens = self.model._pos_embed(self.model.patch_embed(images))
        return self.model.norm_pre(self.model.patch_drop(tokens))

    def block(
        self, index: int, tokens: Tensor, rows: Rows | None = None, queries: int | None = None
    ) -> Tensor:
        """The block itself, or, with rows or fewer queries, its forward spelled out."""
        block = self.model.blocks[index]
        if rows is None and queries is None:
            return block(tokens)
        attn, x = block.attn, block.norm1(tokens)
        if queries is None:
            query, key, value = _project(attn, x, slice(0, 3))
        else:
            (query,) = _project(attn, x[:, :queries], slice(0, 1))
            key, value = _project(attn, x, slice(1, 3))
        query, key = attn.q_norm(query), attn.k_norm(key)
        if rows is not None:
            key, value = (
                torch.cat([own, extra.to(own.dtype).expand(len(own), -1, -1, -1)], 2)
                for own, extra in zip((key, value), rows, strict=True)
            )
        x = F.scaled_dot_product_attention(query, key, value, scale=attn.scale)
        x = attn.proj_drop(attn.proj(attn.norm(x.transpose(1, 2).flatten(2))))
        tokens = tokens[:, :queries] + block.drop_path1(block.ls1(x))
        return tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens))))

    def rows(self, index: int, prompts: Tensor) -> Rows:
        """The prompts through the block's norm and its key and value projections."""
        block = self.model.blocks[index]
        prompts = prompts.view(-1, *prompts.shape[-2:])
        key, value = _project(block.attn, block.norm1(prompts), slice(1, 3))
        return torch.stack([block.attn.k_norm(key), value])

    def finish(self, tokens: Tensor) -> Tensor:
        """Final norm, then the model's own pooling."""
        return self.model.forward_head(self.model.norm(tokens))


def _hub_config(model: VisionTransformer) -> BackboneConfig | None:
    """The hub's name of the model's weights, if timm made it; their fingerprint decides."""
    hub = getattr(model, "pretrained_cfg", None) or {}
    if not hub.get("architecture"):
        return None
    tag = f".{hub['tag']}" if hub.get("tag") else ""
    return BackboneConfig(name=f"timm:{hub['architecture']}{tag}")


def _is_plain(block: nn.Module) -> bool:
    # an attention that gates its output is another forward than the one spelled above
    attn = getattr(block, "attn", None)
    return type(block) is Block and type(attn) is Attention and getattr(attn, "gate", None) is None


def _project(attn: Attention, x: Tensor, parts: slice) -> tuple[Tensor, ...]:
    """Those `parts` of (query, key, value) of x (B, N, width), each (B, heads, N, head_dim)."""
    weight = attn.qkv.weight.unflatten(0, (3, -1))[parts].flatten(0, 1)
    bias = attn.qkv.bias
    if bias is not None:
        bias = bias.unflatten(0, (3, -1))[parts].flatten()
    x = F.linear(x, weight, bias)
    return x.unflatten(-1, (-1, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
