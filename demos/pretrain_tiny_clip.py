"""Pretrains the package's own tiny CLIP on two CPU cores, or evaluates it (`--eval`).

Images: Tiny-ImageNet at 32 px, and digits, letters and coloured shapes rendered here.
scikit-learn's `load_digits` is read for evaluation alone; no image of it is trained on.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import random
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from safetensors.torch import save as to_bytes
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from vpt.backbones import load_tiny_clip

CONFIG: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": 128,
        "quick_gelu": False,
        "vision_cfg": {
            "image_size": 32, "patch_size": 4, "width": 160, "layers": 6, "head_width": 32,
        },
        "text_cfg": {
            "context_length": 32, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 3,
        },
    },
    "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"},
}  # fmt: skip
PHOTOS, DIGITS, LETTERS, SHAPES = 136, 32, 8, 16  # images of a batch

# ---------------------------------------------------------------- captions
# fmt: off
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
LETTER_NAMES = "acdefhjkmnprtuvwxy"  # without those that look like a digit or each other
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.9, 0.1, 0.1), "green": (0.1, 0.7, 0.2), "blue": (0.1, 0.2, 0.9),
    "yellow": (0.95, 0.9, 0.1), "purple": (0.55, 0.1, 0.7), "orange": (1.0, 0.55, 0.05),
    "white": (1.0, 1.0, 1.0), "black": (0.02, 0.02, 0.02),
}
SHAPE_NAMES = ["circle", "square", "triangle", "star", "cross", "ring", "diamond", "hexagon",
               "heart", "line"]
PLAIN = ["a photo of a {}.", "a photo of the {}.", "a {}.", "{}", "{}.", "the {}."]
TEMPLATES = [
    "a bad photo of a {}.", "a good photo of the {}.", "a blurry photo of a {}.",
    "itap of a {}.", "an image of a {}.", "a picture of a {}.", "a drawing of a {}.",
    "a photo of a small {}.", "a photo of a large {}.", "a photo of many {}.",
    "a cropped photo of the {}.", "a close-up photo of a {}.", "a bright photo of the {}.",
    "a dark photo of the {}.", "a photo of one {}.", "a low resolution photo of a {}.",
    "a centered satellite photo of {}.", "a photo of a {}, a type of {kind}.",
    "{} texture.", "a scan of a {}.", "an x-ray of a {}.", "a pixelated photo of the {}.",
    "a sketch of the {}.", "a rendering of a {}.", "there is a {} in the scene.",
]
DIGIT_TEMPLATES = [
    'a photo of the number: "{}".', "the digit {}", "the digit {}.", "a handwritten number {}.",
    "a photo of the digit {}.", "the number {}.", "a handwritten digit {}.", "a {}",
    "an image of the handwritten digit {}.", "a drawing of the number {}.",
]
# Put before a caption in a quarter of the steps, as learned context tokens will be.
FILLERS = """X X X X X X this is a an the of in on with and very nice clean old new small big large
dark bright good bad image photo picture scene view style sample example typical common rare real
simple clear sharp blurry noisy low high quality color gray black white grainy centered top left
right close far medical normal healthy patient ultrasound tissue microscope slide scan x-ray ct mri
satellite aerial land texture pattern surface flower pet aircraft food car animal object class
category kind type label shown here we can see something that looks like positive negative first
second object: photo: benign malignant lesion tumor lung chest breast skin pneumonia bird :"""
KINDS = (  # what a photo's class is "a type of", by the start of its WordNet id
    ("n0144", "fish"), ("n0162", "amphibian"), ("n0164", "amphibian"), ("n0169", "reptile"),
    ("n0174", "reptile"), ("n0185", "bird"), ("n01", "animal"), ("n0200", "bird"),
    ("n0205", "bird"), ("n0207", "animal"), ("n0208", "dog"), ("n0209", "dog"), ("n0210", "dog"),
    ("n0211", "dog"), ("n0212", "cat"), ("n0213", "animal"), ("n021", "insect"),
    ("n022", "insect"), ("n023", "animal"), ("n024", "animal"), ("n025", "animal"),
    ("n07", "food"), ("n09", "landscape"), ("n", "object"),
)
# fmt: on


class Concept:
    """One thing to recognise, with the ways to name it."""

    def __init__(self, names: list[str], kind: str, extra: list[str] | None = None) -> None:
        self.names, self.kind, self.extra = names, kind, extra or []

    def caption(self, rng: random.Random, prefix: int) -> str:
        """A random caption after `prefix` words that say nothing of the image."""
        name = self.names[0] if rng.random() < 0.7 else rng.choice(self.names)
        if self.extra and rng.random() < 0.6:
            template = rng.choice(self.extra)
            name = rng.choice(self.names[:2])
        else:
            template = rng.choice(PLAIN if rng.random() < 0.6 else TEMPLATES)
        text = template.replace("{kind}", self.kind).replace("{}", name)
        return " ".join([*rng.choices(FILLERS.split(), k=prefix), text])


def rendered_concepts() -> list[Concept]:
    """Digits, letters, then shapes with the colour running fastest."""
    digits = [
        Concept([w, str(i), f"number {w}", f"digit {i}"], "number", DIGIT_TEMPLATES)
        for i, w in enumerate(WORDS)
    ]
    letters = [Concept([f"letter {c}"], "letter") for c in LETTER_NAMES]
    shapes = [Concept([f"{c} {s}", f"{s} in {c}"], "shape") for s in SHAPE_NAMES for c in COLOURS]
    return digits + letters + shapes


# ---------------------------------------------------------------- rendered images
# Strokes of handwritten digits in the unit box (y down); each digit in a few hands.
# fmt: off
STROKES: dict[int, list[str]] = {
    0: [".5,0 .15,.2 .1,.5 .15,.8 .5,1 .85,.8 .9,.5 .85,.2 .5,0",
        ".6,0 .25,.15 .1,.6 .35,1 .7,.9 .88,.45 .6,0 .4,.1"],
    1: [".5,0 .5,1", ".2,.25 .55,0|.55,0 .55,1", ".2,.25 .5,0|.5,0 .5,1|.2,1 .8,1",
        ".65,0 .4,1", ".3,.3 .55,.05|.55,.05 .5,1"],
    2: [".1,.25 .3,.03 .7,.05 .85,.3 .55,.65 .1,1|.1,1 .9,1",
        ".12,.2 .5,0 .85,.25 .5,.7 .15,.95 .2,.8 .5,.9 .95,.97",
        ".15,.1 .6,0 .8,.3 .5,.7 .1,1|.1,1 .5,.95 .95,1"],
    3: [".1,.1 .5,0 .85,.2 .4,.48|.4,.48 .9,.7 .6,1 .1,.9", ".1,0 .85,0|.85,0 .4,.42|"
        ".4,.42 .85,.6 .75,.9 .4,1 .1,.9", ".15,.15 .5,0 .8,.2 .6,.45 .35,.47|"
        ".35,.47 .7,.5 .88,.75 .55,1 .12,.88"],
    4: [".25,0 .1,.6|.1,.6 .95,.6|.7,.3 .65,1", ".65,0 .05,.65|.05,.65 .95,.65|.65,0 .65,1",
        ".2,.05 .12,.5 .4,.58 .8,.45|.8,0 .75,.5 .7,1", ".55,0 .1,.6|.1,.6 .9,.55|.6,.35 .5,1"],
    5: [".85,0 .25,0|.25,0 .2,.45|.2,.45 .6,.38 .9,.65 .65,.97 .1,.92",
        ".9,.02 .3,.05|.3,.05 .15,.5|.15,.5 .55,.4 .8,.6 .6,.9 .15,1"],
    6: [".75,0 .3,.3 .12,.7 .4,1 .8,.85 .75,.58 .4,.55 .15,.75",
        ".5,0 .2,.4 .15,.8 .5,1 .85,.8 .6,.55 .2,.72", ".35,0 .2,.5 .2,.9 .6,1 .8,.75 .5,.6 .2,.8"],
    7: [".1,0 .9,0|.9,0 .4,1", ".1,0 .9,0|.9,0 .45,1|.3,.5 .85,.48", ".1,.18 .12,.02|"
        ".12,.02 .88,.02|.88,.02 .6,.5 .5,1", ".1,.05 .5,.1 .9,0|.9,0 .55,.55 .45,1|.25,.55 .8,.5"],
    8: [".8,.15 .5,0 .2,.2 .5,.48 .85,.75 .5,1 .15,.78 .5,.48 .8,.22 .8,.15",
        ".5,0 .2,.12 .25,.38 .5,.47 .75,.38 .8,.12 .5,0|.5,.47 .15,.65 .2,.92 .5,1 .8,.92 .85,.65 "
        ".5,.47"],
    9: [".85,.2 .5,0 .15,.2 .25,.48 .6,.5 .85,.2|.85,.2 .8,.6 .6,1",
        ".85,.2 .5,0 .15,.25 .35,.5 .8,.35|.85,.15 .85,.7 .5,1 .15,.9",
        ".8,.25 .55,.02 .2,.2 .4,.48 .8,.3|.8,.05 .78,1", ".8,.2 .45,0 .18,.25 .45,.45 .8,.25|"
        ".8,.25 .75,.75 .4,1 .15,.95"],
}
# fmt: on


def spline(points: np.ndarray, n: int = 10) -> np.ndarray:
    """Catmull-Rom through the points."""
    if len(points) == 2:
        return points
    p = np.concatenate([2 * points[:1] - points[1:2], points, 2 * points[-1:] - points[-2:-1]])
    a, b, c, d = (p[i : len(p) - 3 + i, None] for i in range(4))
    t = np.linspace(0, 1, n)[:, None]
    cubic = (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3
    return ((2 * b + (c - a) * t + cubic) / 2).reshape(-1, 2)


def centred(mask: Image.Image) -> np.ndarray:
    """The mask's content, 40 px on its longer side, in the middle of 48 x 48."""
    mask = mask.crop(mask.getbbox())
    scale = 40 / max(mask.size)
    w, h = (max(2, round(s * scale)) for s in mask.size)
    out = Image.new("L", (48, 48))
    out.paste(mask.resize((w, h), Image.Resampling.BILINEAR), ((48 - w) // 2, (48 - h) // 2))
    return np.asarray(out)


def stroke_digit(digit: int, rng: np.random.Generator) -> np.ndarray:
    """A digit drawn as by hand: jittered splines, a random pen."""
    image = Image.new("L", (128, 128))
    draw = ImageDraw.Draw(image)
    width, aspect = rng.uniform(4, 15), rng.uniform(0.45, 1.0)
    jitter: dict[str, np.ndarray] = {}  # one a point, so that strokes that meet still meet
    for stroke in str(rng.choice(STROKES[digit])).split("|"):
        points = []
        for pair in stroke.split():
            jitter.setdefault(pair, rng.normal(0, 0.035, 2))
            points.append(np.array([float(v) for v in pair.split(",")]) + jitter[pair])
        path = (spline(np.array(points)) - 0.5) * (64 * aspect, 64) + 64
        draw.line([tuple(p) for p in path], fill=255, width=round(width), joint="curve")
        for x, y in (path[0], path[-1]):
            draw.ellipse([x - width / 2, y - width / 2, x + width / 2, y + width / 2], fill=255)
    return centred(image)


def font_glyph(text: str, rng: np.random.Generator) -> np.ndarray:
    """A character in one of matplotlib's own fonts."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    families = ["DejaVuSans", "DejaVuSerif", "STIXGeneral", "cmr10", "cmss10", "cmtt10", "cmb10"]
    fonts = sorted(
        str(f) for n in families for f in folder.glob(f"{n}*") if "Display" not in f.name
    )
    image = Image.new("L", (128, 128))
    font = ImageFont.truetype(str(rng.choice(fonts)), 72)
    ImageDraw.Draw(image).text((64, 64), text, fill=255, font=font, anchor="mm")
    return centred(image.filter(ImageFilter.MaxFilter(int(rng.choice([1, 1, 3, 5])))))


def shape_mask(name: str, rng: np.random.Generator) -> np.ndarray:
    """One of SHAPE_NAMES, filled."""
    image = Image.new("L", (128, 128))
    draw = ImageDraw.Draw(image)
    w, inner = int(rng.integers(8, 22)), rng.uniform(20, 30)
    corners = {"triangle": 3, "diamond": 4, "hexagon": 6, "star": 10}.get(name, 60)
    t = np.arange(corners) * 2 * np.pi / corners
    if name in ("cross", "line"):
        draw.line([(10, 64), (118, 64)], fill=255, width=w)
        if name == "cross":
            draw.line([(64, 10), (64, 118)], fill=255, width=w)
    elif name == "square":
        draw.rectangle([14, 14, 114, 114], fill=255)
    else:
        radius = np.where(np.arange(corners) % 2, inner, 60) if name == "star" else 55
        x, y = radius * np.sin(t), radius * np.cos(t)
        if name == "diamond":
            x = x * 2 / 3
        if name == "heart":
            x = 16 * np.sin(t) ** 3
            y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        scale = 3.5 if name == "heart" else 1
        draw.polygon(
            [(64 + scale * a, 64 - scale * b) for a, b in zip(x, y, strict=True)], fill=255
        )
    if name == "ring":
        draw.ellipse([9 + w, 9 + w, 119 - w, 119 - w], fill=0)
    return centred(image)


def mask_pools(seed: int, digits: int = 1500) -> list[tuple[Tensor, Tensor]]:
    """(masks, kinds) of the digits, the letters and the shapes; varied further in each batch."""
    rng = np.random.default_rng(seed)
    d = [(stroke_digit(i, rng), i) for i in range(10) for _ in range(digits)]
    d += [(font_glyph(str(i), rng), i) for i in range(10) for _ in range(digits // 6)]
    letters = [
        (font_glyph(c if rng.random() < 0.3 else c.upper(), rng), i)
        for i, c in enumerate(LETTER_NAMES)
        for _ in range(digits // 12)
    ]
    shapes = [(shape_mask(s, rng), i) for i, s in enumerate(SHAPE_NAMES) for _ in range(20)]
    return [
        (torch.from_numpy(np.stack([m for m, _ in p])), torch.tensor([k for _, k in p]))
        for p in (d, letters, shapes)
    ]


def warp(x: Tensor, zoom: tuple[float, float], turn: float, shift: float, elastic: float,
         flip: bool, padding: str) -> Tensor:  # fmt: skip
    """Random affine and elastic change of (N, C, H, W) in 0..1, to 32 px."""
    n = len(x)
    angle, shear = torch.randn(2, n) * turn
    scale = torch.empty(2, n).uniform_(*zoom)
    if flip:
        scale[0] *= torch.randint(0, 2, (n,)) * 2 - 1
    row0 = torch.stack([scale[0] * angle.cos(), shear - angle.sin(), torch.randn(n) * shift], 1)
    row1 = torch.stack([angle.sin(), scale[1] * angle.cos(), torch.randn(n) * shift], 1)
    grid = F.affine_grid(torch.stack([row0, row1], 1), [n, 1, 32, 32], align_corners=False)
    if elastic:
        bend = F.interpolate(torch.randn(n, 2, 4, 4) * elastic, 32, mode="bilinear")
        grid = grid + bend.permute(0, 2, 3, 1)
    return F.grid_sample(x, grid, padding_mode=padding, align_corners=False)


def glyph_images(masks: Tensor) -> Tensor:
    """Two thirds as 4 x 4 block counts on an 8 x 8 grid (how `load_digits` was made)."""
    n = len(masks)
    x = masks[:, None].float() / 255
    cut = n * 2 // 3
    small = warp(x[:cut], (0.72, 0.92), 0.12, 0.03, 0.06, False, "zeros")
    small = (F.avg_pool2d((small > 0.5).float(), 4) * 16).round() / 16
    mode = random.choice(["bicubic", "bicubic", "bilinear"])
    small = F.interpolate(small, 32, mode=mode, antialias=True).clamp(0, 1)
    large = warp(x[cut:], (0.75, 1.5), 0.15, 0.12, 0.08, False, "zeros")
    if random.random() < 0.5:
        large = F.interpolate(F.avg_pool2d(large, 2), 32, mode="bilinear")
    x = torch.cat([small, large])
    black_on_white = torch.rand(n, 1, 1, 1) < 0.2
    ink, paper = torch.ones(n, 3, 1, 1), torch.zeros(n, 3, 1, 1)
    other = torch.rand(n, 1, 1, 1) < 0.2
    paper = torch.where(other, torch.rand(n, 3, 1, 1) * 0.4, paper)
    ink = torch.where(other, 0.6 + torch.rand(n, 3, 1, 1) * 0.4, ink)
    x = paper + (ink - paper) * x
    x = torch.where(black_on_white, 1 - x, x)
    return x + torch.randn_like(x) * 0.06 * (torch.rand(n, 1, 1, 1) < 0.3)


def shape_images(masks: Tensor, colours: Tensor) -> Tensor:
    """Coloured shapes on a duller ground of another colour."""
    n = len(masks)
    x = warp(masks[:, None].float() / 255, (0.8, 1.7), 0.25, 0.15, 0.0, False, "zeros")
    ink = torch.tensor(list(COLOURS.values()))[colours]
    paper = torch.tensor(list(COLOURS.values()))[(colours + torch.randint(1, 8, (n,))) % 8]
    paper = paper * 0.4 + torch.rand(n, 3) * 0.4 + 0.1
    ink = (ink + torch.randn(n, 3) * 0.04).clamp(0, 1)
    x = paper[..., None, None] + (ink - paper)[..., None, None] * x
    return x + torch.randn_like(x) * 0.03


# ---------------------------------------------------------------- photos
def tiny_imagenet(folder: Path, cache: Path) -> dict[str, Any]:
    """uint8 images and labels of both parts; the archive is decoded once."""
    if cache.exists():
        return torch.load(cache)
    images: dict[str, list[np.ndarray]] = {"train": [], "val": []}
    owner: dict[str, list[str]] = {"train": [], "val": []}
    texts: dict[str, str] = {}
    with tarfile.open(folder / "tiny-imagenet_32px.tar.gz") as tar:
        for member in tar:
            file, name = tar.extractfile(member), Path(member.name)
            if file is None:
                continue
            part = name.parts[0]
            if name.suffix == ".JPEG" and part in images:
                images[part].append(np.asarray(Image.open(io.BytesIO(file.read())).convert("RGB")))
                owner[part].append(name.parts[1] if part == "train" else name.name)
            elif name.name in ("words.txt", "val_annotations.txt"):
                texts[name.name] = file.read().decode()
    wnids = sorted(set(owner["train"]))
    names = dict(line.split("\t", 1) for line in texts["words.txt"].splitlines())
    val = dict(line.split("\t")[:2] for line in texts["val_annotations.txt"].splitlines())
    data = {"wnids": wnids, "names": [names[w].split(", ") for w in wnids]}
    for part in images:
        ids = [val[o] if part == "val" else o for o in owner[part]]
        data[part] = torch.from_numpy(np.stack(images[part]).transpose(0, 3, 1, 2).copy())
        data[part + "_labels"] = torch.tensor([wnids.index(i) for i in ids])
    torch.save(data, cache)
    return data


def all_concepts(data: dict[str, Any]) -> list[Concept]:
    """The photos' classes, then what is rendered."""
    kinds = [next(k for p, k in KINDS if w.startswith(p)) for w in data["wnids"]]
    photos = [Concept(n, k) for n, k in zip(data["names"], kinds, strict=True)]
    return photos + rendered_concepts()


class Batches:
    """Images in -1..1 with their concept numbers."""

    def __init__(self, data: dict[str, Any], seed: int) -> None:
        self.data, self.pools = data, mask_pools(seed)
        self.order = torch.empty(0, dtype=torch.long)

    def rendered(self) -> tuple[Tensor, Tensor]:
        """Images in 0..1 and their places in `rendered_concepts`."""
        (digits, d), (letters, a), (shapes, s) = self.pools
        i = torch.randint(len(d), (DIGITS,))
        j = torch.randint(len(a), (LETTERS,))
        k = torch.randint(len(s), (SHAPES,))
        colours = torch.randint(len(COLOURS), (SHAPES,))
        mixed = torch.randperm(DIGITS + LETTERS)
        glyphs = glyph_images(torch.cat([digits[i], letters[j]])[mixed])
        labels = torch.cat([d[i], a[j] + 10])[mixed]
        shape_labels = s[k] * len(COLOURS) + colours + 10 + len(LETTER_NAMES)
        x = torch.cat([glyphs, shape_images(shapes[k], colours)])
        return x, torch.cat([labels, shape_labels])

    def next(self) -> tuple[Tensor, Tensor]:
        """A batch: photos first."""
        if len(self.order) < PHOTOS:
            self.order = torch.randperm(len(self.data["train"]))
        i, self.order = self.order[:PHOTOS], self.order[PHOTOS:]
        x = warp(self.data["train"][i].float() / 255, (0.75, 1.0), 0.03, 0.06, 0.0, True,
                 "reflection")  # fmt: skip
        rendered, labels = self.rendered()
        target = torch.cat([self.data["train_labels"][i], labels + len(self.data["wnids"])])
        return torch.cat([x, rendered]).mul(2).sub(1), target


# ---------------------------------------------------------------- model file
def trained_ids(concepts: list[Concept]) -> Tensor:
    """The tokens that captions are made of, sorted."""
    texts = [*PLAIN, *TEMPLATES, *DIGIT_TEMPLATES, FILLERS]
    texts += [n for c in concepts for n in [*c.names, c.kind]]
    return open_clip.SimpleTokenizer()(texts, context_length=512).unique()


def save(model: open_clip.CLIP, ids: Tensor, out: Path) -> None:
    """In half precision, with the trained rows alone of the token embedding."""
    state = {k: v.detach().half().contiguous() for k, v in model.state_dict().items()}
    state["token_rows.weight"] = state.pop("token_embedding.weight")
    state.pop("attn_mask", None)  # a constant
    state["token_rows.ids"] = ids.int()
    out.mkdir(parents=True, exist_ok=True)
    (out / "open_clip_config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    (out / "weights.tmp").write_bytes(to_bytes(state))
    os.replace(out / "weights.tmp", out / "weights.safetensors")  # readers never see half a file


def text_features(model: open_clip.CLIP, tokens: Tensor) -> Tensor:
    """`encode_text`, cut to the longest caption: the tower is causal, so this is exact."""
    n = int((tokens != 0).sum(1).max())
    tokens = tokens[:, :n]
    x = model.token_embedding(tokens) + model.positional_embedding[:n]
    x = model.transformer(x, attn_mask=model.attn_mask[:n, :n])
    x = model.ln_final(x[torch.arange(len(x)), tokens.argmax(1)])
    return F.normalize(x @ model.text_projection, dim=-1)


# ---------------------------------------------------------------- evaluation
def class_embeddings(model: open_clip.CLIP, names: list[str], templates: list[str]) -> Tensor:
    """Mean over the templates."""
    tok = open_clip.SimpleTokenizer()
    parts = [
        text_features(model, tok([t.format(n) for n in names], context_length=32))
        for t in templates
    ]
    return F.normalize(torch.stack(parts).mean(0), dim=-1)


def digit_images() -> tuple[Tensor, Tensor]:
    """scikit-learn's digits as the model takes them; called by `evaluate` only."""
    x, y = load_digits(return_X_y=True)
    grey = (x.reshape(-1, 8, 8) * 255 / 16).round().astype(np.uint8)
    big = [np.asarray(Image.fromarray(g).resize((32, 32), Image.Resampling.BICUBIC)) for g in grey]
    images = torch.from_numpy(np.stack(big)).float().div(127.5).sub(1)
    return images[:, None].expand(-1, 3, -1, -1), torch.from_numpy(y)


@torch.inference_mode()
def evaluate(model: open_clip.CLIP, data: dict[str, Any]) -> dict[str, float]:
    """Accuracies by what was measured."""
    model.eval()

    def features(x: Tensor) -> Tensor:
        return torch.cat([F.normalize(model.encode_image(b), dim=-1) for b in x.split(500)])

    result: dict[str, float] = {}
    names = [n[0] for n in data["names"]]
    image = features(data["val"].float().div(127.5).sub(1))
    for key, templates in (("one template", PLAIN[:1]), ("ensemble", PLAIN)):
        top = (image @ class_embeddings(model, names, templates).T).topk(5).indices
        hit = top == data["val_labels"][:, None]
        result[f"Tiny-ImageNet val top-1, {key}"] = hit[:, 0].float().mean().item()
        result[f"Tiny-ImageNet val top-5, {key}"] = hit.any(1).float().mean().item()
    x, y = digit_images()
    image = features(x)
    for form, classes in (("words", WORDS), ("numerals", [str(i) for i in range(10)])):
        for t in ['a photo of the number: "{}".', "the digit {}", "a photo of a {}."]:
            guess = (image @ class_embeddings(model, classes, [t]).T).argmax(1)
            result[f"digits zero-shot, {form}, {t}"] = (guess == y).float().mean().item()
        guess = (image @ class_embeddings(model, classes, DIGIT_TEMPLATES).T).argmax(1)
        result[f"digits zero-shot, {form}, ensemble"] = (guess == y).float().mean().item()
    scores = []
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(len(y))
        train = np.concatenate([order[y[order] == c][:16] for c in range(10)])
        test = np.setdiff1d(order, train)
        probe = LogisticRegression(C=100, max_iter=2000).fit(image[train], y[train])
        scores.append(probe.score(image[test], y[test]))
    result["digits linear probe, 16 shots (mean of 5 splits)"] = float(np.mean(scores))
    return result


# ---------------------------------------------------------------- training
def train(args: argparse.Namespace, data: dict[str, Any]) -> None:
    """Contrastive training against one fresh caption of every concept a step."""
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    rng = random.Random(args.seed)
    cfg = json.loads(json.dumps(CONFIG["model_cfg"]))
    cfg["vision_cfg"]["patch_dropout"] = 0.5  # half the tokens, twice the speed
    model = open_clip.CLIP(**cfg).train()
    concepts = all_concepts(data)
    ids = trained_ids(concepts)
    # Only rows in use are trained; ids keep their order, so EOT stays the largest.
    rows = model.token_embedding.weight.data[ids].clone()
    model.token_embedding = torch.nn.Embedding.from_pretrained(rows, freeze=False)
    tok = open_clip.SimpleTokenizer()
    batches = Batches(data, args.seed)
    # Muon for the blocks' matrices (ahead of AdamW after 100 steps), AdamW for the rest.
    matrices = [p for n, p in model.named_parameters() if ".resblocks." in n and p.ndim == 2]
    taken = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in taken]
    decay, plain = [p for p in rest if p.ndim >= 2], [p for p in rest if p.ndim < 2]
    muon = torch.optim.Muon(matrices, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
    )  # fmt: skip
    start = saved = time.time()
    step, p, avg = 0, 0.0, [0.0, 0.0, 0.0]
    while p < 1:
        # By steps, or by the clock where the machine is too slow for them.
        p = max(step / args.steps, (time.time() - start) / 60 / args.minutes)
        lr = args.lr * min(1, (step + 1) / 300) * (0.505 + 0.495 * math.cos(math.pi * min(p, 1)))
        for g in adam.param_groups:
            g["lr"] = lr
        for g in muon.param_groups:
            g["lr"] = 2 * lr
        if p > 0.85:
            model.visual.patch_dropout.prob = 0.0  # as it will be used
        x, target = batches.next()
        long = rng.random() < 0.25  # some steps train the later positions
        texts = [c.caption(rng, rng.randint(1, 20) if long else 0) for c in concepts]
        with torch.autocast("cpu", torch.bfloat16):
            text = text_features(model, torch.searchsorted(ids, tok(texts, context_length=32)))
            image = model.encode_image(x, normalize=True)
        scale = model.logit_scale.exp()
        # Every concept is a candidate for every image.
        logits = scale * image.float() @ text.float().T
        positive = F.one_hot(target, len(concepts)).float()
        count = positive.sum(0)
        to_text = F.cross_entropy(logits, target)
        to_image = -((positive * logits.log_softmax(0)).sum(0) / count.clamp(min=1)).sum()
        loss = (to_text + to_image / (count > 0).sum()) / 2
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        muon.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
            hit = (logits.argmax(1) == target).float()
            for n, v in enumerate((loss, hit[:PHOTOS].mean(), hit[PHOTOS:].mean())):
                avg[n] = float(v) if step == 0 else 0.98 * avg[n] + 0.02 * float(v)
        step += 1
        if step % 50 == 0:
            took = time.time() - start
            print(f"step {step} loss {avg[0]:.3f} photos {avg[1]:.3f} rendered {avg[2]:.3f}",
                  f"lr {lr:.1e} {step * len(x) / took:.0f} images/s {took / 60:.1f} min",
                  flush=True)  # fmt: skip
        if time.time() - saved > 60 * args.save_every or p >= 1:
            save(model, ids, args.out)
            saved = time.time()


def main() -> None:
    """Command line."""
    here = Path(__file__).resolve().parent.parent / "vpt" / "backbones" / "tiny_clip"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=os.environ.get("VPT_REAL_DATA"))
    parser.add_argument("--out", type=Path, default=here)
    parser.add_argument("--eval", action="store_true", help="evaluate the weights in --out")
    parser.add_argument("--sheet", type=Path, help="write a sheet of rendered images and stop")
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--minutes", type=float, default=75)
    parser.add_argument("--save-every", type=float, default=9)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.data is None:
        parser.error("give --data or set VPT_REAL_DATA: the folder of tiny-imagenet_32px.tar.gz")
    data = tiny_imagenet(args.data, Path(tempfile.gettempdir()) / "tiny-imagenet_32px.pt")
    if args.sheet:
        x = torch.cat([Batches(data, args.seed).rendered()[0] for _ in range(3)]).clamp(0, 1)
        x = x.reshape(12, -1, 3, 32, 32).permute(0, 3, 1, 4, 2).reshape(12 * 32, -1, 3)
        Image.fromarray((x * 255).byte().numpy()).resize((x.shape[1] * 2, 768)).save(args.sheet)
    elif args.eval:
        for key, value in evaluate(load_tiny_clip(args.out), data).items():
            print(f"{key:60} {value:.3f}")
    else:
        train(args, data)


if __name__ == "__main__":
    main()
