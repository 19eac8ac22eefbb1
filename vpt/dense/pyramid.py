"""Prompted feature maps of a frozen ViT, and a pyramid of three scales made of them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vpt import methods
from vpt.backbones.base import Backbone
from vpt.errors import InputError
from vpt.methods import Method

HEAD_ONLY = "head_only"
_GROUPS = 32  # of normalised channels, as torchvision's heads have


class HeadOnly(Method):
    """The bare backbone: nothing but what stands on its maps trains."""


class Maps(nn.Module):
    """Maps of several blocks beside each other, with a method's prompts or weights in the tower.

    Attributes:
        method: its read-out for classes has no part in the maps, and does not train.
        layers: the blocks.
        width: channels of the maps.
        frozen: True where nothing that trains changes the maps of an image.
    """

    def __init__(self, method: Method, layers: Sequence[int] | None, size: tuple[int, int]) -> None:
        """`layers` None: four at quarter depths; `size` of the images: height, width.

        Raises:
            InputError: a hierarchical backbone; a method that leaves the image tower alone, or that
                changes pixels; layers that the backbone lacks.
        """
        super().__init__()
        self.method, self.size = method, size
        backbone = method.backbone
        depth = backbone.num_layers
        if len(set(backbone.widths)) > 1:
            raise InputError(f"{backbone.family}: stages of several widths: take a plain ViT")
        self.layers = list(
            layers or sorted({-(-depth * quarter // 4) - 1 for quarter in range(1, 5)})
        )
        if not all(0 <= layer < depth for layer in self.layers):
            raise InputError(f"layers={self.layers}: give block numbers from 0 to {depth - 1}")
        if method.overrides("pixels"):
            raise InputError(f"{method.name} changes pixels at one size: take vpt_deep")
        if backbone.takes_sizes:
            backbone.set_size(*size)
        self.width = backbone.width * len(self.layers)
        trained = method.tunable_parameters()
        read = self._read(trained)
        if not read and not self._prompted():
            raise InputError(f"{method.name} leaves the image tower alone: take {HEAD_ONLY}")
        self.unread = trained.keys() - read
        for name in self.unread:
            trained[name].requires_grad_(False)
        self.frozen = not read

    def _prompted(self) -> bool:
        """True if the method has prompts, which need not train; `head_only` means to have none."""
        backbone = self.method.backbone
        blank = torch.zeros(1, backbone.preprocess.channels, *self.size, device=backbone.device)
        return isinstance(self.method, HeadOnly) or self.method.image_prompts(blank) is not None

    def _read(self, trained: dict[str, nn.Parameter]) -> set[str]:
        """Names of the tensors that train and that maps depend on."""
        with torch.enable_grad():
            backbone = self.method.backbone
            channels = backbone.preprocess.channels
            maps = self(torch.zeros(1, channels, *self.size, device=backbone.device))
            if not maps.requires_grad:
                return set()
            slopes = torch.autograd.grad(maps.sum(), list(trained.values()), allow_unused=True)
        return {name for name, slope in zip(trained, slopes, strict=True) if slope is not None}

    def forward(self, images: Tensor) -> Tensor:
        """Maps (B, width, rows, columns) of images (B, channels, H, W), each normed by place.

        Blocks differ in scale by orders of magnitude, and the tower's own norm is of the last.
        """
        maps = self.method.feature_maps(images, self.layers)
        normed = [F.layer_norm(m.permute(0, 2, 3, 1), m.shape[1:2]) for m in maps]
        return torch.cat(normed, -1).permute(0, 3, 1, 2)

    def artifact_tensors(self) -> dict[str, Tensor]:
        """The method's tensors without its read-out."""
        kept = self.method.artifact_tensors()
        return {name: tensor for name, tensor in kept.items() if name not in self.unread}


def attach(
    backbone: Backbone, method: str, class_names: Sequence[str], options: dict[str, object]
) -> Method:
    """The method of that name on this backbone, for its image half; `head_only` is none.

    Raises:
        InputError: as `vpt.attach`.
    """
    names = list(class_names)
    names += ["background"] * (len(names) < 2)  # what a method reads of classes is not used
    cls = HeadOnly if method == HEAD_ONLY else method
    return methods.attach(backbone, cls, class_names=names, **options)


class Pyramid(nn.Module):
    """Maps at half, one and two times the patch size, of the one map of a plain ViT.

    After ViTDet's simple pyramid (Li et al. 2022, section 3).
    """

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.out_channels = channels
        self.reduce = convolution(width, channels, 1)
        self.finer = nn.ConvTranspose2d(channels, channels, 2, 2)
        self.smooth = nn.ModuleList(convolution(channels, channels, 3) for _ in range(3))

    def forward(self, maps: Tensor) -> list[Tensor]:
        """Levels (B, channels, …), finest first, of maps (B, width, rows, columns)."""
        x = self.reduce(maps)
        levels = (self.finer(x), x, F.max_pool2d(x, 2, ceil_mode=True))
        return [smooth(level) for smooth, level in zip(self.smooth, levels, strict=True)]


def convolution(width: int, channels: int, side: int) -> nn.Sequential:
    """A convolution to so many channels, group norm, GELU."""
    layer = nn.Conv2d(width, channels, side, padding=side // 2, bias=False)
    return nn.Sequential(layer, nn.GroupNorm(min(_GROUPS, channels // 2), channels), nn.GELU())
