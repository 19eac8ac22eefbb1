"""open_clip's own vision transformer: the image tower of its CLIPs and CoCas."""

import open_clip
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from vpt.backbones._resblock import attend, is_plain, project
from vpt.backbones.base import Backbone, LayerPrompts, Rows
from vpt.data.transforms import Preprocess


class Adapter(Backbone):
    """Prompts enter after `ln_pre`; features are projected into the joint space.

    MaPLe's family puts them before `ln_pre`, a norm of each token alone: see `input_norm`.
    """

    family = "open_clip VisionTransformer"
    num_prefix_tokens = 1

    def __init__(self, model: VisionTransformer) -> None:
        super().__init__(model)
        self.width = model.conv1.out_channels
        self.num_layers = len(model.transformer.resblocks)
        self.patch_size = model.patch_size
        self.feature_dim = model.output_dim
        self.readout_tokens = 1 if model.attn_pool is None and model.pool_type == "tok" else None
        self.knows_rows = all(map(is_plain, model.transformer.resblocks))
        self.preprocess = Preprocess.from_open_clip(open_clip.get_model_preprocess_cfg(model))

    @staticmethod
    def fits(model: nn.Module) -> bool:
        """Exactly open_clip's VisionTransformer."""
        return type(model) is VisionTransformer

    def embed(self, images: Tensor) -> Tensor:
        """Patches, class token, position embedding, `ln_pre`."""
        return self.model._embeds(images)

    def block(
        self,
        index: int,
        tokens: Tensor,
        prompts: LayerPrompts | None = None,
        queries: int | None = None,
    ) -> Tensor:
        """The block itself, or, with prompts or fewer queries, its forward spelled out."""
        block = self.model.transformer.resblocks[index]
        if prompts is None and queries is None:
            return block(tokens)
        return attend(block, tokens, prompts, queries)

    def rows(self, index: int, prompts: Tensor) -> Rows:
        """The prompts through the block's norm and its key and value projections."""
        block = self.model.transformer.resblocks[index]
        return Rows(*project(block, prompts.view(-1, *prompts.shape[-2:]), slice(1, 3)))

    def own_features(self, images: Tensor) -> Tensor:
        """Features (B, feature_dim) by the model's own forward."""
        outputs = self.model(images)
        return outputs[0] if self.model.output_tokens else outputs

    def input_norm(self, prompts: Tensor) -> Tensor:
        """`ln_pre`."""
        return self.model.ln_pre(prompts)

    def final_norm(self, tokens: Tensor) -> Tensor:
        """`ln_post`; nothing where it stands after an attention pooling."""
        return tokens if self.model.attn_pool is not None else self.model.ln_post(tokens)

    def pool(self, tokens: Tensor) -> Tensor:
        """Final norm and the model's own pooling (CoCa: attention)."""
        return self.model._pool(tokens)[0]

    def project(self, pooled: Tensor) -> Tensor:
        """Into the joint space."""
        return pooled if self.model.proj is None else pooled @ self.model.proj
