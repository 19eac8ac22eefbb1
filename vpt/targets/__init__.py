"""One file a kind of label, found by its file name: all that knows the labels' shape."""

from vpt import modules
from vpt.errors import InputError
from vpt.targets.base import Labels, Target

__all__ = ["Target", "find", "names", "of"]


def names() -> list[str]:
    """Every target: the modules of this package that define one."""
    return modules.names(__name__)


def find(target: str | type[Target] | Target) -> Target:
    """The target called `target`, or of that class; one that is made already is itself.

    Raises:
        InputError: no target of that name; says the nearest.
    """
    if isinstance(target, str):
        target = modules.find(__name__, Target, target)
    return target() if isinstance(target, type) else target


def of(labels: Labels) -> Target:
    """The target that `labels` fit.

    Raises:
        InputError: there is none.
    """
    for target in map(find, names()):
        if target.fits(labels):
            return target
    raise InputError(
        f"labels of shape {tuple(labels.shape)} fit no target of {', '.join(names())}: give a "
        "class number an image, or a row of 0 and 1"
    )
