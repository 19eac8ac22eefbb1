"""Finds the adapter of a model by asking every module of this package that has one."""

import importlib
import pkgutil
from pathlib import Path

import torch
from timm.models._features import FeatureDictNet, FeatureGetterNet, FeatureHookNet
from torch import nn

from vpt.backbones._wrapped import is_of
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
        InputError: there is none; says what to give instead.
    """
    for family in families():
        if family.fits(model):
            return family
    raise InputError(f"{type(model).__name__} cannot be prompted: {_mend(model)}")


def _mend(model: nn.Module) -> str:
    if isinstance(model, FeatureDictNet | FeatureGetterNet | FeatureHookNet):
        return "make it without features_only=True; `feature_maps` gives its maps"
    if isinstance(model, torch.jit.ScriptModule | torch.fx.GraphModule):
        return "it is compiled: give the model that it was made of"
    inside: dict[str, str] = {}
    for path, module in model.named_modules():
        if path.startswith(tuple(f"{outer}." for outer in inside)):
            continue
        if isinstance(module, Backbone) or any(family.fits(module) for family in families()):
            inside[path] = type(module).__name__
    if inside:
        return "give " + " or ".join(f"model.{path} ({name})" for path, name in inside.items())
    if any(is_of(library, m) for m in model.modules() for library in ("transformers", "clip")):
        return (
            "give the model of the same weights of timm (timm.create_model) or open_clip "
            "(open_clip.create_model); backbone.checkpoint=FILE reads transformers' files of a ViT"
        )
    return f"supported are {'; '.join(family.family for family in families())}"
