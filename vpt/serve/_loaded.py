"""A loaded task: what of its method the bank's pass computes, and what is left to read out."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from vpt.backbones._prompts import tensors
from vpt.backbones.base import Backbone, Prompts
from vpt.methods import Method
from vpt.methods._tokens import ImagePrompts


class Loaded:
    """The inference form of a task's method.

    Attributes:
        model: in eval mode, its constants computed.
        shares_pass: True where the image half is prompts that no image changes, or nothing, on the
            bank's own weights; False: it runs by itself.
        prompts: of the image tower; None: it runs without.
        reads_pooled: True where the read-out has a projection of its own; False: it gets features.
        form: equal for read-outs that differ in the values of their tensors alone.
        state: the read-out's own tensors, by name.
        num_bytes: of its tensors, without the shared backbone's.
    """

    def __init__(self, model: Method, backbone: Backbone, pooled: Tensor) -> None:
        """A task of a bank on `backbone`, which pools images to such as `pooled` (1, …)."""
        with torch.no_grad():
            model.make_constants()
        model.is_folded = True
        self.model = model.requires_grad_(False)
        self.shares_pass = model.backbone is backbone and _is_constant(type(model))
        self.prompts: Prompts | None = None
        self.reads_pooled = model.overrides("project")
        self.form: tuple | None = None
        self.state: dict[str, Tensor] = {}
        if self.shares_pass:
            constant = getattr(model, "constant", None)
            self.prompts = None if constant is None else constant.prompts
            self._keep_read_out(pooled)
        held = [*_state(model).values(), *(tensors(self.prompts) if self.prompts else [])]
        self.num_bytes = _num_bytes(held, backbone)

    def _keep_read_out(self, pooled: Tensor) -> None:
        """Drop what made the constants and find the read-out's form."""
        model, backbone = self.model, self.model.backbone
        with torch.no_grad():
            inputs = pooled if self.reads_pooled else backbone.project(pooled)
            with _Reads() as reads:
                _ReadOut(self)(inputs)
        runs_tower = any(t.numel() > 1 and id(t) in reads.seen for t in _state(backbone).values())
        if runs_tower:  # on each image's own texts, say: not for many tasks at once
            self.form = (id(model),)
            return
        for module in set(model.modules()) - set(backbone.modules()):
            for own in (module._parameters, module._buffers):
                own |= dict.fromkeys(name for name, t in own.items() if id(t) not in reads.seen)
        own = {n: t for n, t in _state(model).items() if not n.startswith("backbone.")}
        self.state = own
        shapes = tuple((name, tensor.shape, tensor.dtype) for name, tensor in own.items())
        self.form = (type(model), model.options.model_dump_json(), type(model.target), shapes)


class _ReadOut(nn.Module):
    """Logits from features, or from what the tower pools, as a module's forward."""

    def __init__(self, task: Loaded) -> None:
        super().__init__()
        self.model, self.reads_pooled = task.model, task.reads_pooled

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model.logits(self.model.project(inputs) if self.reads_pooled else inputs)


def read_out(tasks: Sequence[Loaded], inputs: Tensor) -> Tensor:
    """Logits (T, n, C) of T tasks of one form, n images each: features or pooled (T, n, …)."""
    run = _ReadOut(tasks[0])
    if len(tasks) == 1:
        return run(inputs[0])[None]
    state = {
        f"model.{name}": torch.stack([task.state[name] for task in tasks])
        for name in tasks[0].state
    }
    return torch.vmap(lambda own, x: functional_call(run, own, (x,)))(state, inputs)


class _Reads(TorchFunctionMode):
    """Notes which tensors functions are called with."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        self._note((args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _note(self, value: object) -> None:
        if isinstance(value, Tensor):
            self.seen.add(id(value))
        elif isinstance(value, dict):
            self._note(tuple(value.values()))
        elif isinstance(value, list | tuple):
            for each in value:
                self._note(each)


def _is_constant(method: type[Method]) -> bool:
    """True if neither pixels nor prompts depend on the image, and pooled outputs are read."""
    alike = method.image_prompts in (Method.image_prompts, ImagePrompts.image_prompts)
    return alike and not method.overrides("pixels", "read", "features", "forward")


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _num_bytes(own: Sequence[Tensor], backbone: Backbone) -> int:
    """Bytes of storages that are not the backbone's, each once."""
    shared = {t.untyped_storage().data_ptr() for t in _state(backbone).values()}
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in own}
    return sum(size for where, size in sizes.items() if where not in shared)
