"""The image half of weights of the image tower that train."""

from collections.abc import Iterable, Sequence

from torch import nn

from vpt.backbones.base import Backbone
from vpt.backbones.clip import Tokenizer
from vpt.config import Strict
from vpt.methods.base import Method


class Weights(Method):
    """Image half that trains copies of weights, so that others who share the backbone see nothing.

    The backbone stays in eval mode, as the frozen methods' do: no stochastic depth.
    """

    def __init__(
        self,
        backbone: Backbone,
        class_names: Sequence[str],
        options: Strict,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        backbone.identity()  # of the pretrained weights, so before they change
        super().__init__(backbone, class_names, options, tokenizer)
        for parameter in self.trained():
            parameter.data = parameter.data.clone()
            parameter.requires_grad_(True)

    def trained(self) -> Iterable[nn.Parameter]:
        """The backbone's weights that train."""
        raise NotImplementedError
