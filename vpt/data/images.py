"""Image files: checked, and read as RGB whatever their mode; samples made of them."""

import hashlib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from vpt import targets
from vpt.config import Window
from vpt.data.dicom import read_frame
from vpt.data.pixels import Range, decode
from vpt.errors import InputError
from vpt.targets import Target

SUFFIXES = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".bmp", ".dib", ".tif", ".tiff"),
    *(".webp", ".gif", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".avif", ".avifs", ".qoi", ".tga"),
    *(".jp2", ".j2k", ".jpx", ".jpf", ".jpc", ".j2c"),
}
_DICOM_SUFFIXES = {".dcm", ".dicom"}
_ORIENTATION, _ON_THE_SIDE = 0x0112, {5, 6, 7, 8}  # EXIF: width and height change places


@dataclass(frozen=True, eq=False)
class Samples:
    """Images with their labels, as files or as one uint8 array (N, H, W) or (N, H, W, 3).

    `labels` are of the kind that `target` says, which is recognised unless it is given: class
    numbers (N,) int64, or of multilabel data (N, C) float32 of 0 and 1. `names` identify the
    samples wherever the data lie: the path below the root, or `train/17` in an array. `windows` are
    those that DICOM files are read through.
    """

    images: Sequence[Path] | np.ndarray
    labels: np.ndarray
    names: list[str]
    patients: list[str] | None = None
    windows: tuple[Window, ...] | None = None
    target: Target = None

    def __post_init__(self) -> None:
        if self.target is None:
            object.__setattr__(self, "target", targets.of(self.labels))

    def __len__(self) -> int:
        return len(self.labels)

    def class_counts(self, num_classes: int) -> np.ndarray:
        """Number of images of each class, (num_classes,)."""
        return self.target.class_counts(self.labels, num_classes)

    def take(self, indices: Sequence[int] | np.ndarray) -> "Samples":
        """The samples at `indices`, in that order."""
        chosen = np.asarray(indices, dtype=np.int64)
        whole = isinstance(self.images, np.ndarray)
        return replace(
            self,
            images=self.images[chosen] if whole else [self.images[i] for i in chosen],
            labels=self.labels[chosen],
            names=[self.names[i] for i in chosen],
            patients=self.patients and [self.patients[i] for i in chosen],
        )

    def of_classes(self, classes: Sequence[int]) -> "Samples":
        """The samples with these labels, in rising order, which become 0, 1, …"""
        chosen = self.take(np.flatnonzero(np.isin(self.labels, classes)))
        return replace(chosen, labels=np.searchsorted(classes, chosen.labels))

    def content_hash(self) -> str:
        """SHA-256 of the images' own bytes, in their order, and of the windows."""
        hashed = hashlib.sha256(",".join(self.windows or ()).encode())
        hashed.update(b"".join(self.hashes()))
        return hashed.hexdigest()

    def hashes(self) -> list[bytes]:
        """SHA-256 of each image's own bytes."""
        return [
            _file_hash(i, i.stat().st_size, i.stat().st_mtime_ns)
            if isinstance(i, Path)
            else hashlib.sha256(i.tobytes()).digest()
            for i in self.images
        ]

    def join(self, other: "Samples") -> "Samples":
        """These samples, then those of `other`, a part of the same data."""
        whole, both = isinstance(self.images, np.ndarray), (self.images, other.images)
        return replace(
            self,
            images=np.concatenate(both) if whole else [*both[0], *both[1]],
            labels=np.concatenate([self.labels, other.labels]),
            names=self.names + other.names,
            patients=self.patients and self.patients + (other.patients or []),
        )

    def read(self, index: int, least: int | None = None, grey: Range | None = None) -> Image.Image:
        """One image as RGB; see `read_image` for `least` and `grey`."""
        image = self.images[index]
        if isinstance(image, np.ndarray):
            return array_to_image(image)
        return read_image(image, least, self.windows, grey)


@cache
def _file_hash(path: Path, size: int, modified: int) -> bytes:
    """SHA-256 of a file, which is read again only if its size or time has changed."""
    return hashlib.sha256(path.read_bytes()).digest()


def samples_of(
    root: Path, files: Sequence[tuple[str, int]], patients: list[str] | None = None
) -> Samples:
    """Samples of (path below `root`, label) pairs."""
    names = [name for name, _ in files]
    labels = np.array([label for _, label in files], dtype=np.int64)
    return Samples([located(root / name) for name in names], labels, names, patients)


def located(path: Path) -> Path:
    """`path` in the one of Unicode's forms (NFC, NFD) that is there, else as it is."""
    if str(path).isascii() or path.is_file():
        return path
    forms = (Path(unicodedata.normalize(form, str(path))) for form in ("NFC", "NFD"))
    return next((form for form in forms if form.is_file()), path)


def is_dicom(path: Path) -> bool:
    """By its suffix or, as archives of hospitals give none, by its first bytes."""
    suffix = path.suffix.lower()
    if suffix in SUFFIXES | _DICOM_SUFFIXES:
        return suffix in _DICOM_SUFFIXES
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM" and path.name != "DICOMDIR"


def read_image(
    path: Path,
    least: int | None = None,
    windows: tuple[Window, ...] | None = None,
    grey: Range | None = None,
) -> Image.Image:
    """The image as RGB, as `pixels.decode` says; DICOM as `dicom.read_frame` does.

    Args:
        path: an image file.
        least: a JPEG is decoded at the smallest of its scales (1/8 to 1) that leaves so many pixels
            a side: faster.
        windows: DICOM is read through them.
        grey: the range of grey images with more than 8 bits, see `Preprocess.grey_range`.

    Raises:
        InputError: the file is missing, truncated, too large, encrypted or not an image; not CT,
            but there are windows.
    """
    try:
        return read_pixels(path, least, windows, grey)[0]
    except InputError:
        raise
    except Exception as error:  # decoders raise anything: OSError, SyntaxError, struct.error, …
        raise InputError(
            f"{path}: not an image that can be read ({reason(error)}): replace or remove it"
        ) from None


def array_to_image(array: np.ndarray) -> Image.Image:
    """RGB image of a uint8 array (H, W), (H, W, 1) or (H, W, 3).

    Raises:
        InputError: another shape or type.
    """
    channels = array.shape[2:]
    if array.dtype != np.uint8 or array.ndim < 2 or channels not in {(), (1,), (3,)}:
        raise InputError(
            f"image array of shape {array.shape} and type {array.dtype}: "
            "expects uint8 and (H, W), (H, W, 1) or (H, W, 3)"
        )
    return Image.fromarray(array[..., 0] if channels == (1,) else array).convert("RGB")


def read_pixels(
    path: Path, least: int | None, windows: tuple[Window, ...] | None, grey: Range | None
) -> tuple[Image.Image, Range | None]:
    """The image as `read_image` has it; and, of grey of more than 8 bits, its range, else None.

    Raises:
        Exception: anything, for decoders raise anything; see `reason`.
    """
    if is_dicom(path):
        return array_to_image(read_frame(path, windows)), None
    if windows:
        raise ValueError("data.windows is for DICOM, which it is not")
    with path.open("rb") as file:
        return decode(file, least, grey)


def upright_size(path: Path) -> tuple[int, int]:
    """Width and height of an image file as it is seen, from its header.

    Raises:
        InputError: not an image.
    """
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(_ORIENTATION) in _ON_THE_SIDE
            return image.size[::-1] if turned else image.size
    except Exception as error:  # decoders raise anything
        raise InputError(
            f"{path}: not an image that can be read ({reason(error)}): replace or remove it"
        ) from None


def reason(error: Exception) -> str:
    """Why an image can't be read, in a line."""
    if isinstance(error, UnidentifiedImageError):
        return "no known image format"
    message = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return message.splitlines()[0]
