"""The prompt artefact: one safetensors file with the learned tensors and what they belong to."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn

from vpt import backbones, methods, targets
from vpt.backbones.base import Backbone
from vpt.backbones.clip import Tokenizer
from vpt.data.transforms import Preprocess
from vpt.errors import InputError, nearest
from vpt.files import write_atomically
from vpt.resources import package_version
from vpt.targets import Target

FORMAT = 1
HEAD = ("head.", "penalties")  # beginnings of what a linear read-out has of its classes
TOLERANCE = 5e-3  # of a backbone's features, relative: TF32 is within, quick GELU for GELU is not


def save(model: methods.Method, path: str | Path, **details: Any) -> Path:
    """Write the learned tensors of `model` and their metadata to `path`, atomically.

    Args:
        model: from `vpt.attach`.
        path: ends in .safetensors.
        **details: JSON values to keep beside, such as `figures` and `split_hash`.
    """
    path = Path(path)
    if model.is_folded:
        raise InputError(f"{path}: a folded model has no prompts to save: save the model it is of")
    known = model.target.name in {"multiclass", "multilabel"}  # to every version
    metadata = {
        "method": model.name,
        "options": model.options.model_dump(mode="json"),
        "class_names": model.class_names,
        "multilabel": model.target.name == "multilabel",
        **({} if known else {"target": model.target.name}),
        **details,
    }
    return write(path, model.artifact_tensors(), model.backbone, metadata)


def write(
    path: str | Path, tensors: dict[str, Tensor], backbone: Backbone, metadata: dict[str, Any]
) -> Path:
    """Write tensors, what they are, and the backbone that they belong to, atomically."""
    path, config = Path(path), backbone.config
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {
        "format": FORMAT,
        "version": package_version(),
        "preprocess": backbone.preprocess.to_dict(),
        "backbone": {
            "name": config.name if config else None,
            "checkpoint": config.checkpoint if config else None,
            **backbone.identity(),
        },
        **metadata,
    }
    write_atomically(path, to_bytes(tensors, metadata))
    return path


def to_bytes(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> bytes:
    """Contents of an artefact, with the digest that `read` checks."""
    text = json.dumps(metadata, sort_keys=True)
    return safetensors.torch.save(tensors, {"vpt": text, "sha256": digest(tensors, text)})


def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of an artefact, checked against the digest that it carries.

    Raises:
        InputError: missing, truncated, not an artefact, or changed since it was written.
    """
    return _read(Path(path), whole=True)


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Metadata of an artefact, without its tensors, so not checked against the digest.

    Raises:
        InputError: missing, truncated, or not an artefact.
    """
    return _read(Path(path), whole=False)[1]


def _read(path: Path, whole: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not path.is_file():
        raise InputError(f"{path}: no such artefact")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            names = file.keys() if whole else ()
            tensors = {name: file.get_tensor(name) for name in names}
    except Exception as error:
        raise InputError(
            f"{path}: truncated, or not a safetensors file ({error}): copy or train it again"
        ) from None
    if "vpt" not in header:
        raise InputError(f"{path}: a safetensors file, but not a prompt artefact of this package")
    if whole and header.get("sha256") != digest(tensors, header["vpt"]):
        raise InputError(f"{path}: changed since it was written: copy or train it again")
    metadata = json.loads(header["vpt"])
    if metadata["format"] != FORMAT:
        raise InputError(
            f"{path}: format {metadata['format']}, but this version reads {FORMAT}: update vpt"
        )
    return tensors, metadata


def backbone_settings(metadata: dict[str, Any]) -> dict[str, str]:
    """`name` and `checkpoint` of the backbone that an artefact was trained on, if it knows them."""
    known = {key: metadata["backbone"][key] for key in ("name", "checkpoint")}
    return {key: value for key, value in known.items() if value is not None}


def load(
    path: str | Path,
    backbone: nn.Module | None = None,
    class_names: Sequence[str] | None = None,
    tokenizer: Tokenizer | None = None,
    method: type[methods.Method] | None = None,
    target: type[Target] | Target | None = None,
    templates: Sequence[str] | None = None,
) -> methods.Method:
    """The prompted model of an artefact, in eval mode; its metadata is `model.metadata`.

    Args:
        path: written by `save`.
        backbone: the model it was trained on; None loads it as the artefact says.
        class_names: in place of those it was trained on; for a method that learned nothing of
            single classes.
        tokenizer: where the model was attached with one of its own.
        method: the class, where it was attached with one from outside this package: nothing is
            imported because an artefact names it.
        target: the same of the labels' kind.
        templates: in place of its own, of a method whose class texts are hand-written.

    Raises:
        InputError: as `read`; another backbone than the one it was trained on; one that the
            artefact cannot name; `class_names` for a method that belongs to its classes; a method
            or target from outside this package that is not given, or another than the artefact's.
    """
    tensors, metadata = read(path)
    kinds = find_kinds(path, metadata, method, target)
    adapted = find_backbone(path, metadata, backbone)
    if templates is not None and "templates" in metadata["options"]:
        metadata["options"]["templates"] = list(templates)
    return build(path, tensors, metadata, adapted, *kinds, class_names, tokenizer)


def build(
    path: str | Path,
    tensors: dict[str, Tensor],
    metadata: dict[str, Any],
    adapted: Backbone,
    method: str | type[methods.Method],
    target: str | type[Target] | Target,
    class_names: Sequence[str] | None = None,
    tokenizer: Tokenizer | None = None,
) -> methods.Method:
    """`load`, of what was read, on this very view of a backbone that was checked."""
    names = metadata["class_names"] if class_names is None else class_names
    try:
        model = methods.attach_to(
            adapted, method, None, names, tokenizer, target, metadata["options"]
        )
    except InputError as error:
        raise InputError(f"{path}: written by version {metadata['version']}: {error}") from None
    model.make_room(tensors)
    own = model.artifact_tensors()
    if class_names is not None:
        if not model.takes_names:
            raise InputError(
                f"{path}: what {metadata['method']} learned belongs to its own classes: drop "
                "class_names, or train it on the new ones"
            )
        tensors |= {name: own[name] for name in model.from_names}
        # a decision was fitted on the classes of then
        metadata = {key: value for key, value in metadata.items() if key != "decision"}
        metadata["class_names"] = model.class_names
    expected = {name: tensor.shape for name, tensor in own.items()}
    if expected != {name: tensor.shape for name, tensor in tensors.items()}:
        raise InputError(
            f"{path}: its tensors are not those of method {metadata['method']} in this version: "
            f"install version {metadata['version']}"
        )
    model.load_state_dict(tensors, strict=False)
    model.metadata = metadata
    return model.eval()


def start_from(model: methods.Method, path: str | Path) -> dict[str, Any]:
    """Give `model` all that an artefact of its method learned, but for the head; its metadata.

    Its classes may be others. Nothing is changed where it is refused.

    Raises:
        InputError: as `read`; another method, backbone or shapes; a method that learns nothing
            beside a head, or whose prompts belong to classes, where these are others.
    """
    tensors, metadata = read(path)
    if metadata["method"] != model.name:
        raise InputError(
            f"{path}: {metadata['method']} learned it, so it is no start for {model.name}: give an "
            f"artefact of {model.name}"
        )
    check_weights(path, metadata, model.backbone)
    check_answer(path, metadata, model.backbone)
    own = {n: p for n, p in model.tunable_parameters().items() if not n.startswith(HEAD)}
    if model.solved or not own:
        raise InputError(f"{path}: {model.name} learns nothing beside a head: train it alone")
    of_classes = not (model.takes_names or hasattr(model, "head"))
    if of_classes and metadata["class_names"] != model.class_names:
        raise InputError(
            f"{path}: what {model.name} learned belongs to its own classes: train it on these alone"
        )
    known = own.keys() | model.artifact_tensors().keys()
    given = {n: t.shape for n, t in tensors.items() if n in own or n not in known}
    given = {name: shape for name, shape in given.items() if not name.startswith(HEAD)}
    wanted = {name: parameter.shape for name, parameter in own.items()}
    for name in sorted(given.keys() | wanted.keys()):
        theirs, ours = (tuple(of.get(name) or ()) or "none" for of in (given, wanted))
        if theirs != ours:
            raise InputError(
                f"{path}: its {name}: {theirs}, but {ours} here: give method its options "
                f"{json.dumps(metadata['options'])}"
            )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])
    return metadata


def find_backbone(
    path: str | Path, metadata: dict[str, Any], backbone: nn.Module | None = None
) -> Backbone:
    """The backbone of an artefact, given or loaded by its name, checked to be the one.

    Raises:
        InputError: it can't name its backbone, or this is another.
    """
    made_for = metadata["backbone"]
    if backbone is None:
        if made_for["name"] is None:
            raise InputError(
                f"{path}: does not know its backbone's name: give backbone=MODEL to vpt.load"
            )
        backbone = backbones.load(made_for["name"], made_for["checkpoint"])
    adapted = backbones.adapt(backbone)
    check_weights(path, metadata, adapted)
    adapted.preprocess = Preprocess.from_dict(metadata["preprocess"])
    check_answer(path, metadata, adapted)
    return adapted


def check_weights(path: str | Path, metadata: dict[str, Any], adapted: Backbone) -> None:
    """Refuses a backbone of other weights than the artefact was trained on.

    Raises:
        InputError: its fingerprint is another.
    """
    made_for = metadata["backbone"]
    if adapted.fingerprint() != made_for["fingerprint"]:
        raise InputError(
            f"{path}: made for backbone {made_for['name'] or 'unnamed'} with fingerprint "
            f"{made_for['fingerprint'][:12]}, but this one has {adapted.fingerprint()[:12]}: "
            "give the backbone that it was trained on"
        )


def check_answer(path: str | Path, metadata: dict[str, Any], adapted: Backbone) -> None:
    """Refuses a backbone that makes other features of an image of the artefact's size.

    Raises:
        InputError: weights alike, but another architecture.
    """
    made_for = metadata["backbone"]
    if "answer" in made_for and _differ(adapted.answer(), made_for["answer"]):
        raise InputError(
            f"{path}: made for a backbone of these weights but another architecture, such as "
            "another activation or pooling: give the backbone that it was trained on"
        )


def find_kinds(
    path: str | Path,
    metadata: dict[str, Any],
    method: type[methods.Method] | None = None,
    target: type[Target] | Target | None = None,
) -> tuple[Any, Any]:
    """Method and target of an artefact: those given, else names of this package.

    Raises:
        InputError: one from outside that is not given, or another than the artefact's.
    """
    if "kind" in metadata:
        raise InputError(
            f"{path}: no classifier, its kind is {metadata['kind']}: give it to vpt predict, vpt "
            "eval or vpt.dense.artefact.load"
        )
    kind = "multilabel" if metadata.get("multilabel") else "multiclass"
    return (
        _known(path, "method", metadata["method"], method, methods.names()),
        _known(path, "target", metadata.get("target", kind), target, targets.names()),
    )


def _known(path: str | Path, kind: str, name: str, given: Any, names: Sequence[str]) -> Any:
    """The class `given`, or a name of this package."""
    if given is not None and given.name != name:
        raise InputError(f"{path}: its {kind} is {name}, not {given.name}: give {kind}={name}")
    if given is None and name not in names:
        raise InputError(
            f"{path}: its {kind} {name} is not one of this package, but a class of somebody's own: "
            f"give {kind}=CLASS{nearest(name, names)}"
        )
    return given or name


def _differ(one: list[float], other: list[float]) -> bool:
    a, b = torch.tensor(one), torch.tensor(other)
    return bool((a - b).norm() > TOLERANCE * b.norm())


def digest(tensors: dict[str, Tensor], text: str) -> str:
    """SHA-256 of `text` and of tensors on the CPU, with their names, types and shapes."""
    hashed = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        hashed.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        hashed.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return hashed.hexdigest()
