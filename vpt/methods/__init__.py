"""One file a method, found by its file name; `attach` puts one on a frozen backbone."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from vpt import backbones, modules, targets
from vpt.backbones.base import Backbone
from vpt.backbones.clip import Tokenizer
from vpt.config import Strict
from vpt.errors import InputError, check_class_names
from vpt.methods.base import Method
from vpt.settings import validate
from vpt.targets import Target

__all__ = ["Method", "attach", "attach_to", "check_options", "names"]


def names() -> list[str]:
    """Every method: the modules of this package that define one."""
    return modules.names(__name__)


def find(name: str) -> type[Method]:
    """The class of the method called `name`.

    Raises:
        InputError: there is none; says the nearest name.
    """
    return modules.find(__name__, Method, name)


def check_options(method: str | type[Method], options: dict[str, Any]) -> Strict:
    """The method's options, checked.

    Raises:
        InputError: unknown method or option, wrong type, value out of range.
    """
    cls = find(method) if isinstance(method, str) else method
    return validate(cls.Options, options, where=f"method {cls.name}")


def attach(
    backbone: nn.Module,
    method: str | type[Method] = "vpt_deep",
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    tokenizer: Tokenizer | None = None,
    multilabel: bool = False,
    target: str | type[Target] | Target | None = None,
    **options: Any,
) -> Method:
    """A prompted model on `backbone`, which stays as it is for its other users.

    Args:
        backbone: a timm vision transformer, an open_clip CLIP, or `vpt.backbones.load(...)`.
        method: a name from `vpt list methods`, or a class of one's own.
        num_classes: how many classes, where `class_names` are not given.
        class_names: distinct texts in label order; methods with a text tower need them.
        tokenizer: texts → token ids (N, T), for CLIP methods; None: CLIP's own.
        multilabel: an image may have any number of the classes: short for `target="multilabel"`.
        target: the kind of the labels: a name under vpt/targets, or a class of one's own.
        **options: of the method, such as `num_tokens=10`.

    Raises:
        InputError: unsupported backbone, unknown method, option or target, missing class names.
    """
    target = target or ("multilabel" if multilabel else "multiclass")
    adapted = backbones.adapt(backbone)
    return attach_to(adapted, method, num_classes, class_names, tokenizer, target, options)


def attach_to(
    adapted: Backbone,
    method: str | type[Method],
    num_classes: int | None,
    class_names: Sequence[str] | None,
    tokenizer: Tokenizer | None,
    target: str | type[Target] | Target,
    options: dict[str, Any],
) -> Method:
    """`attach`, on this very view of a backbone: methods that train its weights need their own."""
    cls = find(method) if isinstance(method, str) else method
    checked = check_options(cls, options)
    reads_names = cls.reads_text and hasattr(adapted, "encode_texts")
    if class_names is None:
        if num_classes is None or reads_names:
            needed = "class_names" if reads_names else "num_classes or class_names"
            raise InputError(f"{cls.name} needs {needed}")
        class_names = [str(label) for label in range(num_classes)]
    check_class_names(class_names)
    if num_classes not in (None, len(class_names)):
        raise InputError(f"num_classes={num_classes}, but {len(class_names)} class_names")
    if len(class_names) < 2:
        raise InputError(f"{cls.name} needs at least two classes, got {list(class_names)}")
    target = targets.find(target)
    texts = target.texts(class_names) if reads_names else list(class_names)
    model = cls(adapted, texts, checked, tokenizer)
    model.class_names, model.target = list(class_names), target
    return model.to(adapted.device)
