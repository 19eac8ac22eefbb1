"""The backbone's own preprocessing, cut in two: uint8 crops (cached), then normalisation."""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field, PositiveInt

from vpt.config import Augment, Strict
from vpt.errors import InputError
from vpt.settings import validate

if TYPE_CHECKING:
    import albumentations

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow makes grey of RGB


class Preprocess(Strict):
    """Preprocessing of an image for a backbone; the words are timm's."""

    image_size: PositiveInt  # square
    interpolation: Literal["bicubic", "bilinear", "nearest", "lanczos", "box", "hamming"]
    crop_pct: float = Field(gt=0)
    crop_mode: Literal["center", "squash", "border"]
    mean: tuple[float] | tuple[float, float, float]  # of grey, or of RGB
    std: tuple[float] | tuple[float, float, float]
    # grey values that become 0 and 255, of images with more than 8 bits; None: the training images
    # had none, see `pixels.decode`
    grey_range: tuple[float, float] | None = None

    @property
    def channels(self) -> int:
        """Of the backbone's images: 3, or 1 where it takes grey ones."""
        return len(self.mean)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values of the fields; no grey range is no key."""
        return self.model_dump(mode="json", exclude_none=True)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "Preprocess":
        """The inverse of `to_dict`.

        Raises:
            InputError: an unknown or missing key, or a wrong value.
        """
        return validate(Preprocess, values, where="preprocessing")

    @staticmethod
    def from_timm(model: Any) -> "Preprocess":
        """The preprocessing that a timm model was trained with.

        Raises:
            InputError: the model takes no square images, grey or RGB.
        """
        from timm.data import resolve_model_data_config

        values = resolve_model_data_config(model)
        _, *size = values.pop("input_size")  # of the weights, whatever `in_chans` the model has
        convolutions = (m for m in model.modules() if isinstance(m, torch.nn.Conv2d))
        first = next(convolutions, None)  # NaFlex has none
        channels = first.in_channels if first else model.in_chans
        # A model made with another `img_size` than its weights' own still reports the latter.
        height, width = getattr(getattr(model, "patch_embed", None), "img_size", None) or size
        if channels not in {1, 3} or height != width:
            raise InputError(
                f"the backbone takes {channels}×{height}×{width} images: choose one for square "
                "images, grey or RGB"
            )
        if channels == 1:
            values |= {name: (sum(values[name]) / len(values[name]),) for name in ("mean", "std")}
        return validate(
            Preprocess, {"image_size": height, **values}, where="the backbone's timm config"
        )

    @staticmethod
    def from_open_clip(cfg: dict[str, Any]) -> "Preprocess":
        """The preprocessing in an open_clip model's `visual.preprocess_cfg`.

        Raises:
            InputError: not square, or a resize mode that pads.
        """
        from open_clip.transform import PreprocessCfg

        full = PreprocessCfg(**cfg)
        _, height, width = full.input_size
        modes = {"shortest": "center", "squash": "squash"}
        if height != width or full.resize_mode not in modes:
            raise InputError(
                f"the backbone takes {height}×{width} images, resize_mode={full.resize_mode}: "
                "not supported, choose one for square images, cropped or squashed"
            )
        values = {
            "image_size": height,
            "interpolation": "bilinear" if full.interpolation == "bilinear" else "bicubic",
            "crop_pct": 1.0,
            "crop_mode": modes[full.resize_mode],
            "mean": full.mean,
            "std": full.std,
        }
        return validate(Preprocess, values, where="the backbone's open_clip config")

    def crop(self) -> Callable[[Image.Image], np.ndarray]:
        """Resize and centre crop as at evaluation: RGB image → uint8 (H, W, 3)."""
        from timm.data import create_transform
        from torchvision.transforms import Compose

        resize = create_transform(
            input_size=(3, self.image_size, self.image_size),
            interpolation=self.interpolation,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
            mean=self.mean,
            normalize=False,
        )
        return Compose([resize, _to_array])

    def normalize(self, batch: torch.Tensor) -> torch.Tensor:
        """uint8 (…, H, W, 3) → float32 (…, channels, H, W), as the backbone expects it."""
        from torchvision.transforms.functional import normalize

        floats = batch.movedim(-1, -3).contiguous().float().div_(255)
        if self.channels == 1:
            floats = (floats * torch.tensor(LUMA).view(3, 1, 1)).sum(-3, keepdim=True)
        return normalize(floats, self.mean, self.std, inplace=True)


def augmentation(kind: Augment, preprocess: Preprocess) -> "albumentations.Compose":
    """Training augmentation `crop` or `crop_flip`: uint8 (H, W, 3) of any size → the model's size.

    Called as `augmentation(...)(image=array)["image"]`; `set_random_seed` makes it repeatable.
    """
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # else the import asks PyPI
    import albumentations
    import cv2

    size = (preprocess.image_size, preprocess.image_size)
    crop = albumentations.RandomResizedCrop(
        size=size, scale=(0.08, 1.0), interpolation=cv2.INTER_CUBIC
    )
    flips = [albumentations.HorizontalFlip(p=0.5)] if kind == "crop_flip" else []
    return albumentations.Compose([crop, *flips], strict=True)


def _to_array(image: torch.Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).contiguous().numpy()
