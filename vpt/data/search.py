"""Image files below folders: which count, which are left out, and why."""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from vpt.data.images import SUFFIXES, is_dicom
from vpt.data.pixels import check_pixels
from vpt.errors import InputError

# Left by systems and programs, lower case; names that begin with a dot are theirs too
_SYSTEM = {
    *("__macosx", "__pycache__", "$recycle.bin", "recycler", "system volume information"),
    *("lost+found", "found.000", "@eadir", "@tmp", "@recycle", "@recently-snapshot"),
    *("#recycle", "#snapshot", "network trash folder", "temporary items", "thumbs.db"),
    *("ehthumbs.db", "desktop.ini", "icon\r", "dicomdir", "recycled", "config.msi", "$extend"),
    *("~snapshot", "@sharebin", "@synoresource", "@transcode", "@qnap", "_gsdata_", "node_modules"),
    *("desktop db", "desktop df", "thevolumesettingsfolder"),
}
_BACKUPS = ("~", ".bak", ".orig", ".tmp", ".part", ".partial", ".crdownload", ":zone.identifier")
# Content is asked only of these, which say what they are in their first bytes
_FORMATS = (
    *("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "QOI", "TIFF", "WEBP"),
    *("DDS", "ICNS", "ICO", "PCX", "PSD", "SGI", "SUN"),
)
# Never images, or images of which Pillow would read a thumbnail or nothing at all
_TEXTS = {".txt", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".md", ".yaml", ".yml", ".html", ".py"}
_UNREAD = {".heic", ".heif", ".jxl", ".svg", ".dng", ".nef", ".cr2", ".cr3", ".arw", ".orf", ".rw2"}
_MASK = (
    "(?:masks?|msks?|segm?|segmentations?(?:[ _-]?masks?)?|label(?:s|maps?|ids)?|gt|"
    "ground[ _-]?truths?|annot?|annotations?|trimaps?)"
)
_AFTER = re.compile(
    rf"[ _.-]+\(?(?:(?:binary|colou?r|instance|semantic)[ _.-]*)?{_MASK}[ _.-]*\(?\d*\)?$",
    re.IGNORECASE,
)
_BEFORE = re.compile(rf"^{_MASK}[ _.-]+", re.IGNORECASE)
_FOLDER = re.compile(rf"[ _.-]*{_MASK}", re.IGNORECASE)
HIDDEN_FOLDERS = "hidden or system folders"


class Found(NamedTuple):
    """Images by their path below the folder, sorted; kinds of what was left out, by path.

    `kept` are the paths of images that would have been left out, but were to be included.
    """

    images: dict[str, Path]
    left_out: dict[str, str]
    kept: set[str]


def search(folder: Path, exclude: Sequence[str] = (), include: Sequence[str] = ()) -> Found:
    """Image files below `folder`, in an order that no file system changes.

    By suffix where it is known, else by content. Links are followed, each real folder once. What
    systems leave and masks of other images are left out, and what matches `exclude`; what matches
    `include` counts although it would be left out. Paths are in Unicode's composed form (NFC).
    """
    images: dict[str, Path] = {}
    left_out: dict[str, str] = {}
    for path, kind in _files(folder):
        relative = path.relative_to(folder).as_posix()
        name = composed(relative)
        if name in images or name in left_out:  # another file's, of another form
            name = unicodedata.normalize("NFD", relative)
        excluding = next((pattern for pattern in exclude if matches(name, pattern)), None)
        kind = f"excluded by {excluding}" if excluding else kind or _unlike_image(path)
        if kind:
            left_out[name] = kind
        if not kind or (path.is_file() and matches_any(name, include)):
            images[name] = path
    masks = _like_masks(images)
    with ThreadPoolExecutor() as pool:
        few = list(pool.map(_has_few_values, (images[name] for name in masks)))
    left_out |= {name: "masks" for name, is_mask in zip(masks, few, strict=True) if is_mask}
    kept = {name for name in images.keys() & left_out if matches_any(name, include)}
    left_out = {name: kind for name, kind in left_out.items() if name not in kept}
    wanted = sorted(images.keys() - left_out)
    return Found({name: images[name] for name in wanted}, left_out, kept)


def list_images(paths: Sequence[Path], log: Callable[[str], None] | None = None) -> list[Path]:
    """`paths`, with the images below it in the place of each folder; `log` takes what is left out.

    Raises:
        InputError: a folder without images.
    """
    files: list[Path] = []
    for path in paths:
        if not path.is_dir():
            files.append(path)
            continue
        images, left_out, _ = search(path)
        if not images:
            raise InputError(f"{path}: no images in this folder{say(left_out, ': ')}")
        if log and left_out:
            log(f"{path}: left out {say(left_out)}")
        files += images.values()
    return files


def subfolders(folder: Path) -> dict[str, list[Path]]:
    """Folders in `folder` that no system left, by their composed name, which several may have."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not _is_system(path.name):
            found.setdefault(composed(path.name), []).append(path)
    return found


def composed(text: str) -> str:
    """`text` in Unicode's form NFC; file systems of Apple give NFD."""
    return unicodedata.normalize("NFC", text)


def matches(name: str, pattern: str) -> bool:
    """True if `pattern` is of the path `name`, of a folder above it or of a single part of it."""
    parts = name.split("/")
    pattern = pattern.strip("/")
    paths = ("/".join(parts[: end + 1]) for end in range(len(parts)))
    return any(fnmatchcase(text, pattern) for text in (*paths, *parts, f"/{name}"))


def matches_any(name: str, patterns: Sequence[str]) -> bool:
    """True if one of `patterns` matches, see `matches`."""
    return any(matches(name, pattern) for pattern in patterns)


def say(left_out: Mapping[str, str], before: str = "") -> str:
    """Kinds of what was left out, each with its number, after `before`; empty without any."""
    counts = Counter(left_out.values())
    words = ", ".join(f"{number} {kind}" for kind, number in sorted(counts.items()))
    return before + words if words else ""


def _files(folder: Path) -> Iterator[tuple[Path, str | None]]:
    """Each file and, if it is known by now, why it is left out; of a whole folder, once."""
    seen: set[str] = set()
    closed: list[OSError] = []
    tops = [folder]  # links come last: what is below two of them counts where it really lies
    while tops:
        top = tops.pop(0)
        if os.path.realpath(top) in seen:
            yield top, "links to folders that are read already"
            continue
        for parent, folders, files in os.walk(top, onerror=closed.append):
            seen.add(os.path.realpath(parent))
            below = [Path(parent, name) for name in sorted(folders)]
            yield from ((path, HIDDEN_FOLDERS) for path in below if _is_system(path.name))
            own = [path for path in below if not _is_system(path.name)]
            tops += [path for path in own if path.is_symlink()]
            folders[:] = [
                path.name
                for path in own
                if not path.is_symlink() and os.path.realpath(path) not in seen
            ]
            for name in sorted(files):
                path = Path(parent, name)
                hidden = "hidden or system files" if _is_system(name) else None
                if not hidden and name.lower().endswith(_BACKUPS):
                    hidden = "backups and unfinished downloads"
                yield path, hidden if path.exists() else "broken links"
    yield from ((Path(e.filename), "folders that can't be opened") for e in closed)


def _is_system(name: str) -> bool:
    return name.startswith((".", "~$")) or name.lower() in _SYSTEM


def _unlike_image(path: Path) -> str | None:
    """Kind of a file that is no image."""
    suffix = path.suffix.lower()
    if suffix in SUFFIXES:
        return None
    if suffix in _UNREAD:
        return f"{suffix} images, which can't be read"
    if suffix in _TEXTS or not path.is_file():
        return "not images"
    if path.name.lower().endswith((".nii", ".nii.gz")):
        return "volumes (NIfTI), which can't be read"
    return None if is_dicom(path) or _opens(path) else "not images"


def _opens(path: Path) -> bool:
    try:
        with Image.open(path, formats=_FORMATS):
            return True
    except Exception:  # of any kind, from any decoder
        return False


def _like_masks(images: Mapping[str, Path]) -> list[str]:
    """Names that are another image's and a word for a mask, or its name in a folder of masks."""
    stems: dict[str, set[str]] = {}  # by folder
    below: dict[str, set[str]] = {}  # the same, of all folders below that are not of masks
    for name in images:
        *folders, file = name.split("/")
        stem = Path(file).stem
        stems.setdefault("/".join(folders), set()).add(stem)
        if not any(_FOLDER.fullmatch(folder) for folder in folders):
            for end in range(len(folders) + 1):
                below.setdefault("/".join(folders[:end]), set()).add(stem)
    found = []
    for name in images:
        *folders, file = name.split("/")
        stem = Path(file).stem
        shorter = {_AFTER.sub("", stem), _BEFORE.sub("", stem)}
        beside = stems["/".join(folders)] & (shorter - {stem})
        masks = [i for i, folder in enumerate(folders) if _FOLDER.fullmatch(folder)]
        apart = masks and below.get("/".join(folders[: masks[0]]), set()) & (shorter | {stem})
        if beside or apart:
            found.append(name)
    return found


def _has_few_values(path: Path) -> bool:
    """True if eight values have nine of ten pixels: also of a mask that JPEG has blurred."""
    try:
        with path.open("rb") as file, Image.open(file) as image:
            check_pixels(image.width * image.height)
            coloured = image.mode not in {"1", "L", "P"} and not image.mode.startswith(("I", "F"))
            pixels = np.asarray(image.convert("L") if coloured else image)
    except Exception:  # said when the images are read
        return False
    step = max(1, max(pixels.shape) // 512)
    _, counts = np.unique(pixels[::step, ::step], return_counts=True)
    return bool(np.sort(counts)[-8:].sum() >= 0.9 * counts.sum())
