"""Maps of images in a folder, a file for each image and flip, for this run and later ones."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from vpt.artifact import digest
from vpt.dense.pyramid import Maps
from vpt.resources import package_version
from vpt.training.features import read_columns, write_columns

SPARE_BYTES = 2**30  # of the disk, which stay free


class MapFiles:
    """Maps that nothing trained changes, below `folder`."""

    def __init__(self, folder: Path, maps: Maps) -> None:
        method, backbone = maps.method, maps.method.backbone
        text = json.dumps(
            {
                "version": package_version(),
                "torch": torch.__version__,
                "backbone": [backbone.fingerprint(), repr(backbone.model)],
                "method": [method.name, method.options.model_dump(mode="json")],
                "preprocess": backbone.preprocess.to_dict(),
                "layers": maps.layers,
            },
            sort_keys=True,
        )
        own = {name: tensor.cpu() for name, tensor in maps.artifact_tensors().items()}
        self.folder = folder.expanduser().absolute() / digest(own, text)

    def get(self, image: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        """`make(image)`, from its file where that is whole; a full disk gets no more files."""
        key = hashlib.sha256(image.cpu().numpy().tobytes()).hexdigest()
        path = self.folder / f"{key}.safetensors"
        if kept := read_columns(path, key):
            return kept["maps"].to(image.device)
        made = make(image)
        self.folder.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(self.folder).free > SPARE_BYTES + made.nbytes:
            write_columns(path, {"maps": made.cpu().contiguous()}, key)
        return made
