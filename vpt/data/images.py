"""Image files: checked, and read as RGB whatever their mode; samples made of them."""

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vpt import targets
from vpt.config import Window
from vpt.data.dicom import read_frame
from vpt.errors import InputError
from vpt.targets import Target

SUFFIXES = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".bmp", ".dib", ".tif", ".tiff"),
    *(".webp", ".gif", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".avif", ".avifs", ".qoi", ".tga"),
    *(".jp2", ".j2k", ".jpx", ".jpf", ".jpc", ".j2c"),
}
_DICOM_SUFFIXES = {".dcm", ".dicom"}


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
        """How many images each class has, (num_classes,)."""
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

    def content_hash(self) -> str:
        """SHA-256 of the images' own bytes, in their order, and of the windows."""
        hashed = hashlib.sha256(",".join(self.windows or ()).encode())
        for image in self.images:
            data = image.read_bytes() if isinstance(image, Path) else image.tobytes()
            hashed.update(hashlib.sha256(data).digest())
        return hashed.hexdigest()

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

    def read(self, index: int, least: int | None = None) -> Image.Image:
        """One image as RGB; see `read_image` for `least`."""
        image = self.images[index]
        if isinstance(image, np.ndarray):
            return array_to_image(image)
        return read_image(image, least, self.windows)


def samples_of(
    root: Path, files: Sequence[tuple[str, int]], patients: list[str] | None = None
) -> Samples:
    """Samples of (path below `root`, label) pairs."""
    names = [name for name, _ in files]
    labels = np.array([label for _, label in files], dtype=np.int64)
    return Samples([root / name for name in names], labels, names, patients)


def is_dicom(path: Path) -> bool:
    """By its suffix or, as archives of hospitals give none, by its first bytes."""
    suffix = path.suffix.lower()
    if suffix in SUFFIXES | _DICOM_SUFFIXES:
        return suffix in _DICOM_SUFFIXES
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM" and path.name != "DICOMDIR"


def read_image(
    path: Path, least: int | None = None, windows: tuple[Window, ...] | None = None
) -> Image.Image:
    """The image as RGB, upright by its EXIF orientation, transparency on white.

    16-bit grey is scaled from its full range, 0–65535 (see `_grey8`). With `least`, a JPEG is
    decoded at the smallest of its scales (1/8 to 1) that leaves so many pixels a side: faster.
    DICOM is read as `dicom.read_frame` says, through `windows` if there are any.

    Raises:
        InputError: the file is missing, truncated, too large, encrypted or not an image; not CT,
            but there are windows.
    """
    try:
        return _decode(path, least, windows)
    except InputError:
        raise
    except Exception as error:  # decoders raise anything: OSError, SyntaxError, struct.error, …
        raise InputError(
            f"{path}: not an image that can be read ({_reason(error)}): replace or remove it"
        ) from None


def check_images(
    paths: Sequence[Path],
    windows: tuple[Window, ...] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Decode every file once, JPEG at 1/8 scale; `progress(done, total)` after each.

    Raises:
        InputError: names the first three that can't be read, and says how many there are.
    """
    bad = []
    with ThreadPoolExecutor() as pool:  # Pillow's decoders release the GIL
        for done, problem in enumerate(pool.map(partial(_problem, windows), paths), start=1):
            if problem:
                bad.append(problem)
            if progress:
                progress(done, len(paths))
    if bad:
        more = ", …" if len(bad) > 3 else ""
        raise InputError(
            f"{len(bad)} of {len(paths)} images can't be read: {', '.join(bad[:3])}{more}: "
            "replace or remove them"
        )


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


def _decode(path: Path, least: int | None, windows: tuple[Window, ...] | None) -> Image.Image:
    if is_dicom(path):
        return array_to_image(read_frame(path, windows))
    if windows:
        raise ValueError("data.windows is for DICOM, which it is not")
    # Not Image.open(path): Pillow then maps a TIFF with an EXIF orientation with its sides swapped.
    with path.open("rb") as file, Image.open(file) as opened:
        if least:
            opened.draft(None, (least, least))
        image = ImageOps.exif_transpose(opened)
    if image.mode.startswith(("I", "F")):  # I, I;16, I;16B, F
        image = _grey8(image)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        image = white
    return image.convert("RGB")


def _grey8(image: Image.Image) -> Image.Image:
    # Pillow's own conversion to 8 bits clips at 255, which turns a 16-bit scan white. The scale is
    # the same for all images (not each one's own maximum), so that brightness stays comparable.
    pixels = np.asarray(image).astype(np.float64)
    low, high = pixels.min(), pixels.max()
    full = 1 if image.mode == "F" and high <= 1 else 65535  # float files hold 0–1 or 16-bit values
    if not (low >= 0 and high <= full):  # also NaN
        raise ValueError(f"grey values {low:g} to {high:g} are not within 0 to 65535")
    return Image.fromarray(np.rint(pixels * 255 / full).astype(np.uint8))


def _problem(windows: tuple[Window, ...] | None, path: Path) -> str | None:
    try:
        _decode(path, least=1, windows=windows)
    except InputError:
        raise
    except Exception as error:
        return f"{path} ({_reason(error)})"
    return None


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "no known image format"
    message = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return message.splitlines()[0]
