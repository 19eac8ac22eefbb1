"""What every frozen image model is to this package: embed → blocks → finish, with prompts."""

import copy
import hashlib
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from vpt.config import BackboneConfig
from vpt.data.transforms import Preprocess

Position = Literal["prepend", "append"]


def share(model: nn.Module) -> nn.Module:
    """A copy of the module tree in eval mode whose frozen parameters are views of `model`'s.

    No weight is copied, and nothing done to the copy (mode, gradients, hooks, heads) is seen by
    other users of `model`.
    """
    memo: dict[int, object] = {
        id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()
    }
    memo |= {id(buffer): buffer for buffer in model.buffers()}
    return copy.deepcopy(model, memo).eval()


class Backbone(nn.Module):
    """Adapter of one family: a subclass sets the attributes and says how to embed and finish.

    Tokens are (B, N, width); the first `num_prefix_tokens` of them are not patches.
    """

    family: ClassVar[str]
    model: nn.Module
    width: int
    num_layers: int
    num_prefix_tokens: int
    patch_size: tuple[int, int]
    feature_dim: int
    preprocess: Preprocess

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = share(model)
        self.config: BackboneConfig | None = None  # how to load it again, where that is known
        self._fingerprint: str | None = None

    @staticmethod
    def fits(model: nn.Module) -> bool:
        """Whether `model` belongs to this family."""
        raise NotImplementedError

    @property
    def image_tower(self) -> nn.Module:
        """The part of the model that sees images."""
        return self.model

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to the tokens (B, N, width) that enter block 0."""
        raise NotImplementedError

    def block(self, index: int, tokens: Tensor) -> Tensor:
        """Tokens through block `index`."""
        raise NotImplementedError

    def finish(self, tokens: Tensor) -> Tensor:
        """Tokens after the last block to features (B, feature_dim)."""
        raise NotImplementedError

    def forward(
        self,
        images: Tensor,
        prompts: Tensor | None = None,
        layers: Sequence[int] = (),
        position: Position = "prepend",
    ) -> Tensor:
        """Features (B, feature_dim) of images (B, 3, H, W), with prompts as tokens.

        Args:
            images: normalised as `preprocess` says.
            prompts: (len(layers), P, width), or (len(layers), B, P, width) for one set a sample.
            layers: ascending; before block `layers[i]` the prompt slots are (over)written with
                `prompts[i]`. Between those blocks prompts are ordinary tokens (Jia et al. 2022,
                eq. 4-6).
            position: after the prefix tokens, or after the last patch. The output is the same,
                since prompts carry no position embedding.
        """
        tokens = self.embed(images)
        start = self.num_prefix_tokens if position == "prepend" else tokens.shape[1]
        end = start  # prompts occupy tokens[:, start:end]
        for index in range(self.num_layers):
            if index in layers:
                rows = prompts[layers.index(index)].to(tokens.dtype)
                rows = rows.expand(len(tokens), -1, -1)
                tokens = torch.cat([tokens[:, :start], rows, tokens[:, end:]], dim=1)
                end = start + rows.shape[1]
            tokens = self.block(index, tokens)
        return self.finish(torch.cat([tokens[:, :start], tokens[:, end:]], dim=1))

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
