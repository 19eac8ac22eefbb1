"""Typed configuration of runs on boxes and masks, of files and `key=value`s as `RunConfig` is."""

import hashlib
import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from vpt import resources
from vpt.config import BackboneConfig, File, MethodConfig, Seed, Strict, Text, find_config
from vpt.data.masks import Masks
from vpt.errors import InputError
from vpt.settings import changes_of, merge, read_yaml, validate

Layers = Annotated[list[NonNegativeInt], Field(min_length=1)]


class DenseDataConfig(Strict):
    """The images, and how many of them train. A shot is an image with all its objects."""

    root: File
    shots: PositiveInt | None = 50  # None: all
    seed: Seed = 1
    # of the longer side, pixels, to which images are resized; None: 320, or the one size that the
    # backbone takes
    size: PositiveInt | None = None
    flips: Literal["none", "horizontal", "both"] = "horizontal"  # of training images, at random
    patients: File | None = None  # a CSV of image and patient, where the layout names none


class SegmentDataConfig(DenseDataConfig):
    """Of masks also: what their numbers are, which nothing in the files tells."""

    masks: Masks  # class: a pixel has its class number; instance: the number of its object
    classes: list[Text] | None = None  # names of the classes 1, 2, …; None: these numbers


class DenseTrainConfig(Strict):
    """Settings of training: AdamW, a linear warm-up, then a cosine to 0."""

    steps: PositiveInt = 600
    batch_size: PositiveInt = 4
    lr: float = Field(1e-3, gt=0)  # of what stands on the maps
    method_lr: float = Field(1e-3, gt=0)  # of the method's own tensors
    weight_decay: float = Field(1e-4, ge=0)
    warmup_steps: NonNegativeInt = 50
    seed: Seed = 1


class DetectHeadConfig(Strict):
    """Detector on the maps: a pyramid and torchvision's FCOS."""

    layers: Layers | None = None  # blocks whose maps it reads; None: four at quarter depths
    channels: PositiveInt = Field(128, multiple_of=32)
    convs: PositiveInt = 2  # of the head, before its outputs
    max_detections: PositiveInt = 100  # in an image
    nms: float = Field(0.6, gt=0, lt=1)  # IoU above which the weaker of two boxes of a class goes


class SegmentHeadConfig(Strict):
    """Segmenter on the maps: a small decoder."""

    layers: Layers | None = None  # as in `DetectHeadConfig`
    channels: PositiveInt = Field(128, multiple_of=32)
    dice: float = Field(1.0, ge=0)  # weight of the Dice loss beside cross-entropy


class DenseEngineConfig(Strict):
    """Settings of computing, which change no number."""

    # folder for the maps of training images, where nothing in the tower trains; None: memory only
    feature_cache: File | None = None


class DenseConfig(Strict):
    """Common keys of runs on boxes and on masks."""

    backbone: BackboneConfig
    data: DenseDataConfig
    method: MethodConfig
    train: DenseTrainConfig = DenseTrainConfig()
    engine: DenseEngineConfig = DenseEngineConfig()
    out: File | None = None  # run folder; None: runs/KIND-METHOD-DATA-SHOTSshot-seedSEED

    @property
    def hash(self) -> str:
        """Names the run: changes with every setting that can change its result."""
        settings = self.model_dump(mode="json", exclude={"out", "engine"})
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


class DetectConfig(DenseConfig):
    """One run on boxes."""

    kind: Literal["detect"]
    detect: DetectHeadConfig = DetectHeadConfig()


class SegmentConfig(DenseConfig):
    """One run on masks."""

    kind: Literal["segment"]
    data: SegmentDataConfig
    segment: SegmentHeadConfig = SegmentHeadConfig()


CONFIGS: dict[str, type[DetectConfig] | type[SegmentConfig]] = {
    "detect": DetectConfig,
    "segment": SegmentConfig,
}


def load_dense(config: str, overrides: Sequence[str] = ()) -> DetectConfig | SegmentConfig:
    """The configuration `config`, a path or a name under configs/run, with `key=value`s.

    The method's recipe under configs/dense comes first, then the file, then the overrides; an
    override of `method.name` drops what the file says for the method that it replaces.

    Raises:
        InputError: as `vpt.config.load_run`.
    """
    path = find_config(config)
    file: Any = merge(read_yaml(path))
    model = CONFIGS.get(file.get("kind"))
    if model is None:
        raise InputError(
            f"{path}: kind is none of {', '.join(CONFIGS)}: vpt train trains classifiers"
        )
    changes = changes_of(model, overrides)
    named, chosen = (each.get("method", {}).get("name") for each in (file, changes))
    if chosen not in (None, named):
        for section in ("method", "train"):
            file.pop(section, None)
    name = chosen or named
    known = resources.names("configs/dense")
    recipe = read_yaml(resources.find("configs/dense", name)) if name in known else {}
    return validate(model, merge({"method": {"name": name}}, recipe, file, changes), where=config)
