"""Full fine-tuning: all weights of the image tower and a linear head."""

import copy
from collections.abc import Sequence

from vpt.backbones.base import Backbone
from vpt.config import Strict
from vpt.methods.base import Head, Method


class Prompted(Method):
    """Trains a copy of the backbone, so that others who share it see nothing of it.

    The copy stays in eval mode, as the frozen methods' backbones do: no stochastic depth.
    """

    def __init__(self, backbone: Backbone, class_names: Sequence[str], options: Strict) -> None:
        backbone.fingerprint()  # names the pretrained weights, so before they change
        super().__init__(copy.deepcopy(backbone), class_names, options)
        self.backbone.image_tower.requires_grad_(True)
        self.head = Head(backbone.feature_dim, len(class_names))
