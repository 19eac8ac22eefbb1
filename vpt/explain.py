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
from vpt.evaluation.plots import LABELLED, save
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


@torch.no_grad()
def patch_similarity(model: Method, image: Tensor, target: int) -> Tensor:
    """Cosine of each patch to the text of class `target`: (rows, columns), prompts as learned.

    Patch tokens of the last block, after the final norm, go through the projection that the pooled
    token takes, and meet the class embeddings; of several labels, less the cosine to the opposite.
    Class token, registers and prompts are left out. A CLIP is trained to match the pooled token
    alone, so this shows what stands at each patch in the language of texts, not what the
    prediction rests on, for which see `saliency`: in OpenAI's towers the background often is more
    similar than the object (Li et al. 2023, CLIP Surgery, arXiv 2304.05653).

    Raises:
        InputError: no class texts, or others for each image; a tower whose patches don't go through
            its projection one by one.
    """
    if not model.reads_text:
        raise InputError(f"{model.name} has no class texts")
    texts = F.normalize(model.text_features(), dim=-1)
    seen = model.pixels(image[None])
    patches = model.backbone.tokens(seen, model.image_prompts(image[None])).patches[0]
    grid = model.backbone.grid(model.backbone.num_layers - 1, seen)
    if model.backbone.readout_tokens != 1 or len(patches) != grid[0] * grid[1]:
        raise InputError("only patches of a tower that reads its class token can be projected")
    cosines = F.normalize(model.project(patches), dim=-1) @ texts.T
    return model.target.contrast(cosines)[:, target].view(grid)


def nearest_words(context: Tensor, model: Method, count: int = 5) -> list[dict[str, Any]]:
    """For each vector of `context` (tokens, width) the `count` nearest entries of the vocabulary.

    By Euclidean distance, as Zhou et al. 2022 read CoOp's contexts (table 4). `</w>` ends a word.
    Something is always nearest, so the nearest distance stands beside that of RANDOM_VECTORS random
    vectors of the same norm: only one of less than half of it is `word_like`. Learning moves all
    vectors a little towards where words are.

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
    tokenizer, records = open_clip.SimpleTokenizer(), []
    for vector, row, places in zip(context, distances.tolist(), ids.tolist(), strict=True):
        chance = torch.cdist(vector.norm() * directions, table).min().item()
        records.append(
            {
                "words": [_word(tokenizer, place) for place in places],
                "distances": row,
                "random": chance,
                "word_like": row[0] < chance / 2,
            }
        )
    return records


def _word(tokenizer: open_clip.SimpleTokenizer, number: int) -> str:
    """An entry of the vocabulary, which spells bytes by letters of its own."""
    spelt = tokenizer.decoder[number]
    end = "</w>" if spelt.endswith("</w>") else ""
    encoded = bytes(tokenizer.byte_decoder.get(c, ord("?")) for c in spelt.removesuffix("</w>"))
    return encoded.decode(errors="replace") + end


@torch.no_grad()
def class_similarity(model: Method) -> tuple[list[str], Tensor, Tensor]:
    """Names, and class embeddings of unit length (C, dim) before and after learning.

    Before are those of the names in "a photo of a {}."; of several labels an image, the opposites
    follow the names.

    Raises:
        InputError: class embeddings that each image changes.
    """
    names = model.target.texts(model.class_names)
    plain = embed_templates(model.backbone, names, ["a photo of a {}."], None).mean(1)
    return names, F.normalize(plain, dim=-1), F.normalize(model.text_features(), dim=-1)


def explain_classes(model: Method) -> dict[str, dict[str, Any]]:
    """Changes that learning made to the class embeddings, by class; raises as `class_similarity`.

    Of each, `shift`: the cosine of its embedding after to that before; `similarity`: the cosines
    to all classes, in order, `before` and `after`; and `nearest`: the most similar other class with
    its cosine, likewise.
    """
    names, before, after = class_similarity(model)
    shifts = (before * after).sum(1).tolist()
    records: dict[str, dict[str, Any]] = {
        name: {"shift": shift, "similarity": {}, "nearest": {}}
        for name, shift in zip(names, shifts, strict=True)
    }
    for when, embeddings in {"before": before, "after": after}.items():
        cosines = embeddings @ embeddings.T
        for name, row in zip(names, cosines.tolist(), strict=True):
            records[name]["similarity"][when] = [round(cosine, 4) for cosine in row]
        best = cosines.fill_diagonal_(-2).max(1)
        for name, cosine, place in zip(names, best.values, best.indices, strict=True):
            records[name]["nearest"][when] = [names[place], cosine.item()]
    return records


def draw_classes(records: dict[str, dict[str, Any]], path: Path) -> None:
    """Class similarities before and after, and the shift of each class, as a PNG."""
    names, few = list(records), len(records) <= LABELLED
    shown = labels(names) if few else []
    side = max(3.5, 0.3 * len(names)) if few else 6
    figure = Figure(figsize=(3 * side, side + 1), layout="constrained")
    panels = figure.subplots(1, 3)
    matrices = {
        when: np.array([record["similarity"][when] for record in records.values()])
        for when in ("before", "after")
    }
    apart = ~np.eye(len(names), dtype=bool)
    lowest, highest = (f([m[apart] for m in matrices.values()]) for f in (np.min, np.max))
    for axes, (when, matrix) in zip(panels, matrices.items(), strict=False):
        picture = axes.imshow(matrix, cmap="viridis", vmin=lowest, vmax=highest)
        axes.set(title=f"cosines between classes, {when}", xticks=[], yticks=[])
        if few:
            axes.set_xticks(range(len(names)), shown, rotation=90)
            axes.set_yticks(range(len(names)), shown)
    figure.colorbar(picture, ax=panels[:2], shrink=0.7)
    panels[2].barh(range(len(names)), [1 - record["shift"] for record in records.values()])
    panels[2].set_yticks(range(len(shown)), shown)
    panels[2].set(title="shift, 1 - cosine to before")
    panels[2].invert_yaxis()
    save(figure, path, names if few else ())


def explain_context(
    path: Path, checkpoint: str | None = None, out: Path | None = None
) -> dict[str, list[dict[str, Any]]]:
    """`nearest_words` of the artefact's context, by class where each has its own, else under `all`.

    With `out`, context.json there has them as `words`, and `explain_classes` as `classes`, which
    classes.png shows.

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
            draw_classes(records["classes"], out / "classes.png")
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
    are in `out`/explain.json, where class texts are read with `patch_similarity`. Files that cannot
    be read are left out, and named by an error after the last; `log` takes lines for the user.

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
        similarity = record.get("patch_similarity")
        count = 3 if similarity else 2
        drawing = Figure(figsize=(3.5 * count, 3.9), layout="constrained")
        panels = drawing.subplots(1, count)
        panels[0].imshow(pixels)
        draw_saliency(panels[1], pixels, heat)
        if similarity:
            picture = panels[2].imshow(similarity, cmap="viridis")
            panels[2].set_title("patches, cosine to the text", fontsize="medium")
            drawing.colorbar(picture, ax=panels[2], shrink=0.7)
        for axes in panels:
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
    with suppress(InputError):  # no class texts, or a tower that has no such map
        record["patch_similarity"] = patch_similarity(model, image, target).tolist()
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
