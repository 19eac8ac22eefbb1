"""Frozen backbones: loaded by name or from a local file, adapted by type."""

import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import open_clip
import safetensors.torch
import timm
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from vpt import resources
from vpt.backbones import clip
from vpt.backbones._checkpoints import is_numpy, load_numpy, misfit, read_clip, read_timm
from vpt.backbones._families import families, find_family
from vpt.backbones._wrapped import is_of, unwrap
from vpt.backbones.base import Backbone, share
from vpt.backbones.text import TextTower
from vpt.config import BackboneConfig, BackbonePreset
from vpt.errors import InputError, close
from vpt.settings import read_yaml, validate

__all__ = ["Backbone", "TextTower", "adapt", "families", "load", "load_tiny_clip"]

TINY_CLIP = Path(__file__).parent / "tiny_clip"


def adapt(model: Any, text_tower: type[TextTower] | None = None) -> Backbone:
    """A frozen view of `model` (a timm or open_clip model, or a Backbone) that shares its weights.

    Args:
        model: to adapt, or what `_wrapped.unwrap` knows to hold it.
        text_tower: one's own family, in place of the one that fits the model's text tower.

    Raises:
        InputError: no family knows this type of model, its weights are in half precision, quantised
            or change at each pass, or it has no text tower to take as `text_tower`.
    """
    model = unwrap(model)
    half = next((p.dtype for p in model.parameters() if p.dtype.itemsize < 4), None)
    if half:
        raise InputError(
            f"{type(model).__name__} has {half} weights: give model.float(); prompts train in "
            "float32, and train.precision=bf16 is the fast path"
        )
    if any(not isinstance(value, Tensor) for value in model.state_dict().values()):
        raise InputError(
            f"{type(model).__name__} has quantised layers: give the model before quantisation"
        )
    if any(is_of("peft", m) and type(m).__name__ == "MultiheadAttention" for m in model.modules()):
        raise InputError(
            "PEFT's layers on nn.MultiheadAttention change its weights at each pass: give "
            "model.merge_and_unload()"
        )
    if isinstance(model, Backbone):
        adapted = share(model)
    else:
        adapted = find_family(model)(model)
        adapted.check_features()
    if text_tower is not None:
        if not isinstance(adapted, clip.Adapter):
            raise InputError(
                f"text_tower={text_tower.__name__}: {adapted.family} has no text tower"
            )
        known, adapted.text = adapted.tokenizer, text_tower(adapted.model)
        adapted.tokenizer = adapted.tokenizer or known
        adapted.requires_grad_(False).eval()
    return adapted


def load(name: str, checkpoint: str | None = None) -> Backbone:
    """The backbone called `name`: under configs/backbone, of timm, or of open_clip.

    Args:
        name: `timm:` or `open_clip:` before it says whose, where both could know it (hub names).
        checkpoint: a local file of weights (safetensors, a pickle, of which only tensors are made,
            or the ViT authors' .npz), a folder with the files of a model's hub page, an open_clip
            tag such as `openai`, or None for the name's own default.

    Raises:
        InputError: unknown name, weights that are missing, unreadable or of another model, or
            that can't be downloaded, or only after asking for them.
    """
    if checkpoint and Path(checkpoint).expanduser().exists():
        checkpoint = str(Path(checkpoint).expanduser().resolve())  # found from any folder later
    config = BackboneConfig(name=name, checkpoint=checkpoint)
    preset = BackbonePreset(name=name)
    if name in resources.names("configs/backbone"):
        path = resources.find("configs/backbone", name)
        values = OmegaConf.to_container(read_yaml(path))
        preset = validate(BackbonePreset, values, where=str(path))
        checkpoint = checkpoint or preset.checkpoint
        if preset.terms and not checkpoint:
            raise InputError(f"backbone.name={name} needs backbone.checkpoint=FILE: {preset.terms}")
        name = preset.name
    library, _, rest = name.partition(":")
    if name == "tiny_clip":
        if checkpoint:
            raise InputError(f"backbone.checkpoint={checkpoint}: tiny_clip has its own: drop it")
        model = load_tiny_clip()
    elif library == "timm" or (library != "open_clip" and timm.is_model(name.split(".")[0])):
        model = _timm(rest if library == "timm" else name, checkpoint, preset)
    elif library == "open_clip" or name in open_clip.list_models() or ":" in name:
        name = rest if library == "open_clip" else name
        if checkpoint and Path(checkpoint).is_dir():
            name = f"local-dir:{checkpoint}"
        model = _open_clip(name, checkpoint)
    else:
        presets = resources.names("configs/backbone")
        known = close(name, [*presets, *timm.list_models(), *open_clip.list_models()])
        hint = f"; did you mean {known!r}?" if known else f"; presets: {', '.join(presets)}"
        raise InputError(f"backbone.name={name}: not known to timm or open_clip{hint}")
    backbone = adapt(model)
    if isinstance(backbone, clip.Adapter) and backbone.tokenizer is None:
        backbone.tokenizer = partial(_tokens, name)
    backbone.config = config
    return backbone


def _timm(name: str, checkpoint: str | None, preset: BackbonePreset) -> nn.Module:
    if f"{name}.{checkpoint}" in timm.list_pretrained():
        name, checkpoint = f"{name}.{checkpoint}", None
    if checkpoint is None:
        with _one_line(name, checkpoint), _quiet():
            return timm.create_model(name, pretrained=True, **preset.options)
    path = _file(checkpoint)
    overlay: dict[str, Any] = {**preset.preprocess, "num_classes": 0}
    with _one_line(name, checkpoint):
        if is_numpy(path):
            model = timm.create_model(
                name, num_classes=0, pretrained_cfg_overlay=overlay, **preset.options
            )
            load_numpy(model, path)
            return model
        overlay["state_dict"] = read_timm(path)
        model = timm.create_model(
            name, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay, **preset.options
        )
    del model.pretrained_cfg["state_dict"]  # a second copy of all weights
    return model


def _open_clip(name: str, checkpoint: str | None) -> nn.Module:
    tags = open_clip.list_pretrained_tags_by_model(name)
    if checkpoint is None and ":" not in name:
        raise InputError(
            f"backbone.name={name}: which weights? give backbone.checkpoint=FILE or one of "
            f"{', '.join(tags)}"
        )
    options: dict[str, Any] = {"pretrained": checkpoint}
    if name.startswith("local-dir:"):
        options = _text_tower(Path(checkpoint))
    elif checkpoint and checkpoint not in tags and not is_numpy(path := _file(checkpoint)):
        try:
            with _quiet():
                return open_clip.create_model(name, require_pretrained=True, **options)
        except Exception:  # it takes files with its own names alone: write such a one
            weights = read_clip(path)
        with TemporaryDirectory() as folder, _one_line(name, checkpoint), _quiet():
            options = {"pretrained": f"{folder}/weights.pt"}
            torch.save(weights, options["pretrained"])
            return open_clip.create_model(name, require_pretrained=True, **options)
    with _one_line(name, checkpoint), _quiet():
        return open_clip.create_model(name, require_pretrained=True, **options)


def _text_tower(folder: Path) -> dict[str, Any]:
    """open_clip's text settings that read a Hugging Face tower from `folder`, not from the hub."""
    path = folder / "open_clip_config.json"
    if not path.is_file():
        raise InputError(f"{folder}: no open_clip_config.json: give a folder with a model's files")
    config = json.loads(path.read_text())["model_cfg"]["text_cfg"]
    source = config.get("hf_model_name")
    if source is None:
        return {}
    if find_spec("transformers") is None:
        raise InputError(
            f"{folder}: its text tower needs transformers: pip install "
            "'visual-prompt-tuning[transformers]'"
        )
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{folder}: the text tower's config.json is missing: copy that of {source}"
        )
    local = {"hf_model_name": str(folder), "hf_model_pretrained": False}
    return {"text_cfg": config | local}


def _tokens(name: str, texts: Sequence[str]) -> Tensor:
    return _tokenizer(name)(texts)


@cache  # read when texts come, for methods without any need none
def _tokenizer(name: str) -> Any:
    try:
        with _quiet():
            return open_clip.get_tokenizer(name)
    except ImportError:
        raise InputError(
            f"the tokenizer of {name} needs transformers: pip install "
            "'visual-prompt-tuning[transformers]'"
        ) from None
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
        raise InputError(
            f"the tokenizer of {name} could not be read: connect to the network, or give a folder "
            f"with the files of the model's page as backbone.checkpoint ({reason})"
        ) from None


def load_tiny_clip(folder: Path = TINY_CLIP) -> open_clip.CLIP:
    """The embedded CLIP, whose file holds only the token rows that were trained.

    Any other word gets the mean of these and an eighth of the difference of two: without meaning,
    but different words stay different.
    """
    with _quiet():
        model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    state = safetensors.torch.load_file(folder / "weights.safetensors")
    rows, ids = state.pop("token_rows.weight").float(), state.pop("token_rows.ids").long()
    words = torch.arange(model.vocab_size)
    embedding = rows.mean(0) + (rows[words % len(rows)] - rows[words // len(rows)]) / 8
    embedding[ids] = rows
    model.load_state_dict({**state, "token_embedding.weight": embedding})
    return model


def _file(checkpoint: str) -> Path:
    path = Path(checkpoint).expanduser()
    for file in (path, path / "model.safetensors", path / "pytorch_model.bin"):  # a hub's folder
        if file.is_file():
            return file
    raise InputError(f"backbone.checkpoint={checkpoint}: no such file, nor a tag of this model")


@contextmanager
def _one_line(name: str, checkpoint: str | None) -> Iterator[None]:
    """Turn what timm, open_clip and the hub raise into one line with the mend."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        lines = str(error).splitlines() or [type(error).__name__]
        if checkpoint and Path(checkpoint).expanduser().exists():
            raise InputError(f"{checkpoint}: does not fit {name}: {misfit(error)}") from None
        raise InputError(
            f"weights of {name} could not be downloaded: connect to the network, give "
            "backbone.checkpoint=FILE, or try backbone.name=tiny_clip, which needs neither "
            f"({lines[0][:100]})"
        ) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """No logs and warnings of what is tried: an exception says what failed."""
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(logging.NOTSET)
