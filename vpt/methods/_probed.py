"""A linear head on features that also train: it starts from the linear probe."""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from vpt.backbones.base import Backbone
from vpt.config import Strict
from vpt.methods.base import Batch, Head, Method
from vpt.methods.linear_probe import solve_head


class ProbedOptions(Strict):
    """Options of all methods with such a head."""

    # probe: `fit` starts from the linear probe of the features before the first step; fixed: and
    # leaves the head there; random: as most papers do
    head: Literal["probe", "fixed", "random"] = "probe"


class ProbedMethod(Method):
    """Trains something of the image tower, and `head`: Linear(feature_dim → C), unless fixed."""

    Options = ProbedOptions

    def __init__(
        self, backbone: Backbone, class_names: Sequence[str], options: ProbedOptions
    ) -> None:
        super().__init__(backbone, class_names, options)
        self.head = Head(backbone.feature_dim, len(class_names))
        self.head.requires_grad_(options.head != "fixed")

    def before_epoch(
        self, epoch: int, epochs: int, batches: Iterable[Batch], features: Callable[[], Batch]
    ) -> None:
        """Before the first epoch, solve the head, unless the option `head` is random."""
        if epoch == 0 and self.options.head != "random":
            solve_head(self.head, *features())
