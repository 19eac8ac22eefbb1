"""Images out of a request's body, in memory: raw, multipart, or base64 in JSON."""

import asyncio
import base64
import binascii
import io
import json
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from vpt.data.dicom import read_frame
from vpt.data.images import array_to_image, reason
from vpt.data.pixels import KEPT_PIXELS, decode
from vpt.data.transforms import Preprocess
from vpt.errors import InputError

Result = TypeVar("Result")
_KINDS = {"multipart/form-data": "multipart", "application/json": "json"}
Image.init()
_FORMATS = [  # no others: EPS, for one, runs a program and writes files
    name
    for name in (
        *("JPEG", "MPO", "PNG", "BMP", "DIB", "TIFF", "WEBP", "GIF", "PPM", "AVIF", "QOI"),
        "JPEG2000",
    )
    if name in Image.OPEN
]
_DEFLATED = b"1.2.840.10008.1.2.1.99"  # DICOM that is inflated before anything in it is known


class Refused(Exception):
    """A request that is answered with `status` and one line."""

    def __init__(self, status: int, line: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(line)
        self.status, self.line, self.headers = status, line, dict(headers or {})


class Upload(NamedTuple):
    """Image files of a request, and its parameters."""

    files: list[bytes]
    parameters: dict[str, Any]


def kind_of(content_type: str) -> str:
    """`raw`, `multipart` or `json`.

    Raises:
        Refused: something else.
    """
    kind = content_type.partition(";")[0].strip().lower()
    if kind in {"", "application/octet-stream", "application/dicom"} or kind.startswith("image/"):
        return "raw"
    if kind in _KINDS:
        return _KINDS[kind]
    raise Refused(
        415, "Content-Type: give image/* (a raw image), multipart/form-data or application/json"
    )


def parse(body: bytes, headers: Headers, max_files: int) -> Upload:
    """The image files in `body`, none of them decoded yet.

    Raises:
        Refused: not of its Content-Type, no image, or more than `max_files`.
    """
    kind = kind_of(headers.get("content-type", ""))
    if kind == "raw":
        upload = Upload([body], {})
    else:
        upload = _form(body, headers, max_files) if kind == "multipart" else _json(body)
    if len(upload.files) > max_files:
        raise Refused(413, f"{len(upload.files)} images: give at most {max_files} a request")
    if not any(upload.files):
        raise Refused(400, "no image: send its bytes as the body, or as multipart or base64")
    return upload


def read_upload(data: bytes, preprocess: Preprocess, metadata: Mapping[str, Any]) -> np.ndarray:
    """An image file as `preprocess` crops it for the artefact of `metadata`, uint8 (H, W, 3).

    Raises:
        Refused: as `open_upload`.
    """

    def crop(image: Image.Image) -> np.ndarray:
        short, long = sorted(image.size)
        if long * preprocess.image_size**2 / (short * preprocess.crop_pct**2) > KEPT_PIXELS:
            raise ValueError(f"{image.width} × {image.height} pixels are too long and thin")
        return preprocess.crop()(image)

    return open_upload(data, metadata, crop)


def open_upload(
    data: bytes, metadata: Mapping[str, Any], use: Callable[[Image.Image], Result]
) -> Result:
    """Result of `use` on an image file for the artefact of `metadata`.

    As `vpt predict` reads it: upright, through the artefact's grey range and CT windows.

    Raises:
        Refused: not an image, damaged, or too large.
    """
    try:
        return use(_read(data, metadata))
    except InputError as error:
        raise Refused(415, str(error)) from None
    except UnidentifiedImageError:
        raise Refused(415, "no known image format: send JPEG, PNG, TIFF, WebP or DICOM") from None
    except Exception as error:  # decoders raise anything
        raise Refused(422, f"not an image that can be read ({reason(error)})") from None


def _read(data: bytes, metadata: Mapping[str, Any]) -> Image.Image:
    windows = metadata.get("data", {}).get("windows")
    file = io.BytesIO(data)
    if data[128:132] == b"DICM":
        if _DEFLATED in data:
            raise ValueError("deflated DICOM: send it in another transfer syntax")
        return array_to_image(read_frame(file, tuple(windows) if windows else None))
    if windows:
        raise ValueError("this task's images are CT as DICOM, which it is not")
    return decode(file, grey=metadata.get("preprocess", {}).get("grey_range"), formats=_FORMATS)[0]


class _InMemory(MultiPartParser):
    spool_max_size = 0  # no size at which a part would go to a file


def _form(body: bytes, headers: Headers, max_files: int) -> Upload:
    async def stream() -> AsyncIterator[bytes]:
        yield body

    try:
        form = asyncio.run(_InMemory(headers, stream(), max_files=max_files, max_fields=8).parse())
    except MultiPartException as error:
        raise Refused(400, f"not multipart/form-data: {error.message}") from None
    except Exception:  # such as a boundary that is missing
        raise Refused(400, "not multipart/form-data") from None
    files = [part for _, part in form.multi_items() if isinstance(part, UploadFile)]
    return Upload([part.file.read() for part in files], {})


def _json(body: bytes) -> Upload:
    try:
        values = json.loads(body)
        inputs, parameters = values["inputs"], values.get("parameters") or {}
        texts = [inputs] if isinstance(inputs, str) else inputs
        if not isinstance(texts, list) or not isinstance(parameters, dict):
            raise TypeError
        return Upload([base64.b64decode(text, validate=True) for text in texts], parameters)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, binascii.Error):
        raise Refused(
            400, 'not JSON such as {"inputs": BASE64 or [BASE64, …], "parameters": {…}}'
        ) from None
