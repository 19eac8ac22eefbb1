"""VPT-deep: every block has prompts of its own (Jia et al. 2022, eq. 5-6)."""

from vpt.methods._linear import LinearOptions, LinearReadout
from vpt.methods._tokens import TokenOptions, Tokens, check_layers


class Options(TokenOptions, LinearOptions):
    """Options of VPT-deep."""

    layers: list[int] | None = None  # blocks with prompts of their own; None: all


class VPTDeep(Tokens, LinearReadout):
    """`prompts` (len(layers), num_tokens, width) and a linear head."""

    Options = Options

    def prompted_layers(self) -> list[int]:
        """The blocks of the option `layers`."""
        return check_layers(self.options.layers, self.backbone.num_layers)
