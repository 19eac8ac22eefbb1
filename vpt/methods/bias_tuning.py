"""Bias tuning: the image tower's biases and a linear head (BitFit, Zaken et al. 2022)."""

from collections.abc import Iterable

from torch import nn

from vpt.methods._linear import LinearOptions, LinearReadout
from vpt.methods._weights import Weights


class BiasTuning(Weights, LinearReadout):
    """Trains copies of the biases; all other weights stay shared."""

    Options = LinearOptions

    def trained(self) -> Iterable[nn.Parameter]:
        """Every parameter called a bias, of norms too."""
        named = self.backbone.image_tower.named_parameters()
        return [parameter for name, parameter in named if name.endswith("bias")]
