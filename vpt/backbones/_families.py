"""Which adapter a model gets: every module of this package that has one is asked."""

import importlib
import pkgutil
from pathlib import Path

from torch import nn

from vpt.backbones.base import Backbone
from vpt.errors import InputError


def families() -> list[type[Backbone]]:
    """The adapter of every family."""
    names = (info.name for info in pkgutil.iter_modules([str(Path(__file__).parent)]))
    modules = [importlib.import_module(f"vpt.backbones.{name}") for name in names]
    return [module.Adapter for module in modules if hasattr(module, "Adapter")]


def find_family(model: nn.Module) -> type[Backbone]:
    """The adapter that fits `model`.

    Raises:
        InputError: there is none.
    """
    for family in families():
        if family.fits(model):
            return family
    known = "; ".join(family.family for family in families())
    raise InputError(f"{type(model).__name__} cannot be prompted: supported are {known}")
