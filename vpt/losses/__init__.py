"""One file a training loss, found by its file name."""

from vpt import modules
from vpt.errors import InputError
from vpt.losses.base import Loss
from vpt.targets import Target

__all__ = ["Loss", "check", "find", "names"]


def names() -> list[str]:
    """Every loss: the modules of this package that define one."""
    return modules.names(__name__)


def find(loss: str | type[Loss] | Loss) -> type[Loss] | Loss:
    """The class of the loss called `loss`; a class or an instance is itself.

    Raises:
        InputError: there is none; says the nearest name.
    """
    if not isinstance(loss, str):
        return loss
    try:
        return modules.find(__name__, Loss, loss)
    except InputError as error:
        raise InputError(f"train.loss={loss}: {error}") from None


def check(loss: type[Loss] | Loss, target: Target) -> None:
    """Refuses a loss that does not fit `target`.

    Raises:
        InputError: it does not; says which do.
    """
    if not loss.fits(target):
        fitting = [name for name in names() if find(name).fits(target)]
        raise InputError(
            f"train.loss={loss.name}: {target.name} data has {' or '.join(fitting)} only: drop it"
        )
