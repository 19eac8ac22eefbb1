"""Hugging Face's ImageFolder: a `metadata.csv` beside the images, or one in each part."""

from pathlib import Path

from vpt.data.cards import Card
from vpt.data.layouts import Read, csv
from vpt.data.layouts._files import part_of
from vpt.data.layouts._table import read_table
from vpt.data.search import subfolders
from vpt.errors import InputError

ROOT = "folder"


def recognise(root: Path) -> bool:
    """True for a folder whose metadata.csv has labels; without, its class folders have them."""
    if not root.is_dir():
        return False
    try:
        tables = _tables(root)
        return bool(tables) and all("label" in read_table(path).columns for path in tables)
    except InputError:  # said when it is read
        return True


def read(root: Path, card: Card) -> Read:
    """The table or tables, as `csv` reads them.

    Raises:
        InputError: as `csv.read`.
    """
    return csv.read_tables(_tables(root), root, card)


def _tables(root: Path) -> dict[Path, str | None]:
    """Tables with their parts."""
    whole = root / "metadata.csv"
    if whole.is_file():
        return {whole: None}
    folders = [path for paths in subfolders(root).values() for path in paths]
    parts = {path / "metadata.csv": part_of(path.name) for path in folders}
    return {table: part for table, part in parts.items() if part and table.is_file()}
