"""Names with one line each for `vpt list`, read from the files themselves."""

import ast
from pathlib import Path

from vpt import resources
from vpt.errors import InputError, nearest
from vpt.settings import read_yaml


def catalog(what: str) -> list[tuple[str, str]]:
    """(name, one line) of all methods, datasets, backbones, configs or suites.

    Raises:
        InputError: `what` is none of these.
    """
    if what == "methods":
        folder = Path(__file__).parent / "methods"
        files = [f for f in sorted(folder.glob("*.py")) if f.stem != "base" and f.stem[0] != "_"]
        return [(file.stem, _first_line(file)) for file in files]
    if what == "datasets":
        return [(name, _card_line(name)) for name in resources.names("datasets")]
    groups = {
        "backbones": "configs/backbone",
        "configs": "configs/run",
        "suites": "configs/suite",
    }
    if what not in groups:
        known = ["methods", "datasets", *groups]
        raise InputError(f"vpt list {what}: nothing of that kind{nearest(what, known)}")
    return [
        (name, _comment(resources.find(groups[what], name)))
        for name in resources.names(groups[what])
    ]


def _first_line(module: Path) -> str:
    # parsed, not imported: torch would take seconds
    return (ast.get_docstring(ast.parse(module.read_text())) or "").splitlines()[0]


def _card_line(name: str) -> str:
    card = read_yaml(resources.find("datasets", name))
    classes = f", {card.num_classes} classes" if card.get("num_classes") else ""
    return f"{card.title}{classes} ({card.licence})"


def _comment(path: Path) -> str:
    first = path.read_text().splitlines()[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""
