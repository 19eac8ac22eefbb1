"""Images of the project's own making, and tasks for a page that was given none."""

import random
from math import cos, pi, sin
from pathlib import Path

from PIL import Image, ImageDraw

from vpt.config import load_run
from vpt.folder import RunFolder
from vpt.run import run

SHAPES = ("circle", "square", "triangle", "star")
COLOURS = {"red": "#d03030", "green": "#209040", "blue": "#3060d0", "yellow": "#e0b020"}
SIDE = 96  # pixels


def draw(shape: str, colour: str, seed: int) -> Image.Image:
    """A drawn shape somewhere on a light ground."""
    rng = random.Random(f"{shape} {colour} {seed}")
    image = Image.new("RGB", (SIDE, SIDE), tuple(rng.randint(225, 255) for _ in range(3)))
    size = rng.uniform(0.22, 0.36) * SIDE
    x, y = (rng.uniform(size, SIDE - size) for _ in range(2))
    pen, fill = ImageDraw.Draw(image), COLOURS[colour]
    if shape == "circle":
        pen.ellipse((x - size, y - size, x + size, y + size), fill=fill)
    else:
        corners = {"square": 4, "triangle": 3, "star": 5}[shape]
        turn = rng.uniform(-12, 12) + (45 if shape == "square" else 0)
        if shape == "star":
            pen.polygon(_star(x, y, size, turn), fill=fill)
        else:
            pen.regular_polygon((x, y, size), corners, rotation=turn, fill=fill)
    return image


def _star(x: float, y: float, size: float, turn: float) -> list[tuple[float, float]]:
    radii = [size, 0.42 * size] * 5
    angles = [(turn - 90) * pi / 180 + number * pi / 5 for number in range(10)]
    return [(x + r * cos(a), y + r * sin(a)) for r, a in zip(radii, angles, strict=True)]


def write_folder(folder: Path, count: int, by: str = "shape") -> Path:
    """Write `count` drawings of each class into a folder a class: by `shape`, or by `colour`."""
    for number in range(count):
        rng = random.Random(number)
        for shape in SHAPES:
            for colour in COLOURS:
                name = shape if by == "shape" else colour
                path = folder / name / f"{shape}-{colour}-{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                draw(shape, colour, rng.randint(0, 10**6)).save(path)
    return folder


def train_tasks(folder: Path, scratch: Path) -> None:
    """Train the tasks `shapes`, `colours` and `shapes-probe` on drawings, with decisions.

    Args:
        folder: gets NAME.safetensors of each.
        scratch: for what is needed meanwhile.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, by, method in (
        ("shapes", "shape", "ss_text"),
        ("shapes-probe", "shape", "linear_probe"),
        ("colours", "colour", "ss_text"),
    ):
        root = write_folder(scratch / by, 6, by)
        keys = [f"data.root={root}", "data.shots=6", "data.calibration=0.3"]
        keys += ["decision.temperature=true", "decision.coverage=0.9", f"out={scratch / name}"]
        config = load_run(method, ["backbone.name=tiny_clip", *keys])
        run(config, log=lambda line: None, progress=False)
        RunFolder(config.out).prompt.replace(folder / f"{name}.safetensors")
