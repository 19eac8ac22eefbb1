"""VPT-shallow: tokens before the first block, which flow through all (Jia et al. 2022, eq. 4)."""

from vpt.methods._tokens import TokenMethod


class Prompted(TokenMethod):
    """One set of prompts, `prompts` (1, num_tokens, width), and a linear head."""

    def prompted_layers(self) -> list[int]:
        """The first block only."""
        return [0]
