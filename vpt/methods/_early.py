"""The image half of MaPLe's family: prompts before the image tower's own input norm."""

from torch import Tensor

from vpt.backbones.base import Prompts
from vpt.methods._tokens import ImagePrompts


class EarlyPrompts(ImagePrompts):
    """Prompts after the last patch, in the first blocks (Khattak et al. 2023, eq. 5).

    Attributes:
        prompts: (image_depth, num_image_tokens, width), of which the first pass the tower's input
            norm with the patches. Where blocks differ in width (Swin), that of the widest.
    """

    prompts: Tensor

    def image_width(self, depth: int) -> int:
        """Width of the prompts of the first `depth` blocks."""
        return max(self.backbone.widths[:depth])

    def learned_prompts(self, count: int) -> Prompts:
        """Prompts as they are now."""
        first, *deep = self.prompts
        first = first[..., : self.backbone.widths[0]]
        sets = [self.backbone.input_norm(first), *deep]
        return Prompts(sets, range(len(sets)), "append")
