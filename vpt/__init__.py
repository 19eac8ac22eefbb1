"""Learnable prompts for frozen vision transformers (timm) and CLIP (open_clip).

The public face is loaded on first use, so that importing `vpt` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vpt import backbones
    from vpt.artifact import load, save
    from vpt.config import TrainConfig, recipe
    from vpt.errors import InputError
    from vpt.evaluation.evaluate import evaluate
    from vpt.hub import pull, push
    from vpt.imports import import_checkpoint
    from vpt.methods import attach
    from vpt.serve.bank import PromptBank
    from vpt.training.fit import fit

__all__ = [
    "InputError",
    "PromptBank",
    "TrainConfig",
    "attach",
    "backbones",
    "evaluate",
    "fit",
    "import_checkpoint",
    "load",
    "pull",
    "push",
    "recipe",
    "save",
]

_HOMES = {
    "InputError": "vpt.errors",
    "PromptBank": "vpt.serve.bank",
    "TrainConfig": "vpt.config",
    "attach": "vpt.methods",
    "evaluate": "vpt.evaluation.evaluate",
    "fit": "vpt.training.fit",
    "import_checkpoint": "vpt.imports",
    "load": "vpt.artifact",
    "pull": "vpt.hub",
    "push": "vpt.hub",
    "recipe": "vpt.config",
    "save": "vpt.artifact",
}


def __getattr__(name: str) -> Any:
    if name == "backbones":
        return importlib.import_module("vpt.backbones")
    if name not in _HOMES:
        raise AttributeError(f"module 'vpt' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
