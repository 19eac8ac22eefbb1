"""Reads what torch.save wrote without running any of it: only tensors and containers are made."""

import codecs
import pickle
from collections import OrderedDict, defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any
from zipfile import ZipFile, is_zipfile

import numpy as np
import torch

from vpt.errors import InputError

_multiarray = np._core.multiarray if hasattr(np, "_core") else np.core.multiarray
_MADE = {
    "collections.OrderedDict": OrderedDict,
    "collections.defaultdict": defaultdict,
    "builtins.dict": dict,
    "torch._utils._rebuild_tensor": torch._utils._rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": torch._utils._rebuild_tensor_v2,
    "torch._utils._rebuild_parameter": torch._utils._rebuild_parameter,
    "numpy.core.multiarray._reconstruct": _multiarray._reconstruct,
    "numpy._core.multiarray._reconstruct": _multiarray._reconstruct,
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
    "_codecs.encode": codecs.encode,  # of an array's bytes
}


class Inert:
    """Stands in for any other class or function of the file, and for what it would have made."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, item: Any) -> None:
        """Nothing."""

    def extend(self, items: Any) -> None:
        """Nothing."""

    def add(self, item: Any) -> None:
        """Nothing."""


class Unpickler(pickle.Unpickler):
    """Makes tensors, arrays and dictionaries; whatever else the file names is inert."""

    def find_class(self, module: str, name: str) -> Any:
        """The object that the file may use under this name."""
        return _MADE.get(f"{module}.{name}", Inert)


def _load(file: IO[bytes], **options: Any) -> Any:
    return Unpickler(file, **options).load()


def read(path: Path) -> dict[str, Any]:
    """The dictionary that `torch.save` wrote to `path`, with tensors on the CPU.

    Raises:
        InputError: missing, unreadable, not a dictionary, or a TorchScript archive, which is code.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if is_zipfile(path) and any("/code/" in n or "constants.pkl" in n for n in _names(path)):
        raise InputError(f"{path}: a TorchScript archive, which runs code: give a checkpoint")
    # torch asks this "module" for what it wants of pickle, in its files of now and of before 1.6
    restricted = SimpleNamespace(
        __name__="restricted", Unpickler=Unpickler, load=_load, UnpicklingError=pickle.PickleError
    )
    try:
        content = torch.load(path, "cpu", pickle_module=restricted, weights_only=False)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path}: not a checkpoint that can be read ({reason[:100]})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a checkpoint: its content is no dictionary")
    return content


def _names(path: Path) -> list[str]:
    with ZipFile(path) as file:
        return file.namelist()
