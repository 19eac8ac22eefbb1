"""Finds configs/ and datasets/, inside an installed package or beside it; and its version."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from vpt.errors import InputError, nearest

_PACKAGE = Path(__file__).parent


def folder(name: str) -> Path:
    """The folder of YAML files called `name`, such as `datasets` or `configs/run`."""
    for parent in (_PACKAGE, _PACKAGE.parent):
        if (parent / name).is_dir():
            return parent / name
    raise InputError(f"{name}/ is missing from this installation: install the package again")


def names(name: str) -> list[str]:
    """Names of the YAML files in `folder(name)`, sorted."""
    return sorted(path.stem for path in folder(name).glob("*.yaml"))


def find(name: str, stem: str) -> Path:
    """Path of `stem`.yaml in `folder(name)`.

    Raises:
        InputError: there is none; says which name is nearest.
    """
    path = folder(name) / f"{stem}.yaml"
    if not path.is_file():
        raise InputError(f"no {stem!r} in {name}/{nearest(stem, names(name))}")
    return path


def package_version() -> str:
    """This package's version, or `unknown` where it is not installed."""
    try:
        return version("visual-prompt-tuning")
    except PackageNotFoundError:
        return "unknown"
