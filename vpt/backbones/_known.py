"""Modules whose forward is the one that this package spells out."""

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def is_exactly(module: nn.Module | None, *classes: type[nn.Module]) -> bool:
    """True if `module` is of one of `classes`, not a subclass, and runs as the class says.

    A hook, a parametrisation (LoRA, weight norm, pruning) or a replaced forward makes it another.
    """
    plain = type(module) in classes and "forward" not in vars(module)
    return plain and not is_parametrized(module) and not any(getattr(module, h) for h in _HOOKS)
