"""Draws docs/idea.png: a prompt is extra rows of keys and values in a frozen attention layer.

python docs/draw_idea.py [FILE]
"""

import sys
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Ellipse, FancyArrowPatch, Rectangle

FROZEN, LEARNED, INK, NOTE = "#3b6ea8", "#e07b1a", "#222222", "#666666"
TOKENS, PROMPTS, WIDTH = 10, 3, 6  # tokens: the class token and nine patches; numbers a row
CELL, GAP = 0.3, 0.12  # side of a number's cell; gap between prompt and image rows
TOP = 0.0  # of the image rows; a prompt's stand above
Point = tuple[float, float]


def main(path: Path) -> None:
    """Draw the picture into `path`."""
    figure = Figure(figsize=(11.5, 3.5))
    axes = figure.add_axes((0, 0, 1, 1))
    rng = np.random.default_rng(3)
    draw_image(axes, left=0.2)
    draw_rows(axes, 3.2, rng, label="tokens")
    axes.text(4.1, TOP + 0.1, "class, then patches", ha="center", color=NOTE, fontsize=9)
    draw_rows(axes, 6.5, rng, label="queries")
    draw_rows(axes, 9.0, rng, label="keys", prompts=True)
    draw_rows(axes, 11.5, rng, label="values", prompts=True)
    draw_attention(axes, 14.7, rng)
    draw_rows(axes, 20.2, rng, label="next block")

    middle = TOP - TOKENS * CELL / 2
    arrow(axes, (2.35, middle), (3.1, middle))
    arrow(axes, (5.1, middle), (6.4, middle), "frozen\nweights")
    arrow(axes, (13.4, middle), (14.6, middle), "softmax")
    arrow(axes, (18.75, middle), (20.1, middle), "× values,\nfrozen MLP")

    top, bottom = TOP + GAP + PROMPTS * CELL, TOP - TOKENS * CELL
    notes = [
        (4.1, bottom - 1, FROZEN, "the frozen backbone,\nshared by all prompts"),
        (11.15, top + 0.55, LEARNED, "the prompt: learned, the same for every image"),
        (11.15, bottom - 1, LEARNED, "extra rows for the image's tokens to attend to: no query,\n"
         "no output, no MLP of their own, and constant at inference"),
        (21.1, bottom - 1, LEARNED, "there, a prompt\nof its own"),
    ]  # fmt: skip
    for x, y, color, note in notes:
        axes.text(x, y, note, color=color, ha="center", va="top", weight="bold")
    axes.set(xlim=(0, 22.6), ylim=(bottom - 1.8, top + 0.7), aspect="equal")
    axes.set_axis_off()
    figure.savefig(path, dpi=150, facecolor="white", bbox_inches="tight")


def draw_image(axes: Axes, left: float) -> None:
    """A flower, cut into nine patches."""
    side = 2.0
    middle = TOP - TOKENS * CELL / 2
    bottom = middle - side / 2
    frame = Rectangle((left, bottom), side, side, facecolor="#dcebd8", edgecolor="none")
    axes.add_patch(frame)
    x, y = left + side / 2, middle + 0.2
    parts = [Rectangle((x - 0.04, bottom), 0.08, y - bottom, color="#5b8c4a")]
    for angle in np.arange(0, 360, 60):
        turn = np.deg2rad(angle)
        at = (x + 0.36 * np.cos(turn), y + 0.36 * np.sin(turn))
        parts.append(Ellipse(at, 0.56, 0.32, angle=angle, color="#c9508a"))
    parts.append(Circle((x, y), 0.2, color="#f2c230"))
    for part in parts:
        axes.add_patch(part)
        part.set_clip_path(frame)
    for step in range(4):
        at = side * step / 3
        axes.plot([left, left + side], [bottom + at] * 2, color="white", lw=1.6)
        axes.plot([left + at] * 2, [bottom, bottom + side], color="white", lw=1.6)
    axes.text(x, bottom - 0.25, "image", ha="center", va="top", color=INK)


def draw_rows(
    axes: Axes, left: float, rng: np.random.Generator, label: str, prompts: bool = False
) -> None:
    """A row of numbers for each token, with `prompts` those of the prompt above them."""
    for row in range(TOKENS):
        draw_row(axes, (left, TOP - (row + 1) * CELL), FROZEN, rng.uniform(0.2, 0.8, WIDTH))
    if prompts:
        for row in range(PROMPTS):
            at = (left, TOP + GAP + row * CELL)
            draw_row(axes, at, LEARNED, rng.uniform(0.35, 1, WIDTH))
    x = left + WIDTH * CELL / 2
    axes.text(x, TOP - TOKENS * CELL - 0.15, label, ha="center", va="top", color=INK)


def draw_row(axes: Axes, at: Point, color: str, strengths: np.ndarray) -> None:
    """Cells side by side, each tinted by its strength in 0..1."""
    for column, strength in enumerate(strengths):
        tint = 1 - strength * (1 - np.array(to_rgb(color)))
        corner = (at[0] + column * CELL, at[1])
        axes.add_patch(Rectangle(corner, CELL, CELL, facecolor=tint, edgecolor="white", lw=0.8))


def draw_attention(axes: Axes, left: float, rng: np.random.Generator) -> None:
    """The attention matrix: a row a query, a column a key, the prompt's columns first."""
    logits = rng.normal(size=(TOKENS, PROMPTS + TOKENS))
    logits[:, :PROMPTS] += rng.normal(0.6, 0.6, PROMPTS)
    weights = np.exp(logits)
    strengths = (weights / weights.max(1, keepdims=True)) ** 0.7
    for row in range(TOKENS):
        y = TOP - (row + 1) * CELL
        draw_row(axes, (left, y), LEARNED, strengths[row, :PROMPTS])
        draw_row(axes, (left + PROMPTS * CELL + GAP, y), FROZEN, strengths[row, PROMPTS:])
    x = left + ((PROMPTS + TOKENS) * CELL + GAP) / 2
    axes.text(x, TOP - TOKENS * CELL - 0.15, "attention", ha="center", va="top", color=INK)
    axes.text(left - 0.1, TOP + 0.1, "prompt", va="bottom", color=LEARNED)
    at = left + PROMPTS * CELL + GAP + TOKENS * CELL / 2
    axes.text(at, TOP + 0.1, "image", ha="center", va="bottom", color=FROZEN)


def arrow(axes: Axes, start: Point, end: Point, label: str = "") -> None:
    """An arrow with a label above it."""
    style = {"arrowstyle": "-|>", "mutation_scale": 12, "color": NOTE, "lw": 1.2}
    axes.add_patch(FancyArrowPatch(start, end, **style))
    x = (start[0] + end[0]) / 2
    axes.text(x, start[1] + 0.15, label, ha="center", va="bottom", color=NOTE, fontsize=9)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("idea.png"))
