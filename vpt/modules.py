"""Classes found by the name of the file that defines them."""

import importlib
import inspect
import pkgutil
from typing import TypeVar

from vpt.errors import InputError, nearest

Base = TypeVar("Base")


def names(package: str) -> list[str]:
    """Modules of `package` that define a class of its kind: all but `base` and private ones."""
    path = importlib.import_module(package).__path__
    modules = (info.name for info in pkgutil.iter_modules(path))
    return sorted(name for name in modules if name != "base" and not name.startswith("_"))


def find(package: str, base: type[Base], name: str) -> type[Base]:
    """The one subclass of `base` that the module `name` of `package` defines.

    Raises:
        InputError: no such module; says the nearest name.
    """
    if name not in names(package):
        kind = base.__name__.lower()
        raise InputError(f"no {kind} {name!r}{nearest(name, names(package))}")
    module = importlib.import_module(f"{package}.{name}")
    (found,) = (
        cls
        for _, cls in inspect.getmembers(module, inspect.isclass)
        if issubclass(cls, base) and cls.__module__ == module.__name__
    )
    return found
