"""`vpt bench speed`: this engine against the form the reference implementations use."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import open_clip
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from vpt import methods
from vpt.config import TrainConfig
from vpt.data.images import Samples
from vpt.data.loaders import make_loader
from vpt.errors import InputError
from vpt.training.fit import fit, make_optimizer

TOLERANCE = 1e-4  # relative, float32 through twelve layers
RUN_TOLERANCE = 1e-2  # the same after an epoch of steps, each of which starts from the last

Step = Callable[[], list[Tensor]]  # one unit of work; returns what must agree


@dataclass(frozen=True)
class Work:
    """One row of the table: the same work done in two or three ways."""

    name: str
    engine: Step
    tokens: Step  # prompts as tokens, all positions, both towers, every step
    bare: Step | None = None  # the frozen backbone alone


def measure(works: Sequence[Work], rounds: int) -> Iterator[dict[str, Any]]:
    """A row for each work: medians over interleaved rounds, ratios, FLOPs, saved activations.

    Raises:
        InputError: engine and tokens do not agree; nothing is reported then.
    """
    rate = matmul_rate()
    for work in works:
        steps = {"engine": work.engine, "tokens": work.tokens, "bare": work.bare}
        steps = {name: step for name, step in steps.items() if step is not None}
        counted = {name: _count(step) for name, step in steps.items()}
        error = _disagreement(counted["engine"][0], counted["tokens"][0])
        if error > TOLERANCE:
            raise InputError(f"{work.name}: engine and tokens differ by {error:.1e}, not measured")
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(rounds):
            for name, step in steps.items():
                step()  # as in training, where a step follows one of its own kind
                _wait()
                begin = time.perf_counter()
                step()
                _wait()
                seconds[name].append(time.perf_counter() - begin)
        row: dict[str, Any] = {"work": work.name, "disagreement": error}
        for name, (_, flops, saved) in counted.items():
            row[f"{name}_ms"] = 1e3 * median(seconds[name])
            row[f"{name}_gflop"] = flops / 1e9
            row[f"{name}_saved_mb"] = saved / 1e6
        row["speedup"] = row["tokens_ms"] / row["engine_ms"]
        row["flop_ratio"] = row["tokens_gflop"] / row["engine_gflop"]
        if work.bare:
            row["engine_to_bare"] = row["engine_ms"] / row["bare_ms"]
        row["of_matmul_rate"] = row["engine_gflop"] * 1e9 / (row["engine_ms"] / 1e3) / rate
        yield row


def measure_run(epochs: int = 50, shots: int = 16, classes: int = 100) -> dict[str, Any]:
    """The row of a whole CoOp run, ViT-Ti-sized towers: features and all epochs.

    The token path runs its first epoch only, and its time is that epoch's times `epochs`.

    Raises:
        InputError: the contexts after the first epoch do not agree; nothing is reported then.
    """
    torch.manual_seed(0)
    image = {"patch_size": 16, "width": 192, "head_width": 64}
    clip = open_clip.CLIP(192, image, {"width": 192, "heads": 3}).to(_device())
    count = classes * shots
    pixels = torch.randint(256, (count, 224, 224, 3), dtype=torch.uint8).numpy()
    samples = Samples(pixels, np.arange(count) % classes, [str(i) for i in range(count)])
    config = TrainConfig(optimizer="sgd", lr=2e-3, epochs=epochs, warmup_epochs=0, precision="fp32")
    model = _coop(clip, classes, 16)
    start = model.context.detach().clone()
    loader = make_loader(samples, model.backbone.preprocess, config.batch_size, train=True)
    contexts = []
    begin = time.perf_counter()
    fit(
        model,
        loader,
        config=config,
        on_epoch=lambda _: contexts.append(model.context.detach().clone()),
    )
    engine = time.perf_counter() - begin

    with torch.no_grad():
        model.context.copy_(start)
    optimizer = make_optimizer(model, config)
    loader.sampler.set_epoch(0)
    begin = time.perf_counter()
    for images, labels in loader:
        features = model.features(images.to(start.device))
        logits = model.backbone.similarity(features, _all_positions(model))
        F.cross_entropy(logits, labels.to(start.device)).backward()
        optimizer.step()
        optimizer.zero_grad()
    tokens = epochs * (time.perf_counter() - begin)
    error = _disagreement([contexts[0] - start], [model.context.detach() - start])
    name = f"CoOp run, {shots} shots, {classes} classes, {epochs} epochs, ViT-Ti-sized"
    if error > RUN_TOLERANCE:
        raise InputError(f"{name}: engine and tokens differ by {error:.1e}, not measured")
    return {
        "work": name,
        "disagreement": error,
        "engine_ms": 1e3 * engine,
        "tokens_ms": 1e3 * tokens,
        "tokens_epochs_measured": 1,
        "speedup": tokens / engine,
    }


def matmul_rate(size: int = 1024) -> float:
    """Floating-point operations a second of a float32 matrix product on this machine."""
    x = torch.randn(size, size, device=_device())
    seconds = []
    for _ in range(10):
        _wait()
        begin = time.perf_counter()
        x @ x
        _wait()
        seconds.append(time.perf_counter() - begin)
    return 2 * size**3 / median(seconds)


def works(small: bool = False) -> list[Work]:
    """The works measured, with random weights; `small` is for trying the benchmark itself."""
    torch.manual_seed(0)
    text = {"width": 64, "heads": 2, "layers": 2} if small else {}
    image = {"image_size": 32, "patch_size": 8, "width": 64, "head_width": 32, "layers": 2}
    image = image if small else {"patch_size": 32}
    clip = open_clip.CLIP(64 if small else 512, image, text).to(_device())
    vit = VisionTransformer(
        num_classes=0,
        **({"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2} if small else {}),
        num_heads=2 if small else 12,
    ).to(_device())
    counts = ((6, 4),) if small else ((100, 16), (300, 4))
    lengths = (5,) if small else (10, 50, 100)
    return [
        *(_coop_text(clip, classes, tokens) for classes, tokens in counts),
        _coop_step(clip, *counts[0], batch=4 if small else 32),
        *(_vpt_training(vit, tokens, batch=2 if small else 8) for tokens in lengths),
        _vpt_inference(vit, lengths[-1], batch=2 if small else 8),
    ]


def _names(classes: int) -> list[str]:
    """Different names of one to three words, each of one token."""
    words = [t[:-4] for t in open_clip.SimpleTokenizer().encoder if t.endswith("</w>")]
    words = [word for word in words if word.isascii() and word.isalpha() and len(word) > 2]
    return [" ".join(words[3 * i : 3 * i + 1 + i % 3]) for i in range(classes)]


def _coop(clip: open_clip.CLIP, classes: int, tokens: int) -> methods.Method:
    return methods.attach(clip, "coop", class_names=_names(classes), num_tokens=tokens)


def _all_positions(model: methods.Method, part: slice = slice(None)) -> Tensor:
    """Text features of some classes with every position, as the reference computes them."""
    tower = model.backbone.text
    x = model.prompt_embeddings(model.context)[part]
    padding = model.tokens.new_zeros(len(x), tower.parts.context_length - x.shape[1])
    ids = torch.cat([model.tokens[part], padding], 1)
    x = torch.cat([x, tower.embed(padding)], 1)
    return tower.run(x, ids, model.text_prompts, model.places[part])


def _coop_text(clip: open_clip.CLIP, classes: int, tokens: int) -> Work:
    model = _coop(clip, classes, tokens)

    def step(features: Callable[[], Tensor]) -> list[Tensor]:
        output = features()
        model.zero_grad()
        output.square().mean().backward()
        return [output.detach(), model.context.grad]

    return Work(
        f"CoOp text, {classes} classes, M={tokens}",
        engine=lambda: step(model.text_features),
        tokens=lambda: step(lambda: _all_positions(model)),
    )


def _coop_step(clip: open_clip.CLIP, classes: int, tokens: int, batch: int) -> Work:
    model = _coop(clip, classes, tokens)
    images = _images(batch, model)
    labels = torch.arange(batch, device=images.device) % classes
    cached = model.features(images)

    def step(features: Callable[[], Tensor], texts: Callable[[], Tensor]) -> list[Tensor]:
        logits = model.backbone.similarity(features(), texts())
        model.zero_grad()
        F.cross_entropy(logits, labels).backward()
        return [logits.detach(), model.context.grad]

    return Work(
        f"CoOp step, {classes} classes, M={tokens}, batch {batch}, features cached",
        engine=lambda: step(lambda: cached, model.text_features),
        tokens=lambda: step(lambda: model.features(images), lambda: _all_positions(model)),
        bare=lambda: [model.features(images)],
    )


def _vpt_training(vit: VisionTransformer, tokens: int, batch: int) -> Work:
    model = methods.attach(vit, "vpt_deep", num_classes=10, num_tokens=tokens)
    images = _images(batch, model)
    labels = torch.arange(batch, device=images.device) % 10

    def step(exact_tokens: bool) -> list[Tensor]:
        model.backbone.exact_tokens = exact_tokens
        model.zero_grad()
        loss, logits = model.loss(images, labels)
        loss.backward()
        return [logits.detach(), model.prompts.grad]

    return Work(
        f"VPT-deep step, P={tokens}, batch {batch}",
        engine=lambda: step(False),
        tokens=lambda: step(True),
    )


def _vpt_inference(vit: VisionTransformer, tokens: int, batch: int) -> Work:
    model = methods.attach(vit, "vpt_deep", num_classes=10, num_tokens=tokens).eval()
    model.requires_grad_(False)  # the FLOP counter hooks what does, also without gradients
    folded = model.fold()
    images = _images(batch, model)
    model.backbone.exact_tokens = True

    @torch.no_grad()
    def step(run: Callable[[Tensor], Tensor]) -> list[Tensor]:
        return [run(images)]

    return Work(
        f"VPT-deep inference, P={tokens}, batch {batch}",
        engine=lambda: step(folded),
        tokens=lambda: step(model),
        bare=lambda: step(vit),
    )


def _images(batch: int, model: methods.Method) -> Tensor:
    size = model.backbone.preprocess.image_size
    return torch.randn(batch, 3, size, size, device=_device())


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _disagreement(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    pairs = zip(one, other, strict=True)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def _count(step: Step) -> tuple[list[Tensor], int, int]:
    """Results of a step, its FLOPs, and bytes of activations kept for the backward pass.

    Each storage counts once, without weights.
    """
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        whole = tensor if tensor._base is None else tensor._base
        if not isinstance(whole, torch.nn.Parameter):
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        FlopCounterMode(display=False) as counter,
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        results = step()
    return results, counter.get_total_flops(), sum(saved.values())
