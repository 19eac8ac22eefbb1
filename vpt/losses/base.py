"""A loss is made for a target and its training images, and then compares logits with labels."""

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor

from vpt.targets import Target


class Loss:
    """Base of all losses. A loss is one file in this package, or a class of one's own.

    Attributes:
        name: the file's name; of a class outside this package, the class's.
        target: the kind of the labels.
        log_weights: (C,), the offset of each class's logit at the optimum, by which linear heads
            that are solved follow the loss; None: alike.
    """

    name: ClassVar[str]
    log_weights: Tensor | None = None

    def __init_subclass__(cls) -> None:
        package, _, module = cls.__module__.rpartition(".")
        cls.name = module if package == __package__ else cls.__name__

    def __init__(self, target: Target, counts: Callable[[], Tensor] | None = None) -> None:
        """`counts` reads the labels of all training images: their number in each class (C,)."""
        self.target = target

    @classmethod
    def fits(cls, target: Target) -> bool:
        """True if it can train on labels of this kind."""
        return True

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean loss of logits (B, C) and labels, a scalar."""
        raise NotImplementedError
