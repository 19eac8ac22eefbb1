"""timm's Swin transformers, v1 and v2: attention in windows, stages of growing width."""

import math

import torch
from timm.models.swin_transformer import (
    SwinTransformer,
    SwinTransformerBlock,
    WindowAttention,
    window_partition,
    window_reverse,
)
from timm.models.swin_transformer_v2 import SwinTransformerV2, SwinTransformerV2Block
from timm.models.swin_transformer_v2 import WindowAttention as WindowAttentionV2
from torch import Tensor, nn
from torch.nn import functional as F

from vpt.backbones._attention import attend, project
from vpt.backbones._known import is_exactly
from vpt.backbones.base import Backbone, LayerPrompts, Rows
from vpt.backbones.vit import hub_config
from vpt.data.transforms import Preprocess


class Adapter(Backbone):
    """Every window sees all prompts; what windows make of a prompt is averaged over them.

    Patch merging takes a prompt as a square of four equal patches (both: KMnP/vpt,
    src/models/vit_prompt/swin_transformer.py, which also averages prompts into the features; these
    are of patches only). Prompts have no position: their bias is zero, and no mask hides them.
    Blocks use the leading columns of prompts that are wider than they are.
    """

    family = "timm SwinTransformer, SwinTransformerV2"
    appends_prompts = True
    runs_blocks = False
    num_prefix_tokens = 0

    def __init__(self, model: SwinTransformer | SwinTransformerV2) -> None:
        super().__init__(model)
        self.model.reset_classifier(0)
        self.is_v2 = isinstance(model, SwinTransformerV2)
        self.num_layers = len(self.blocks)
        self.width = self.widths[0]
        self.patch_size = model.patch_embed.patch_size
        self.feature_dim = model.num_features
        self.preprocess = Preprocess.from_timm(model)
        self.config = hub_config(model)
        self.knows_rows = all(map(_is_known, self.blocks))
        self.require_known()

    @staticmethod
    def fits(model: nn.Module) -> bool:
        """Exactly timm's SwinTransformer or SwinTransformerV2."""
        return type(model) in (SwinTransformer, SwinTransformerV2)

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks of all stages."""
        return [block for stage in self.model.layers for block in stage.blocks]

    @property
    def widths(self) -> list[int]:
        """Width of the tokens that enter each block."""
        return [block.dim for block in self.blocks]

    def grid(self, index: int, images: Tensor) -> tuple[int, int]:
        """Rows and columns of patches in block `index`."""
        return tuple(self.blocks[index].input_resolution)

    def embed(self, images: Tensor) -> Tensor:
        """Patch embedding."""
        self.check_size(images)
        return self.model.patch_embed(images).flatten(1, 2)

    def enter(self, index: int, tokens: Tensor, num_prompts: int) -> Tensor:
        """Patch merging before the first block of each stage but the first."""
        block = self.blocks[index]
        stage = next((stage for stage in self.model.layers if stage.blocks[0] is block), None)
        if index == 0 or stage is None:
            return tokens
        patches, prompts = tokens.split([tokens.shape[1] - num_prompts, num_prompts], 1)
        patches = stage.downsample(patches.unflatten(1, stage.input_resolution)).flatten(1, 2)
        squares = prompts.flatten(0, 1)[:, None, None].expand(-1, 2, 2, -1)
        prompts = stage.downsample(squares).unflatten(0, prompts.shape[:2])[:, :, 0, 0]
        return torch.cat([patches, prompts], 1)

    def block(
        self,
        index: int,
        tokens: Tensor,
        prompts: LayerPrompts | None = None,
        queries: int | None = None,
    ) -> Tensor:
        """The block itself, or, with prompts, its forward spelled out."""
        block = self.blocks[index]
        height, width = block.input_resolution
        if prompts is None and tokens.shape[1] == height * width:
            return block(tokens.unflatten(1, (height, width))).flatten(1, 2)
        if self.is_v2:
            attended = block.norm1(self._attention(block, tokens, prompts))
            tokens = (tokens + block.drop_path1(attended))[:, :queries]
            return tokens + block.drop_path2(block.norm2(block.mlp(tokens)))
        attended = self._attention(block, block.norm1(tokens), prompts)
        tokens = (tokens + block.drop_path1(attended))[:, :queries]
        return tokens + block.drop_path2(block.mlp(block.norm2(tokens)))

    def rows(self, index: int, prompts: Tensor) -> Rows:
        """The prompts through the block's key and value projections, in v1 after its norm."""
        block = self.blocks[index]
        prompts = prompts.view(-1, *prompts.shape[-2:])
        key, value = _project(
            block.attn, prompts if self.is_v2 else block.norm1(prompts), slice(1, 3)
        )
        return Rows(F.normalize(key, dim=-1) if self.is_v2 else key, value)

    def own_features(self, images: Tensor) -> Tensor:
        """Features (B, feature_dim) by the model's own forward."""
        return self.model(images)

    def final_norm(self, tokens: Tensor) -> Tensor:
        """The model's `norm`."""
        return self.model.norm(tokens)

    def pool(self, tokens: Tensor) -> Tensor:
        """Final norm, then the mean over patches."""
        tokens = tokens.unflatten(1, self.blocks[-1].input_resolution)
        return self.model.forward_head(self.final_norm(tokens))

    def _attention(self, block: nn.Module, tokens: Tensor, prompts: LayerPrompts | None) -> Tensor:
        """Attention of patches and prompts (B, N + P, width) in shifted windows."""
        (height, width), window = block.input_resolution, block.window_size
        patches, flowing = tokens[:, : height * width], tokens[:, height * width :]
        shift = tuple(-step for step in block.shift_size)
        x = torch.roll(patches.unflatten(1, (height, width)), shift, dims=(1, 2))
        x = F.pad(x, (0, 0, 0, -width % window[1], 0, -height % window[0]))
        padded = x.shape[1:3]
        mask = block.get_attn_mask(x) if block.dynamic_mask else block.attn_mask
        x = window_partition(x, window).flatten(1, 2)  # all windows of an image, then the next's
        batch, count = len(tokens), len(x) // len(tokens)
        x = torch.cat([x, flowing.repeat_interleave(count, 0)], 1)
        prompts = prompts and prompts.repeat(count)

        attn = block.attn
        query, key, value = _project(attn, x, slice(0, 3))
        if self.is_v2:  # cosine attention (Liu et al. 2022, eq. 2)
            query = F.normalize(query, dim=-1) * attn.logit_scale.clamp(max=math.log(100)).exp()
            key = F.normalize(key, dim=-1)
        bias = _position_bias_v2(attn) if self.is_v2 else attn._get_rel_pos_bias()
        if mask is not None:
            bias = bias + mask[:, None].repeat(batch, 1, 1, 1)
        x = attend(query, key, value, prompts, bias, scale=1.0 if self.is_v2 else None)
        x = attn.proj_drop(attn.proj(x))

        area = math.prod(window)
        patches = window_reverse(x[:, :area].unflatten(1, window), window, *padded)
        patches = torch.roll(patches[:, :height, :width], block.shift_size, dims=(1, 2))
        flowing = x[:, area:].unflatten(0, (batch, count)).mean(1)
        return torch.cat([patches.flatten(1, 2), flowing], 1)


def _is_known(block: nn.Module) -> bool:
    kinds = (SwinTransformerBlock, WindowAttention), (SwinTransformerV2Block, WindowAttentionV2)
    known = any(is_exactly(block, one) and is_exactly(block.attn, two) for one, two in kinds)
    return known and is_exactly(block.attn.qkv, nn.Linear)


def _project(attn: nn.Module, x: Tensor, parts: slice) -> tuple[Tensor, ...]:
    bias = attn.qkv.bias
    if getattr(attn, "q_bias", None) is not None:
        bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
    return project(x, attn.qkv.weight, bias, attn.num_heads, parts)


def _position_bias_v2(attn: nn.Module) -> Tensor:
    """Bias (1, heads, N, N) of an MLP on log-spaced offsets (Liu et al. 2022, 3.3)."""
    table = attn.cpb_mlp(attn.relative_coords_table).flatten(0, 2)
    return 16 * table[attn.relative_position_index].sigmoid().permute(2, 0, 1)[None]
