"""Objects drawn over their image."""

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib
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
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    write_atomically(path, buffer.getvalue())
