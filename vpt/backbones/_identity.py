"""Names of frozen weights and of the model that runs them, for artefacts."""

import hashlib
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vpt.data.transforms import Preprocess
from vpt.errors import InputError


class Identity(nn.Module):
    """The half of a backbone that tells it from others."""

    family: ClassVar[str]
    model: nn.Module
    preprocess: Preprocess

    def __init__(self) -> None:
        super().__init__()
        self._fingerprint: str | None = None
        self._answers: dict[int, list[float]] = {}

    def own_features(self, images: Tensor) -> Tensor:
        """Features (B, feature_dim) by the model's own forward."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """SHA-256 of all pretrained weights as float32, computed once."""
        if self._fingerprint is not None:
            return self._fingerprint
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy())
        self._fingerprint = digest.hexdigest()
        return self._fingerprint

    @torch.no_grad()
    def answer(self) -> list[float]:
        """The first 16 features of a fixed image of `preprocess`'s size, computed once a size.

        They tell apart what the same weights may belong to: another activation, another pooling.
        """
        size = self.preprocess.image_size
        if size not in self._answers:
            self._answers[size] = self(self._waves())[0, :16].tolist()
        return self._answers[size]

    @torch.no_grad()
    def check_features(self) -> None:
        """Compare features of a fixed image with the model's own.

        Raises:
            InputError: they differ, so something in the model does what its family does not.
        """
        waves = self._waves()
        features, own = self(waves), self.own_features(waves)
        if features.shape != own.shape or (features - own).norm() > 1e-3 * own.norm():
            raise InputError(
                f"{type(self.model).__name__} gives other features than a {self.family} of its "
                "weights: something in it was changed (a forward, a hook): give the model without"
            )
        self._answers[self.preprocess.image_size] = features[0, :16].tolist()

    def _waves(self) -> Tensor:
        size = self.preprocess.image_size
        channels = self.preprocess.channels
        waves = torch.arange(float(channels * size * size)).sin().view(1, channels, size, size)
        return waves.to(next(self.model.parameters()))

    def identity(self) -> dict[str, Any]:
        """The `fingerprint` and `answer` that an artefact knows its backbone by."""
        return {"fingerprint": self.fingerprint(), "answer": self.answer()}
