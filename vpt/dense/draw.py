"""Objects drawn over their image."""

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vpt.dense.detector import Objects
from vpt.evaluation.lettering import labels
from vpt.files import write_atomically


def draw_objects(
    image: Image.Image, objects: Objects, class_names: Sequence[str], path: Path
) -> None:
    """Write `image` as PNG with a frame around each object, its class and its score."""
    image, names = image.copy(), labels(class_names)
    side = max(10, min(image.size) // 40)
    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    pen, font = ImageDraw.Draw(image), ImageFont.truetype(fonts / "DejaVuSans.ttf", side)
    colours = matplotlib.colormaps["tab10"].colors
    for box, label, score in zip(*(part.tolist() for part in objects), strict=True):
        colour = tuple(round(255 * value) for value in colours[label % len(colours)])
        pen.rectangle(box, outline=colour, width=max(1, side // 8))
        pen.text((box[0] + 2, box[1] + 1), f"{names[label]} {score:.2f}", fill=colour, font=font)
    save_png(image, path)


def draw_masks(image: Image.Image, numbers: np.ndarray, path: Path) -> None:
    """Write `image` as PNG with pixels tinted by their `numbers` (h, w), but those of 0."""
    colours = np.array([(0, 0, 0), *matplotlib.colormaps["tab10"].colors]) * 255
    tints = colours[np.where(numbers > 0, (numbers - 1) % (len(colours) - 1) + 1, 0)]
    pixels = np.asarray(image, np.float64)
    tinted = np.where((numbers > 0)[..., None], 0.5 * pixels + 0.5 * tints, pixels)
    save_png(Image.fromarray(tinted.round().astype(np.uint8)), path)


def save_png(image: Image.Image, path: Path) -> None:
    """Write a PNG, atomically."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    write_atomically(path, buffer.getvalue())
