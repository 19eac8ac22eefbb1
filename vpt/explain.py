"""`vpt explain`: which patches a prediction rests on, checked by deletion; words near a context."""

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from vpt.backbones.text import CLIP_VOCABULARY
from vpt.data.images import read_image
from vpt.errors import InputError
from vpt.evaluation.lettering import labels
from vpt.evaluation.plots import save
from vpt.files import write_atomically
from vpt.inference import load, survey
from vpt.methods import Method
from vpt.methods._text import embed_templates
from vpt.progress import Log
from vpt.run import NOTICE

STEPS = 16  # of the integral
DELETIONS = 14  # steps of a deletion curve
RANDOM_ORDERS = 4
RANDOM_VECTORS = 100


def saliency(model: Method, image: Tensor, target: int) -> Tensor:
    """Contribution of each patch to the logit of class `target`: (rows, columns), signed.

    Integrated gradients (Sundararajan et al. 2017, eq. 1) from the blurred image, summed over the
    pixels of each patch; together they are the logit's rise over that of the blurred image. Class
    token, registers and prompts have no pixels, so none is in the map.

    Args:
        model: prompted, folded or not, of any method.
        image: (3, H, W), normalised as `model.backbone.preprocess` says.
        target: a class, by its number.
    """
    start = blur(image)
    middles = (torch.arange(STEPS).to(image) + 0.5) / STEPS
    points = torch.lerp(start, image, middles[:, None, None, None]).requires_grad_()
    (gradients,) = torch.autograd.grad(model(points)[:, target].sum(), points)
    pixels = ((image - start) * gradients.mean(0)).sum(0, keepdim=True)
    rows, columns = model.backbone.grid(0, points)
    return F.adaptive_avg_pool2d(pixels, (rows, columns))[0] * pixels.numel() / (rows * columns)


@torch.no_grad()
def deletion(model: Method, image: Tensor, target: int, order: Tensor) -> Tensor:
    """Probabilities (DELETIONS + 1,) of class `target` as ever more patches are blurred.

    From none to all, those first whose `order` (rows, columns) is highest, such as a saliency map
    (Petsiuk et al. 2018, 3.3: the lower the curve, the better the map).
    """
    rank = order.flatten().argsort(descending=True).argsort().view_as(order)
    counts = torch.linspace(0, order.numel(), DELETIONS + 1, device=order.device)
    deleted = (rank < counts[:, None, None].round()).to(image.dtype)
    mask = F.interpolate(deleted[:, None], image.shape[-2:])
    return probabilities(model, torch.lerp(image, blur(image), mask))[:, target]


@torch.no_grad()
def probabilities(model: Method, images: Tensor) -> Tensor:
    """(B, C) of images (B, 3, H, W), uncalibrated, as a saliency is of the model's own logits."""
    return model.target.probabilities(model(images))


def area(curve: Tensor) -> float:
    """Area under a curve over the unit interval."""
    return torch.trapezoid(curve, dx=1 / (len(curve) - 1)).item()


def random_area(model: Method, image: Tensor, target: int, shape: tuple[int, int]) -> float:
    """Mean area of deletion curves in RANDOM_ORDERS random orders of `shape`, always the same."""
    generator = torch.Generator().manual_seed(0)
    orders = torch.rand(RANDOM_ORDERS, *shape, generator=generator).to(image.device)
    return float(np.mean([area(deletion(model, image, target, order)) for order in orders]))


def blur(image: Tensor) -> Tensor:
    """The image (3, H, W) without detail: twice the mean over windows of a seventh of its side."""
    side = image.shape[-1] // 7 | 1  # odd
    for _ in range(2):
        padded = F.pad(image[None], [side // 2] * 4, mode="reflect")
        image = F.avg_pool2d(padded, side, stride=1)[0]
    return image


def nearest_words(context: Tensor, model: Method, count: int = 5) -> list[dict[str, Any]]:
    """For each vector of `context` (tokens, width) the `count` nearest entries of the vocabulary.

    By Euclidean distance, as Zhou et al. 2022 read CoOp's contexts (table 4). `</w>` ends a word.
    Something is always nearest, so the nearest distance stands beside that of RANDOM_VECTORS random
    vectors of the same norm: only a nearer one is `word_like`.

    Returns:
        `words`, their `distances`, `random` (the lowest nearest distance of a random vector), and
        `word_like`.

    Raises:
        InputError: a text tower with another vocabulary than CLIP's.
    """
    tower = model.backbone.text
    if tower.parts.vocab_size != CLIP_VOCABULARY:
        count = tower.parts.vocab_size
        raise InputError(f"{count} token ids: only CLIP's own vocabulary can be read")
    table = tower.embed(torch.arange(CLIP_VOCABULARY, device=context.device))
    distances, ids = torch.cdist(context, table).topk(count, largest=False)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(RANDOM_VECTORS, context.shape[1], generator=generator).to(context)
    directions = F.normalize(drawn, dim=-1)
    words, records = open_clip.SimpleTokenizer().decoder, []
    for vector, row, places in zip(context, distances.tolist(), ids.tolist(), strict=True):
        chance = torch.cdist(vector.norm() * directions, table).min().item()
        records.append(
            {
                "words": [words[place] for place in places],
                "distances": row,
                "random": chance,
                "word_like": row[0] < chance,
            }
        )
    return records


@torch.no_grad()
def explain_classes(model: Method) -> dict[str, dict[str, Any]]:
    """Changes that learning made to the class embeddings, by class.

    Of each, `shift`: the cosine to the embedding of its name in "a photo of a {}."; and `nearest`:
    the most similar other class, with the cosine, `before` and `after`.

    Raises:
        InputError: class embeddings that each image changes.
    """
    names = model.target.texts(model.class_names)
    plain = embed_templates(model.backbone, names, ["a photo of a {}."], None).mean(1)
    before, after = F.normalize(plain, dim=-1), F.normalize(model.text_features(), dim=-1)
    similar = {"before": before @ before.T, "after": after @ after.T}
    shifts = (before * after).sum(1).tolist()
    records: dict[str, dict[str, Any]] = {
        name: {"shift": shift, "nearest": {}} for name, shift in zip(names, shifts, strict=True)
    }
    for when, cosines in similar.items():
        best = cosines.fill_diagonal_(-2).max(1)
        for name, cosine, place in zip(names, best.values, best.indices, strict=True):
            records[name]["nearest"][when] = [names[place], cosine.item()]
    return records


def explain_context(
    path: Path, checkpoint: str | None = None, out: Path | None = None
) -> dict[str, list[dict[str, Any]]]:
    """`nearest_words` of the artefact's context, by class where each has its own, else under `all`.

    With `out`, context.json there has them as `words`, and `explain_classes` as `classes`.

    Raises:
        InputError: as `artifact.load`; a method without a context.
    """
    model = load(path, checkpoint)
    context = getattr(model, "context", None)
    if context is None:
        raise InputError(f"{path}: {model.name} has no context of words: give images to explain")
    context = context.detach()
    contexts = {"all": context}
    if context.dim() == 3:
        contexts = dict(zip(model.class_names, context, strict=True))
    found = {name: nearest_words(vectors, model) for name, vectors in contexts.items()}
    if out is not None:
        records: dict[str, Any] = {"words": found}
        with suppress(InputError):  # each image has class embeddings of its own
            records["classes"] = explain_classes(model)
        write_atomically(out / "context.json", json.dumps(records, indent=2).encode())
    return found


def explain_images(
    path: Path,
    images: Sequence[Path],
    out: Path,
    checkpoint: str | None = None,
    log: Log = print,
) -> Iterator[dict[str, Any]]:
    """The saliency of the predicted class for each image file, drawn into `out`.

    Folders are searched. Yields its `path`, `class`, `probability`, `figure` (a PNG), `deletion`
    (the curve), `deletion_area`, `random_area`, and of medical data a `notice`; the same records
    are in `out`/explain.json. Files that cannot be read are left out, and named by an error after
    the last; `log` takes lines for the user.

    Raises:
        InputError: as `artifact.load`; a folder without images; at the end, files that are missing
            or no image.
    """
    model = load(path, checkpoint)
    found = survey(images, model.metadata, log)
    windows = model.metadata.get("data", {}).get("windows")
    notice = {"notice": NOTICE} if model.metadata.get("medical") else {}
    model = model.fold()
    shown = dict(zip(model.class_names, labels(model.class_names), strict=True))
    preprocess, records = model.backbone.preprocess, []
    crop = preprocess.crop()
    for number, file in enumerate(found.readable):
        pixels = crop(read_image(file, windows=windows, grey=preprocess.grey_range))
        record, heat = explain(model, torch.from_numpy(pixels))
        figure = out / f"{number:03}-{file.stem}.png"
        prediction = f"{shown[record['class']]} {record['probability']:.2f}"
        title = ". ".join([prediction, *notice.values()])
        drawing = Figure(figsize=(7, 3.9), layout="constrained")
        left, right = drawing.subplots(1, 2)
        left.imshow(pixels)
        draw_saliency(right, pixels, heat)
        for axes in (left, right):
            axes.set_axis_off()
        drawing.suptitle(title.replace("$", r"\$"))
        save(drawing, figure, model.class_names)
        records.append({"path": str(file), **record, "figure": str(figure), **notice})
        yield records[-1]
    text = json.dumps(records, indent=2)
    write_atomically(out / "explain.json", text.encode())
    found.check()


def explain(model: Method, pixels: Tensor) -> tuple[dict[str, Any], Tensor]:
    """The record of one cropped image, uint8 (H, W, 3), and its saliency (rows, columns)."""
    image = model.backbone.preprocess.normalize(pixels).to(model.backbone.device)
    found = probabilities(model, image[None])[0]
    target = int(found.argmax())
    heat = saliency(model, image, target)
    curve = deletion(model, image, target, heat)
    record = {
        "class": model.class_names[target],
        "probability": found[target].item(),
        "deletion": curve.tolist(),
        "deletion_area": area(curve),
        "random_area": random_area(model, image, target, heat.shape),
    }
    return record, heat.cpu()


def draw_saliency(axes: Any, pixels: np.ndarray, heat: Tensor) -> None:
    """The image in grey under its saliency: red speaks for the class, blue against it."""
    height, width = pixels.shape[:2]
    smooth = F.interpolate(heat[None, None], (height, width), mode="bicubic")[0, 0]
    # a few patches carry most: without the clipping all others would look white
    limit = heat.abs().quantile(0.98).clamp(min=1e-12).item()
    axes.imshow(pixels.mean(-1), cmap="gray")
    strength = (smooth.abs() / limit).clamp(max=1).numpy()
    axes.imshow(smooth.numpy(), cmap="bwr", vmin=-limit, vmax=limit, alpha=0.6 * strength)
