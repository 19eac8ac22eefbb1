"""VPT-shallow: tokens before the first block, which flow through all (Jia et al. 2022, eq. 4)."""

from vpt.methods._linear import LinearOptions, LinearReadout
from vpt.methods._tokens import TokenOptions, Tokens


class Options(TokenOptions, LinearOptions):
    """Options of VPT-shallow."""


class VPTShallow(Tokens, LinearReadout):
    """One set of prompts, `prompts` (1, num_tokens, width), and a linear head."""

    Options = Options

    def prompted_layers(self) -> list[int]:
        """The first block only."""
        return [0]
