"""VPT-deep: every block has prompts of its own (Jia et al. 2022, eq. 5-6)."""

from vpt.methods._tokens import TokenMethod, TokenOptions, check_layers


class Options(TokenOptions):
    """Options of VPT-deep."""

    layers: list[int] | None = None  # blocks with prompts of their own; None: all


class Prompted(TokenMethod):
    """`prompts` (len(layers), num_tokens, width) and a linear head."""

    Options = Options

    def prompted_layers(self) -> list[int]:
        """The blocks of the option `layers`."""
        return check_layers(self.options.layers, self.backbone.num_layers)
