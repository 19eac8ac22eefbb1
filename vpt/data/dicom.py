"""DICOM files: pixels as a viewer shows them, or through CT windows; patients told apart."""

import logging
import warnings
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vpt.config import Window
from vpt.data.pixels import check_pixels
from vpt.errors import InputError

# Centre and width in Hounsfield units: https://radiopaedia.org/articles/windowing-ct
WINDOWS: dict[Window, tuple[int, int]] = {
    "lung": (-600, 1500),
    "mediastinum": (50, 350),
    "abdomen": (50, 400),
    "liver": (30, 150),
    "bone": (400, 1800),
    "brain": (40, 80),
    "stroke": (40, 40),
}


def read_frame(path: Path | BinaryIO, windows: tuple[Window, ...] | None = None) -> np.ndarray:
    """The image, of several frames the middle one, as uint8 (H, W) or (H, W, 3).

    Grey: modality transform, then the file's own first VOI table or window (PS3.3 C.11.2); where
    it has none, 8 bits as they are, and more from the frame's darkest to its brightest value.
    MONOCHROME1 is inverted, so that high is bright. Colours become RGB. All of it in floating
    point, rounded to 8 bits at the end.

    Args:
        path: a DICOM file, or one opened for reading bytes.
        windows: names of `WINDOWS`, one a channel, instead of the file's own window and polarity:
            for CT only.

    Raises:
        ValueError: what is wrong, with no value of the header in it.
        InputError: pydicom is not installed.
    """
    pydicom = _pydicom()
    try:
        dataset = pydicom.dcmread(path)
    except OSError:
        raise
    except Exception:
        raise ValueError("not whole DICOM, or encrypted") from None
    if "PixelData" not in dataset:
        raise ValueError("DICOM without pixels")
    if windows and dataset.get("Modality") != "CT":
        raise ValueError("data.windows is for CT, which it is not")
    check_pixels(int(dataset.get("Rows") or 0) * int(dataset.get("Columns") or 0))
    try:
        values = _values(dataset, windows)
    except Exception:  # of any kind, and with values of the header in its words
        stored = dataset.file_meta.get("TransferSyntaxUID")
        kind = stored.name if stored and stored.is_transfer_syntax else "an unknown transfer syntax"
        units = ", not in Hounsfield units" if windows else ""
        raise ValueError(f"damaged DICOM{units}, or not supported: {kind}") from None
    return np.rint(values.clip(0, 1) * 255).astype(np.uint8)


def patient(path: Path) -> str:
    """Identifier of a DICOM file's patient: for memory only, never to be shown.

    The patient's ID, else the study's, else (also where the file can't be read) the path.

    Raises:
        InputError: pydicom is not installed.
    """
    pydicom = _pydicom()
    tags = ["PatientID", "StudyInstanceUID"]
    try:
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=tags)
    except Exception:
        return str(path)
    return str(header.get("PatientID") or header.get("StudyInstanceUID") or path)


def _values(dataset: Any, windows: tuple[Window, ...] | None) -> np.ndarray:
    """0–1, (H, W) or (H, W, 3)."""
    from pydicom.pixels import apply_color_lut, apply_modality_lut, pixel_array

    index = int(dataset.get("NumberOfFrames") or 1) // 2
    pixels = pixel_array(dataset, index=index)  # YBR as RGB
    kind = dataset.PhotometricInterpretation
    if kind == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, dataset)
        return pixels / np.iinfo(pixels.dtype).max
    if pixels.ndim == 3:
        return pixels / (2**dataset.BitsStored - 1)
    _use_functional_groups(dataset, index)
    values = apply_modality_lut(pixels, dataset).astype(np.float64)
    if windows:
        if "RescaleIntercept" not in dataset:
            raise ValueError("not in Hounsfield units")
        # a window is of Hounsfield units, which the file's polarity does not change
        return np.stack([_window(values, *WINDOWS[name]) for name in windows], axis=-1)
    grey = _voi(values, dataset)
    return 1 - grey if kind == "MONOCHROME1" else grey


def _use_functional_groups(dataset: Any, index: int) -> None:
    """Enhanced files keep a frame's rescale and window in groups: put them where others do."""
    shared = dataset.get("SharedFunctionalGroupsSequence") or []
    own = dataset.get("PerFrameFunctionalGroupsSequence") or []
    for group in [*shared, *own[index : index + 1]]:
        for macro in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
            for item in group.get(macro) or []:
                dataset.update(item)


def _voi(values: np.ndarray, dataset: Any) -> np.ndarray:
    if dataset.get("VOILUTSequence"):
        return _table(values, dataset.VOILUTSequence[0])
    if dataset.get("WindowCenter") is not None:
        center, width = (np.ravel(dataset[key].value)[0] for key in ("WindowCenter", "WindowWidth"))
        function = dataset.get("VOILUTFunction") or "LINEAR"
        return _window(values, float(center), float(width), function)
    low, high = (0, 255) if dataset.BitsStored == 8 else (values.min(), values.max())
    return (values - low) / max(high - low, 1e-12)


def _table(values: np.ndarray, lut: Any) -> np.ndarray:
    entries, first, bits = lut.LUTDescriptor
    table = lut.LUTData
    if isinstance(table, bytes):
        table = np.frombuffer(table, "u1" if len(table) < 2 * (entries or 2**16) else "<u2")
    places = (values - first).clip(0, (entries or 2**16) - 1).astype(int)
    return np.asarray(table)[places] / (2**bits - 1)


def _window(
    values: np.ndarray, center: float, width: float, function: str = "LINEAR"
) -> np.ndarray:
    if function == "SIGMOID":
        return 1 / (1 + np.exp(-4 * (values - center) / width))
    if function == "LINEAR":
        center, width = center - 0.5, width - 1
    return ((values - center) / max(width, 1e-12) + 0.5).clip(0, 1)


@cache
def _pydicom() -> Any:
    try:
        import pydicom
    except ModuleNotFoundError:
        raise InputError(
            "DICOM needs pydicom: pip install 'visual-prompt-tuning[medical]'"
        ) from None
    warnings.filterwarnings("ignore", module="pydicom")  # they quote values of headers
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    return pydicom
