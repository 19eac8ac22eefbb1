"""The model that is meant, where it is given inside another object."""

import copy
from typing import Any

from timm.utils import ModelEma, ModelEmaV2, ModelEmaV3
from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from vpt.errors import InputError

_HELD = {
    OptimizedModule: "_orig_mod",
    nn.DataParallel: "module",
    DistributedDataParallel: "module",
    AveragedModel: "module",
    ModelEma: "ema",
    ModelEmaV2: "module",
    ModelEmaV3: "module",
}


def unwrap(model: Any) -> nn.Module:
    """The model in what is known to wrap one; any other module as it is.

    Known are torch.compile, DataParallel, averages of weights, PEFT (whose layers stay),
    transformers' TimmWrapper, and the tuple of open_clip's `create_model_and_transforms`.

    Raises:
        InputError: no module; PEFT's prompts, which a base model would run without.
    """
    if isinstance(model, tuple | list) and model and isinstance(model[0], nn.Module):
        return unwrap(model[0])
    if not isinstance(model, nn.Module):
        mend = "give a timm or open_clip model"
        if isinstance(model, str):
            mend = f"give vpt.backbones.load({model!r})"
        raise InputError(f"the backbone is a {type(model).__name__}, not a module: {mend}")
    for wrapper, name in _HELD.items():
        if isinstance(model, wrapper):
            return unwrap(getattr(model, name))
    if is_of("peft", model):
        if model.active_peft_config.is_prompt_learning:
            raise InputError("PEFT's prompts are no part of its base model: give that alone")
        return unwrap(model.get_base_model())
    if is_of("transformers", model) and hasattr(model, "timm_model"):
        inner = copy.copy(unwrap(model.timm_model))
        # timm made it as another checkpoint's: the wrapper knows mean, std and name of its own
        inner.pretrained_cfg = {**inner.pretrained_cfg, **(model.config.pretrained_cfg or {})}
        return inner
    return model


def is_of(library: str, model: nn.Module) -> bool:
    """True if a class of `library` is a base of the model's."""
    return any(c.__module__.partition(".")[0] == library for c in type(model).__mro__)
