"""Frozen random prompts: VPT-deep whose prompts never train, the baseline to show beside it.

Trained prompts differ from these by little on some sets (arXiv 2407.01003, table 3).
"""

from collections.abc import Sequence
from typing import Literal

from vpt.backbones.base import Backbone
from vpt.backbones.clip import Tokenizer
from vpt.methods import vpt_deep


class Options(vpt_deep.Options):
    """Options of frozen random prompts."""

    gated: Literal[False] = False  # gates at 0 would leave no prompts
    head: Literal["probe", "random"] = "probe"  # nothing else trains


class RandomPrompts(vpt_deep.VPTDeep):
    """`prompts` as VPT-deep draws them, frozen; only the head trains."""

    Options = Options
    frozen_features = True

    def __init__(
        self,
        backbone: Backbone,
        class_names: Sequence[str],
        options: Options,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        # dropout is noise against overfitting prompts; these do not fit anything
        options = options.model_copy(update={"dropout": 0.0})
        super().__init__(backbone, class_names, options, tokenizer)
        self.prompts.requires_grad_(False)
        if self.projection is not None:
            self.projection.requires_grad_(False)
