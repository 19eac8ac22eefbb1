"""Files of weights, read without running anything that they hold."""

import re
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zipfile import ZipFile, is_zipfile

import safetensors.torch
import torch
from timm.models import clean_state_dict
from torch import Tensor, nn
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from vpt.errors import InputError

State = dict[str, Tensor]

# Which part of a training's checkpoint its own evaluation reads; the first that is there.
_PARTS = (
    *("state_dict_ema", "model_ema", "ema", "ema_state_dict", "params_ema", "teacher"),
    *("state_dict", "model", "module", "model_state_dict", "model_state", "net", "network"),
    *("weights", "params", "backbone", "encoder"),
)
_TOWERS = ("teacher", "base_encoder", "encoder_q", "ema")  # the same of names within a part
# Whatever stands before these names stands before all of the model's.
_TIMM = (
    *("patch_embed.proj.weight", "embeds.proj.weight"),
    "embeddings.patch_embeddings.projection.weight",  # transformers
)
_CLIP = ("logit_scale",)
_BESIDE = re.compile(r"head|fc\.|classifier|decoder|pooler")  # readouts, which prompts replace
_NOT_WEIGHTS = {"input_resolution", "context_length", "vocab_size"}  # of OpenAI's archives
# ViT, DeiT, DINOv2, as their files have it and as transformers 5 names it in memory
_TRANSFORMERS = (
    (r"^encoder\.layer\.|^layers\.", "blocks."),
    (r"^embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"^embeddings\.position_embeddings", "pos_embed"),
    (r"^embeddings\.distillation_token", "dist_token"),
    (r"^embeddings\.", ""),
    (r"^layernorm", "norm"),
    (r"^classifier|^cls_classifier", "head"),
    (r"^distillation_classifier", "head_dist"),
    (r"attention\.output\.dense|attention\.o_proj", "attn.proj"),
    (r"attention\.attention\.([qkv])(uery|ey|alue)|attention\.([qkv])_proj", r"attn.\1\3"),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"intermediate\.dense", "mlp.fc1"),
    (r"(blocks\.\d+)\.output\.dense", r"\1.mlp.fc2"),
    (r"layer_scale(\d)\.lambda1", r"ls\1.gamma"),
)


def read_timm(path: Path) -> State:
    """Weights of an image tower by timm's names, without a classifier or a decoder.

    Also of transformers' ViT, DeiT and DINOv2. What a training's checkpoint holds beside its model,
    and a prefix of all names, are left out. A pickle is read with `weights_only`, and its other
    objects are stood in for: none is made.

    Raises:
        InputError: unreadable, or no weights of one model; says what it is and what is wanted.
    """
    state = _of_transformers(_without_prefix(path, _read(path), _TIMM))
    return {name: tensor for name, tensor in state.items() if not _BESIDE.match(name)}


def read_clip(path: Path) -> State:
    """Weights of both towers by open_clip's names; the rest as `read_timm`."""
    return _without_prefix(path, _read(path), _CLIP)


def load_numpy(model: nn.Module, path: Path) -> None:
    """Load into a model of timm the arrays that the ViT's authors published.

    Raises:
        ValueError: they are of another architecture.
    """
    if not hasattr(model, "load_pretrained"):
        raise ValueError("this architecture has no weights in an .npz")
    blocks = set(re.findall(r"encoderblock_(\d+)", " ".join(ZipFile(path).namelist())))
    if blocks and len(blocks) != len(model.blocks):
        raise ValueError(f"found {len(blocks)} blocks, wanted {len(model.blocks)}")
    model.load_pretrained(str(path))


def is_numpy(path: Path) -> bool:
    """True for an archive of arrays, as the ViT's authors wrote them."""
    return is_zipfile(path) and any(n.endswith(".npy") for n in ZipFile(path).namelist())


def misfit(error: Exception) -> str:
    """In one line, what `load_state_dict` found and wanted; another error's first line."""
    text = str(error) or type(error).__name__
    size = re.search(
        r"mismatch for (\S+): .* shape torch.Size\((.*?)\) from .* torch.Size\((.*?)\)", text
    )
    if size:
        return "{} is {}, wanted {}".format(*size.groups())
    said = []
    for kind, what in (("Unexpected", "found"), ("Missing", "wanted")):
        names = re.findall(r'"(.+?)"', "".join(re.findall(rf"{kind} key.*", text)))
        more = f" and {len(names) - 1} more" if names[1:] else ""
        said += [f"{what} {names[0]}{more}"] if names else []
    return ", ".join(said) or text.splitlines()[0]


class _Object:
    """Stands in for an object of the file: a dictionary of what it is given, as many are."""

    def __new__(cls, *_: Any) -> Any:
        return OrderedDict()


class _Array:
    """Stands in for what NumPy makes: scalars, dtypes, arrays."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def _read(path: Path) -> State:
    try:
        content = _content(path)
    except InputError:
        raise
    except Exception as error:
        lines = str(error).splitlines() or [type(error).__name__]
        reason = next((line for line in lines if "WeightsUnpickler error" in line), lines[0])
        raise InputError(
            f"{path}: not a file of weights that can be read safely ({reason.strip()[:100]})"
        ) from None
    return clean_state_dict(_part(path, content))


def _content(path: Path) -> Any:
    head = path.open("rb").read(100)
    if head.startswith(b"version https://git-lfs"):
        raise InputError(f"{path}: a pointer of Git LFS, not the weights: run git lfs pull")
    if head[8:10] == b'{"':
        return safetensors.torch.load_file(path)
    if is_zipfile(path) and any("/code/" in name for name in ZipFile(path).namelist()):
        raise InputError(
            f"{path}: a TorchScript archive, which runs code: torch.save the state_dict() of "
            "torch.jit.load(FILE); of OpenAI's, backbone.checkpoint=openai loads the same weights, "
            "and they fit names with -quickgelu"
        )
    if head[:1] != b"\x80" and not is_zipfile(path):
        raise InputError(
            f"{path}: not a file of weights (PyTorch's, safetensors or .npz): download it again"
        )
    with safe_globals(_stand_ins(path)):
        return torch.load(path, map_location="cpu", weights_only=True)


def _stand_ins(path: Path) -> list[type]:
    """A class for each name that the file's pickle asks for beside weights."""
    try:
        names = get_unsafe_globals_in_checkpoint(path)
    except ValueError:  # of before torch 1.6
        names = ["argparse.Namespace", "numpy.dtype"]
        names += [f"numpy.{core}.multiarray.scalar" for core in ("core", "_core")]
    classes = []
    for full in names:
        module, _, name = full.rpartition(".")
        base = _Array if module.startswith("numpy") else _Object
        classes.append(type(name, (base,), {"__module__": module}))
    return classes


def _part(path: Path, content: Any) -> State:
    """The tensors of the part of `content` that is the model."""
    if "_modules" in getattr(content, "__dict__", ()):
        raise InputError(f"{path}: a whole pickled model: save its state_dict()")
    if not isinstance(content, dict):
        raise InputError(f"{path}: a {type(content).__name__}, wanted a model's state_dict()")
    tensors = {n: v for n, v in content.items() if isinstance(v, Tensor) and n not in _NOT_WEIGHTS}
    parts = [name for name, part in content.items() if isinstance(part, dict)]
    named = [name for name in _PARTS if name in parts]
    if named or (len(parts) == 1 and not tensors):
        return _part(path, content[(named or parts)[0]])
    if not tensors:
        raise InputError(
            f"{path}: found {', '.join(map(str, list(content)[:8])) or 'nothing'}, "
            f"wanted weights, or one of {', '.join(_PARTS)}"
        )
    return tensors


def _without_prefix(path: Path, state: State, landmarks: Sequence[str]) -> State:
    """The model's own tensors, where one prefix stands before the names of all of them."""
    prefixes = [
        name.removesuffix(landmark)
        for landmark in landmarks
        for name in state
        if f".{name}".endswith(f".{landmark}")
    ]
    if not prefixes or "" in prefixes:
        return state
    prefix, *others = [p for tower in _TOWERS for p in prefixes if tower in p][:1] or prefixes
    if others:
        raise InputError(
            f"{path}: weights of several models, {', '.join(prefixes)}: save those of one"
        )
    return {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}


def _of_transformers(state: State) -> State:
    """Names of transformers' ViT, DeiT and DINOv2 as timm's, with one matrix of q, k and v."""
    if "embeddings.patch_embeddings.projection.weight" not in state:
        return state
    renamed = {}
    for name, tensor in state.items():
        for pattern, new in _TRANSFORMERS:
            name = re.sub(pattern, new, name)
        renamed[name] = tensor
    for name in [name for name in renamed if ".attn.q." in name]:
        q, k, v = (renamed.pop(name.replace(".q.", f".{part}.")) for part in "qkv")
        renamed[name.replace(".q.", ".qkv.")] = torch.cat([q, k, v])
    return renamed
