"""timm's plain vision transformer: ViT, DeiT, DeiT-III, DINOv2 (with registers), AugReg, CLIP."""

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vpt.backbones.base import Backbone
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

    @staticmethod
    def fits(model: nn.Module) -> bool:
        """Exactly timm's VisionTransformer: subclasses pool or embed in other ways."""
        return type(model) is VisionTransformer

    def embed(self, images: Tensor) -> Tensor:
        """Patch embedding, class and register tokens, position embedding, `norm_pre`."""
        tokens = self.model._pos_embed(self.model.patch_embed(images))
        return self.model.norm_pre(self.model.patch_drop(tokens))

    def block(self, index: int, tokens: Tensor) -> Tensor:
        """The block itself: keeps q/k norm, LayerScale and fused attention."""
        return self.model.blocks[index](tokens)

    def finish(self, tokens: Tensor) -> Tensor:
        """Final norm, then the model's own pooling."""
        return self.model.forward_head(self.model.norm(tokens))
