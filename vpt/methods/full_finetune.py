"""Full fine-tuning: all weights of the image tower and a linear head."""

from collections.abc import Iterable

from torch import nn

from vpt.methods._linear import LinearOptions, LinearReadout
from vpt.methods._weights import Weights


class FullFinetune(Weights, LinearReadout):
    """Trains copies of all weights of the image tower."""

    Options = LinearOptions

    def trained(self) -> Iterable[nn.Parameter]:
        """All of the image tower."""
        return self.backbone.image_tower.parameters()
