"""Checkpoints of the official implementations as prompted models of this package."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vpt import artifact, backbones, methods, unpickle
from vpt.accelerator import make_accelerator
from vpt.backbones import Backbone
from vpt.backbones.text import CLIP_VOCABULARY
from vpt.config import (
    BackboneConfig,
    DataConfig,
    MethodConfig,
    RunConfig,
    Strict,
    TrainConfig,
    apply_overrides,
)
from vpt.data.loaders import make_loader
from vpt.data.sources import open_source
from vpt.errors import InputError
from vpt.methods import Method
from vpt.methods.base import require_clip
from vpt.methods.linear_probe import solve_head
from vpt.official import LAYOUTS, TOKENS, State, lay_out
from vpt.progress import Log
from vpt.run import prepare
from vpt.settings import validate
from vpt.training.features import image_features
from vpt.training.training_set import Batches, TrainingSet

WORDS = "a photo of a"  # that MaPLe and PromptSRC start from
SPACED = {r"(?<=\d) (?=\d)": "", r" ?([-/.&']) ?": r"\1", r"(?<=\() | (?=\))": ""}


def import_checkpoint(
    path: str | Path,
    method: str,
    backbone: nn.Module,
    class_names: Sequence[str] | None = None,
    train: DataLoader | None = None,
    **options: Any,
) -> Method:
    """The model that an official implementation saved at `path`, in eval mode; nothing is executed.

    Of CoOp, CoCoOp, KgCoOp, MaPLe and PromptSRC a `model.pth.tar-N` of Dassl; of KMnP/vpt a
    `prompt_epN.pth`, which holds no head, so that one is solved on `train`.

    Args:
        path: of the checkpoint.
        method: coop, cocoop, kgcoop, maple, promptsrc or vpt.
        backbone: the one it was trained on; CLIP's is checked by the embedding of its start token.
        class_names: in label order, checked against the file's texts; None: as these spell them,
            in lower case. `vpt` needs them.
        train: images to solve a head on, for `vpt`.
        **options: of the method, where the file does not tell them: `position` of CoOp's class
            names; `init` of MaPLe's and PromptSRC's texts, if not "a photo of a".

    Raises:
        InputError: not such a file; something is missing, unknown or of another size; another
            backbone or other classes than it was trained on.
    """
    path = Path(path)
    content, adapted = unpickle.read(path), backbones.adapt(backbone)
    if method == "vpt":
        return _import_vpt(path, content, adapted, class_names, train, options)
    if method not in LAYOUTS:
        known = ", ".join([*LAYOUTS, "vpt"])
        raise InputError(f"vpt import {method}: no layout of that name: take one of {known}")
    state = _state(path, content)
    words, (found, tensors) = "", lay_out(path, method, state)
    if method in {"maple", "promptsrc"}:
        words = options.get("init") or WORDS
        found["init"] = words
    require_clip(adapted, method)
    spelled = _class_names(path, adapted, state, found["num_tokens"], words)
    names = spelled if class_names is None else list(class_names)
    _check_names(path, names, spelled)
    model = methods.attach(adapted, method, class_names=names, **{**found, **options})
    return _filled(path, model, tensors)


def _state(path: Path, content: dict[str, Any]) -> State:
    state = content.get("state_dict")
    if not isinstance(state, dict):
        raise InputError(f"{path}: no state_dict in it: give a model.pth.tar-N that Dassl wrote")
    named = {str(n).removeprefix("module."): t for n, t in state.items()}
    odd = [name for name, tensor in named.items() if not isinstance(tensor, Tensor)]
    if odd:
        raise InputError(f"{path}: {odd[0]} is no tensor")
    return {n: t.detach().float() if t.is_floating_point() else t for n, t in named.items()}


def _class_names(
    path: Path, backbone: Backbone, state: State, num_tokens: int, words: str
) -> list[str]:
    """Names that the suffixes spell: rows of the token embedding, compared in half precision.

    Raises:
        InputError: rows that are not the backbone's: it is another CLIP.
    """
    prefix, suffix = (
        next(state[n] for n in (name, f"prompt_learner.{name}") if n in state) for name in TOKENS
    )
    if prefix.dim() != 3 or suffix.dim() != 3:
        raise InputError(
            f"{path}: token_prefix and token_suffix have {suffix.dim()} axes, wanted 3"
        )
    tower = backbone.text
    table = tower.embed(torch.arange(tower.parts.vocab_size)).detach().cpu()
    if table.shape[0] != CLIP_VOCABULARY or table.shape[1] != suffix.shape[-1]:
        raise InputError(
            f"{path}: made for a text tower of width {suffix.shape[-1]} and CLIP's BPE"
        )
    ids = {row.tobytes(): index for index, row in enumerate(table.half().numpy())}
    tokenizer, other = open_clip.SimpleTokenizer(), "is it of the CLIP that it was trained on?"
    start = {ids.get(row.tobytes()) for row in prefix[:, 0].half().numpy()}
    if start != {tokenizer.sot_token_id}:
        raise InputError(f"{path}: its start token is not the backbone's: {other}")
    frozen = tower.words(words)[num_tokens:].tolist() if words else []
    names = []
    for rows in suffix.half().numpy():
        found = [ids.get(row.tobytes()) for row in rows]
        if None in found or tokenizer.eot_token_id not in found:
            raise InputError(f"{path}: its texts are not of the backbone's tokens: {other}")
        text = found[: found.index(tokenizer.eot_token_id)]
        if text[: len(frozen)] != frozen or len(text) < len(frozen) + 2:
            raise InputError(f"{path}: its texts do not begin with {words!r}: give init=WORDS")
        names.append(_spell(tokenizer, text[len(frozen) : -1]))
    return names


def _spell(tokenizer: open_clip.SimpleTokenizer, ids: list[int]) -> str:
    """The text of tokens, spaced as people write it where that has the same tokens."""
    text = tokenizer.decode(ids).strip()
    for pattern, joined in SPACED.items():
        shorter = re.sub(pattern, joined, text)
        if tokenizer.encode(shorter) == ids:
            text = shorter
    return text


def _check_names(path: Path, names: Sequence[str], spelled: Sequence[str]) -> None:
    """Refuse class names whose tokens are not those of the file.

    Raises:
        InputError: another number of them, another name, or another order.
    """
    if len(names) != len(spelled):
        raise InputError(f"{path}: {len(spelled)} classes, but {len(names)} class names")
    encode = open_clip.SimpleTokenizer().encode
    for label, (name, theirs) in enumerate(zip(names, spelled, strict=True)):
        if encode(name.replace("_", " ")) != encode(theirs):
            raise InputError(
                f"{path}: class {label} is {theirs!r}, but {name!r} is given: give the class names "
                "in the order of its training"
            )


def _filled(path: Path, model: Method, tensors: State) -> Method:
    """The model with all its tensors from the file.

    Raises:
        InputError: tensors of other sizes than the backbone's.
    """
    wanted = {name: tuple(p.shape) for name, p in model.tunable_parameters().items()}
    given = {name: tuple(t.shape) for name, t in tensors.items()}
    for name in sorted(wanted.keys() | given.keys()):
        if wanted.get(name) != given.get(name):
            raise InputError(
                f"{path}: {name} is {given.get(name, 'missing')}, but {model.name} on this "
                f"backbone has {wanted.get(name, 'none')}: give the backbone it was trained on"
            )
    model.load_state_dict(tensors, strict=False)
    return model.eval()


def _vpt_prompts(path: Path, content: dict[str, Any], backbone: Backbone) -> Tensor:
    """Prompts (layers or 1, tokens, width) of a file of KMnP/vpt.

    Raises:
        InputError: not such a file; projected prompts; another number of blocks.
    """
    odd = content.keys() - {"shallow_prompt", "deep_prompt"}
    parts = [content.get(key) for key in ("shallow_prompt", "deep_prompt")]
    arrays = [part for part in parts if part is not None]
    if odd or parts[0] is None or not all(isinstance(a, np.ndarray | Tensor) for a in arrays):
        raise InputError(f"{path}: no shallow_prompt in it: give a prompt_epN.pth of KMnP/vpt")
    prompts = torch.cat([torch.as_tensor(array).float() for array in arrays])
    if prompts.dim() != 3 or len(arrays[0]) != 1:
        raise InputError(f"{path}: prompts of shape {tuple(prompts.shape)}, wanted three axes")
    layers, _, width = prompts.shape
    if width != backbone.width:
        raise InputError(
            f"{path}: prompts of width {width} on a backbone of {backbone.width}: projected "
            "prompts can't be restored, as the file lacks the projection (or take the backbone "
            "that it was trained on)"
        )
    if layers not in (1, backbone.num_layers):
        raise InputError(
            f"{path}: prompts of {layers} blocks, but the backbone has {backbone.num_layers}"
        )
    return prompts


def _vpt_method(prompts: Tensor) -> tuple[str, dict[str, Any]]:
    return "vpt_deep" if len(prompts) > 1 else "vpt_shallow", {"num_tokens": prompts.shape[1]}


def _import_vpt(
    path: Path,
    content: dict[str, Any],
    backbone: Backbone,
    class_names: Sequence[str] | None,
    train: DataLoader | None,
    options: dict[str, Any],
) -> Method:
    prompts = _vpt_prompts(path, content, backbone)
    if class_names is None or train is None:
        raise InputError(f"{path}: holds no head: give class_names and train to solve one on")
    name, found = _vpt_method(prompts)
    model = methods.attach(backbone, name, class_names=class_names, **{**found, **options})
    return _solved(path, model, prompts, train)


def _solved(path: Path, model: Method, prompts: Tensor, train: DataLoader) -> Method:
    """The model with these prompts, and the linear probe of its features as head."""
    with torch.no_grad():
        head = {f"head.{n}": p for n, p in model.head.named_parameters()}
        _filled(path, model, {"prompts": prompts, **head})
    batches = Batches(TrainingSet(train, model.target, len(model.class_names)).plain)
    seen = image_features(model, batches, make_accelerator("fp32", False))
    solve_head(model.head, model.target, seen.inputs, seen.labels)
    return model.eval()


class Settings(Strict):
    """Keys of `vpt import`."""

    backbone: BackboneConfig
    data: DataConfig = DataConfig()
    method: MethodConfig


def import_file(
    method: str, path: Path, overrides: Sequence[str], out: Path | None, log: Log = print
) -> Path:
    """Write the artefact of an official checkpoint; returns its path.

    Args:
        method: as in `import_checkpoint`.
        path: of the checkpoint.
        overrides: `backbone.…=`, `data.…=` and `method.…=`. With data.root, class names are the
            data's; for `vpt` the head is solved on its training part.
        out: the artefact; None: METHOD.safetensors beside the checkpoint.
        log: takes lines for the user.

    Raises:
        InputError: as `import_checkpoint`; no backbone.name; no data.root for `vpt`.
    """
    given = {"method": {"name": method}}
    settings = apply_overrides(Settings, given, overrides)
    if "backbone" not in settings:
        raise InputError(f"vpt import {method}: give backbone.name=NAME, that it was trained on")
    chosen = validate(Settings, settings, where=f"vpt import {method}")
    out, details = out or path.parent / f"{method}.safetensors", {}
    if method == "vpt":
        model, details = _vpt_file(path, chosen, log)
    else:
        names = None
        if chosen.data.root is not None or chosen.data.name is not None:
            names = open_source(chosen.data).class_names
        backbone = backbones.load(chosen.backbone.name, chosen.backbone.checkpoint)
        model = import_checkpoint(path, method, backbone, names, **chosen.method.options)
        log(f"classes: {', '.join(model.class_names)}")
    return artifact.save(model, out, **details)


def _vpt_file(path: Path, chosen: Settings, log: Log) -> tuple[Method, dict[str, Any]]:
    """The model of a file of KMnP/vpt, its head solved on the data, and the artefact's metadata."""
    if chosen.data.root is None and chosen.data.name is None:
        raise InputError(f"{path}: holds no head: give data.root=IMAGES to solve one on")
    backbone = backbones.load(chosen.backbone.name, chosen.backbone.checkpoint)
    name, found = _vpt_method(_vpt_prompts(path, unpickle.read(path), backbone))
    method = MethodConfig(name=name, **{**found, **chosen.method.options})
    prepared = prepare(RunConfig(backbone=chosen.backbone, data=chosen.data, method=method), log)
    model, train = prepared.model, prepared.split.train
    loader = make_loader(train, model.backbone.preprocess, TrainConfig().batch_size, train=True)
    prompts = _vpt_prompts(path, unpickle.read(path), model.backbone)
    log(f"head: solved on {len(train)} images; which of them trained the prompts, no file says")
    return _solved(path, model, prompts, loader), prepared.details
