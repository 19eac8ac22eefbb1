"""A prompted model as an ONNX file that serves without this package."""

import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from vpt import artifact, backbones
from vpt.config import BackboneConfig, Strict
from vpt.errors import InputError
from vpt.methods import Method
from vpt.run import NOTICE
from vpt.settings import apply_overrides, validate

try:
    import onnxruntime
    import onnxscript  # noqa: F401 (torch.onnx needs it)
except ModuleNotFoundError as error:
    raise InputError(
        f"{error.name} is not installed: pip install 'visual-prompt-tuning[onnx]'"
    ) from None

TOLERANCE = 1e-4


class Settings(Strict):
    """Keys of `vpt export`."""

    backbone: BackboneConfig


def load(path: Path, overrides: Sequence[str] = ()) -> Method:
    """The model of the artefact at `path`, on the backbone that `backbone.…=` names, or its own.

    Raises:
        InputError: as `artifact.load`; an override that is no `backbone.…=`.
    """
    _, metadata = artifact.read(path)
    own = {"backbone": artifact.backbone_settings(metadata)}
    settings = validate(Settings, apply_overrides(Settings, own, overrides), where=str(path))
    backbone = backbones.load(settings.backbone.name, settings.backbone.checkpoint)
    return artifact.load(path, backbone)


def export(model: Method, path: Path) -> tuple[list[Path], float]:
    """Write the folded `model` to `path`: prompts' keys and values, or class embeddings, constant.

    The graph is the model's own forward: `images`, float32 (B, channels, H, W) with any B,
    normalised as `model.backbone.preprocess` says, to `logits`, float32 (B, C). The file's metadata
    hold `class_names` and `preprocess` as JSON, the backbone's `fingerprint` and this package's
    `version`; of an artefact's model also the fitted `decision` as JSON (see `Decision`), which the
    logits do not contain, and the `notice` of medical data.

    Returns:
        The files written, a second one with the weights where they are too large for the first;
        and how far ONNX Runtime's logits are from torch's on random images, relative to the median
        size of a logit where that is above 1.

    Raises:
        InputError: a name that does not end in .onnx; a model that this torch cannot export;
            logits that differ by more than TOLERANCE.
    """
    if path.suffix != ".onnx":
        raise InputError(f"{path}: an ONNX file's name ends in .onnx")
    path.parent.mkdir(parents=True, exist_ok=True)
    folded, preprocess = model.fold().cpu(), model.backbone.preprocess
    shape = (5, preprocess.channels, preprocess.image_size, preprocess.image_size)
    batches = torch.randn(shape, generator=torch.Generator().manual_seed(0)).split(3)
    try:
        program = _trace(folded, batches[0])
    except Exception as error:  # exporters raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{path}: not written: torch {torch.__version__} cannot export {model.name} "
            f"({reason}): torch 2.15 is known to"
        ) from None
    for node in program.model.graph:
        node.metadata_props.clear()  # stack traces, with this machine's paths
    program.model.metadata_props.update(
        class_names=json.dumps(model.class_names),
        preprocess=json.dumps(model.backbone.preprocess.to_dict()),
        fingerprint=model.backbone.fingerprint(),
        version=artifact.package_version(),
    )
    known = getattr(model, "metadata", {})
    if "decision" in known:
        program.model.metadata_props["decision"] = json.dumps(known["decision"])
    if known.get("medical"):
        program.model.metadata_props["notice"] = NOTICE
    with TemporaryDirectory(dir=path.parent, prefix=".") as folder:
        file = Path(folder, path.name)
        program.save(file)
        difference = _difference(folded, file, batches)
        if not difference <= TOLERANCE:  # also where it is not a number
            raise InputError(
                f"{path}: not written: ONNX Runtime's logits are {difference:.0e} from torch's, "
                f"more than {TOLERANCE:.0e}"
            )
        files = sorted(Path(folder).iterdir(), reverse=True)  # the weights before what names them
        return [part.replace(path.with_name(part.name)) for part in files][::-1], difference


def _trace(model: Method, images: torch.Tensor) -> torch.onnx.ONNXProgram:
    # strict: else `len(tensor)` in a forward fixes the size of the batch
    traced = torch.export.export(
        model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=True
    )
    return torch.onnx.export(
        traced,
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: "batch"},),
    )


@torch.no_grad()
def _difference(model: Method, file: Path, batches: Sequence[torch.Tensor]) -> float:
    """The largest difference between logits of `file` and of `model`, as `export` returns it."""
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    expected = torch.cat([model(images) for images in batches])
    found = torch.cat(
        [torch.from_numpy(session.run(None, {"images": x.numpy()})[0]) for x in batches]
    )
    scale = expected.abs().median().clamp(min=1)  # no mean: some methods set a logit to -10,000
    return ((found - expected).abs().max() / scale).item()
