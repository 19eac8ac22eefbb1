"""The artefact of a detector or segmenter: prompts, pyramid and head in one safetensors file."""

from pathlib import Path
from typing import Any

from torch import nn

from vpt import artifact
from vpt.dense.config import CONFIGS, DetectHeadConfig, SegmentHeadConfig
from vpt.dense.detector import Detector
from vpt.dense.pyramid import Maps, attach
from vpt.dense.segmenter import Segmenter
from vpt.errors import InputError
from vpt.settings import validate

Model = Detector | Segmenter


def save(
    model: Model, path: str | Path, method: str, options: dict[str, Any], **details: Any
) -> Path:
    """Write the model to `path`, atomically; `method` and its `options` made its maps."""
    height, width = model.maps.size
    metadata = {
        "kind": model.kind,
        "method": method,
        "options": options,
        "class_names": model.class_names,
        "size": [width, height],
        "head": model.options.model_copy(update={"layers": model.maps.layers}).model_dump(),
        "threshold": model.threshold,
        **({"instances": model.instances} if isinstance(model, Segmenter) else {}),
        **details,
    }
    return artifact.write(path, model.artifact_tensors(), model.maps.method.backbone, metadata)


def kind_of(path: str | Path) -> str | None:
    """`detect` or `segment`, or None of a classifier's artefact.

    Raises:
        InputError: no artefact.
    """
    return artifact.read_metadata(path).get("kind")


def load(path: str | Path, backbone: nn.Module | None = None) -> Model:
    """The model of an artefact, in eval mode; its metadata is `model.metadata`.

    Args:
        path: written by `save`.
        backbone: the model that it was trained on; None loads it as the artefact says.

    Raises:
        InputError: as `vpt.load`; the artefact of a classifier.
    """
    tensors, metadata = artifact.read(path)
    if metadata.get("kind") not in CONFIGS:
        raise InputError(f"{path}: a classifier: give it to vpt.load")
    adapted = artifact.find_backbone(path, metadata, backbone)
    names = metadata["class_names"]
    method = attach(adapted, metadata["method"], names, metadata["options"])
    width, height = metadata["size"]
    maps = Maps(method, metadata["head"]["layers"], (height, width))
    model: Model
    if metadata["kind"] == "detect":
        model = Detector(maps, names, validate(DetectHeadConfig, metadata["head"], str(path)))
    else:
        head = validate(SegmentHeadConfig, metadata["head"], str(path))
        model = Segmenter(maps, names, head, metadata["instances"])
    own = {name: tensor.shape for name, tensor in model.artifact_tensors().items()}
    if own != {name: tensor.shape for name, tensor in tensors.items()}:
        raise InputError(
            f"{path}: its tensors are not those of {metadata['method']} in this version: install "
            f"version {metadata['version']}"
        )
    model.load_state_dict(tensors, strict=False)
    model.threshold, model.metadata = metadata["threshold"], metadata
    return model.eval()
