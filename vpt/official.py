"""Layouts of official checkpoints: which keys there are, and what they are called here."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vpt.errors import InputError

State = dict[str, Tensor]
Layout = Callable[[State], tuple[dict[str, Any], State]]  # to options, and tensors by our names

NETWORK = r"meta_net\.linear(1|2)\.(weight|bias)"


def lay_out(path: Path, method: str, state: State) -> tuple[dict[str, Any], State]:
    """Options and tensors as the method's layout reads them.

    Raises:
        InputError: a key is missing, or one that no such file has.
    """
    keep, drop, layout = LAYOUTS[method]
    missing = [key for key in keep if not any(re.fullmatch(key, name) for name in state)]
    if missing:
        key = missing[0].replace("\\", "")
        raise InputError(f"{path}: no {key} in it: is it of another method than {method}?")
    known = re.compile("|".join([*keep, *drop]))
    unknown = [name for name in state if not known.fullmatch(name)]
    if unknown:
        raise InputError(f"{path}: {unknown[0]} is nothing of {method}'s: is it of another method?")
    return layout(state)


def _coop(state: State) -> tuple[dict[str, Any], State]:
    context = state["ctx"]
    options = {"num_tokens": context.shape[-2], "class_specific": context.dim() == 3}
    return options, {"context": context}


def _cocoop(state: State) -> tuple[dict[str, Any], State]:
    layers = {"1": "0", "2": "2"}
    network = {
        f"meta_net.{layers[found[1]]}.{found[2]}": tensor
        for name, tensor in state.items()
        if (found := re.fullmatch(NETWORK, name))
    }
    return {"num_tokens": len(state["ctx"]), "init": None}, {"context": state["ctx"], **network}


def _kgcoop(state: State) -> tuple[dict[str, Any], State]:
    return {"num_tokens": len(state["ctx"]), "init": None}, {"context": state["ctx"]}


def _maple(state: State) -> tuple[dict[str, Any], State]:
    own = "prompt_learner."
    deep = _numbered(state, own + r"compound_prompts_text\.(\d+)", first=0)
    tensors = {"context": state[own + "ctx"]} | _stacked("text_prompts", deep)
    for part in ("weight", "bias"):
        maps = _numbered(state, own + rf"compound_prompt_projections\.(\d+)\.{part}", first=0)
        for number, tensor in enumerate([state[f"{own}proj.{part}"], *maps]):
            tensors[f"couplings.{number}.{part}"] = tensor
    return {"num_tokens": len(tensors["context"]), "depth": len(deep) + 1}, tensors


def _promptsrc(state: State) -> tuple[dict[str, Any], State]:
    blocks = r"_encoder\.transformer\.resblocks\.(\d+)\.VPT_shallow"
    images = [state["image_encoder.VPT"], *_numbered(state, "image" + blocks, first=1)]
    texts = _numbered(state, "text" + blocks, first=1)
    context = state["prompt_learner.ctx"]
    options = {
        "num_tokens": len(context),
        "text_depth": len(texts) + 1,
        "num_image_tokens": len(images[0]),
        "image_depth": len(images),
    }
    tensors = {"context": context, **_stacked("prompts", images)}
    return options, tensors | _stacked("text_prompts", texts)


def _numbered(state: State, pattern: str, first: int) -> list[Tensor]:
    """Tensors whose whole names fit `pattern`, by its number; none may lack."""
    found = {int(m[1]): t for n, t in state.items() if (m := re.fullmatch(pattern, n))}
    if sorted(found) != list(range(first, first + len(found))):
        raise InputError(f"the checkpoint has {pattern} for {sorted(found)} only: some are missing")
    return [found[number] for number in sorted(found)]


def _stacked(name: str, tensors: Sequence[Tensor]) -> State:
    if len({tensor.shape for tensor in tensors}) > 1:
        raise InputError(f"the checkpoint's {name} differ in shape from block to block")
    return {name: torch.stack(list(tensors))} if tensors else {}


TOKENS = ["token_prefix", "token_suffix"]
_PARTS = "weight", "bias"
_LEARNER = [rf"prompt_learner\.{name}" for name in TOKENS]
_FROZEN = ["logit_scale", r"(image|text)_encoder\..*"]
# the keys that a file must have, those that it may have, and what reads them
LAYOUTS: dict[str, tuple[list[str], list[str], Layout]] = {
    "coop": (["ctx", *TOKENS], [], _coop),
    "cocoop": (
        [
            "ctx",
            *TOKENS,
            *(rf"meta_net\.linear{n}\.{p}" for n in "12" for p in ("weight", "bias")),
        ],
        [],
        _cocoop,
    ),
    "kgcoop": (["ctx", *TOKENS], ["bias_vectors", NETWORK], _kgcoop),  # neither has a use there
    "maple": (
        [r"prompt_learner\.ctx", *(rf"prompt_learner\.proj\.{p}" for p in _PARTS), *_LEARNER],
        [r"prompt_learner\.compound_prompt.*", *_FROZEN],
        _maple,
    ),
    "promptsrc": (
        [r"prompt_learner\.ctx", r"image_encoder\.VPT", *_LEARNER],
        [r"prompt_learner\.ZS_image_encoder\..*", *_FROZEN],
        _promptsrc,
    ),
}
