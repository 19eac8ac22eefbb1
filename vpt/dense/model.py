"""Base of detectors and segmenters."""

from collections.abc import Sequence
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from vpt.backbones.base import share
from vpt.dense.pyramid import Maps


class Dense(nn.Module):
    """Base of what stands on prompted maps: it knows what trains, what is stored, how to fold.

    Attributes:
        class_names: in label order.
        threshold: the least score of an object that is shown, where there are scores.
    """

    kind: ClassVar[str]

    def __init__(self, maps: Maps, class_names: Sequence[str], options: Any) -> None:
        super().__init__()
        self.maps, self.class_names, self.options = maps, list(class_names), options
        self.threshold: float | None = None

    def tunable_parameters(self) -> dict[str, nn.Parameter]:
        """The tensors that train, by name: the method's begin with `maps.method.`."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def artifact_tensors(self) -> dict[str, Tensor]:
        """Tensors of an artefact: the method's own, and all that stands on the maps."""
        own = {f"maps.method.{name}": t for name, t in self.maps.artifact_tensors().items()}
        return own | {n: t for n, t in self.state_dict().items() if not n.startswith("maps.")}

    def training_tensors(self) -> dict[str, Tensor]:
        """Tensors that a checkpoint of unfinished training stores."""
        return self.artifact_tensors()

    def fold(self) -> Self:
        """The inference form: a frozen view, whose prompts are keys and values."""
        folded = share(self)
        folded.maps.method = self.maps.method.fold()
        return folded
