"""Full fine-tuning: all weights of the image tower and a linear head."""

from collections.abc import Iterable, Sequence

from torch import nn

from vpt.backbones.base import Backbone
from vpt.methods._probed import ProbedMethod, ProbedOptions


class Prompted(ProbedMethod):
    """Trains copies of backbone weights, so that others who share it see nothing of it.

    The backbone stays in eval mode, as the frozen methods' do: no stochastic depth.
    """

    def __init__(
        self, backbone: Backbone, class_names: Sequence[str], options: ProbedOptions
    ) -> None:
        backbone.identity()  # of the pretrained weights, so before they change
        super().__init__(backbone, class_names, options)
        for parameter in self.trained():
            parameter.data = parameter.data.clone()
            parameter.requires_grad_(True)

    def trained(self) -> Iterable[nn.Parameter]:
        """The backbone's weights that train."""
        return self.backbone.image_tower.parameters()
