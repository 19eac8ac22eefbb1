"""One run on boxes or masks: prepare, fit, test, write, as runs of classifiers are."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed

from vpt import backbones
from vpt.checks import find_grey_range
from vpt.config import to_yaml
from vpt.data.survey import check_images
from vpt.dense import artefact
from vpt.dense.canvas import Canvas, choose_canvas
from vpt.dense.config import DetectConfig, SegmentConfig, load_dense
from vpt.dense.fit import FLIPS, Record, fit
from vpt.dense.images import CanvasImages, MapSource
from vpt.dense.kinds import KINDS
from vpt.dense.map_files import SPARE_BYTES
from vpt.dense.pyramid import Maps, attach
from vpt.dense.split import Split, split_images
from vpt.errors import InputError
from vpt.files import write_atomically
from vpt.folder import RunFolder, check_cache
from vpt.progress import Log
from vpt.resources import package_version
from vpt.run import NOTICE, check_same_split, json_lines

Config = DetectConfig | SegmentConfig


@dataclass(frozen=True, eq=False)
class Prepared:
    """Result of `prepare`: data that it read and checked, and the model to train."""

    config: Config
    folder: RunFolder
    kind: Any
    layout: str
    split: Split
    canvas: Canvas
    model: Any
    diagnosis: dict[str, Any]

    @property
    def medical(self) -> bool:
        """True of images of patients."""
        return self.split.train.patients is not None

    def images(self, part: Any) -> CanvasImages:
        """The images of a part of the split, on the canvas."""
        return CanvasImages(part.images, self.canvas, self.model.maps.method.backbone)


def run(
    config: Config, *, resume: bool = False, log: Log = print, progress: bool = True
) -> dict[str, Any]:
    """Train and evaluate what `config` says; returns the contents of result.json.

    Everything that can be wrong with the input is checked before the first file is written. With
    `resume` an interrupted run goes on to the same numbers, and a finished one is returned as it
    is.

    Raises:
        InputError: bad input, or a folder that holds another run or one on other images.
    """
    folder = RunFolder(config.out or default_folder(config))
    if folder.config.is_file():
        if not resume:
            state = "finished" if folder.result.is_file() else "interrupted"
            raise InputError(
                f"{folder.path}: holds a run that is {state}: give --resume, or another out=DIR"
            )
        if _hash(folder) != config.hash:
            raise InputError(
                f"{folder.path}: holds a run with other settings: give another out=DIR"
            )
        if folder.result.is_file():
            return json.loads(folder.result.read_text())
    prepared = prepare(config, log)
    records = train(prepared, log, progress)
    return write(prepared, records, *test(prepared, log))


def _hash(folder: RunFolder) -> str:
    try:
        return load_dense(str(folder.config)).hash
    except InputError as error:
        raise InputError(
            f"{folder.path}: holds no run of this kind ({error}): give another out=DIR"
        ) from None


def default_folder(config: Config) -> Path:
    """runs/KIND-METHOD-DATA-SHOTSshot-seedSEED."""
    shots = "all" if config.data.shots is None else f"{config.data.shots}shot"
    name = f"{config.kind}-{config.method.name}-{config.data.root.name}-{shots}"
    return Path("runs") / f"{name}-seed{config.data.seed}"


def prepare(config: Config, log: Log = print) -> Prepared:
    """Read and check all that a run needs, and make the model; writes nothing.

    Raises:
        InputError: anything that is wrong with the input.
    """
    kind = KINDS[config.kind]
    source = kind.read(config.data)
    split = split_images(source.parts, config.data.shots, config.data.seed)
    patients = f" of {len(set(split.train.patients))} patients" if split.train.patients else ""
    log(
        f"data: {source.layout}, shots are images: {len(split.train)} training{patients}, "
        f"{len(split.val)} validation, {len(split.test)} test images, split {split.hash}"
    )
    for line in [*source.notes, *split.notes, kind.describe(split.train, source.class_names)]:
        log(f"data: {line}")
    kind.check(split)
    folder = RunFolder(config.out or default_folder(config))
    check_same_split(folder, split.hash)
    survey = check_images([*split.train.images, *split.val.images, *split.test.images])
    grey = find_grey_range(survey, split.train.images, log)
    set_seed(config.train.seed)
    backbone = backbones.load(config.backbone.name, config.backbone.checkpoint)
    backbone.preprocess = backbone.preprocess.model_copy(update={"grey_range": grey})
    if torch.cuda.is_available():
        backbone = backbone.cuda()
    canvas = choose_canvas(backbone, split.train.sizes, config.data.size)
    method = attach(backbone, config.method.name, source.class_names, config.method.options)
    maps = Maps(method, getattr(config, config.kind).layers, (canvas.height, canvas.width))
    model = kind.model(maps, source.class_names, config).to(backbone.device)
    diagnosis, lines = kind.diagnose(
        split.train, canvas, backbone.patch_size[0], source.class_names, not backbone.takes_sizes
    )
    for line in lines:
        log(f"data: {line}")
    tunable = sum(p.numel() for p in model.tunable_parameters().values())
    log(
        f"model: {config.method.name} on {config.backbone.name} at {canvas.width}×{canvas.height}, "
        f"{tunable:,} tunable parameters{', maps computed once' if maps.frozen else ''}"
    )
    if config.engine.feature_cache:
        check_cache(config.engine.feature_cache)
        log(f"maps: {_kept(config, maps, len(split.train))}")
    return Prepared(config, folder, kind, source.layout, split, canvas, model, diagnosis)


def _kept(config: Config, maps: Maps, count: int) -> str:
    """Says in words what `engine.feature_cache` does for `count` training images."""
    if not maps.frozen:
        return f"they change while {config.method.name} trains, so engine.feature_cache is not used"
    height, width = maps.size
    rows, columns = (side // maps.method.backbone.patch_size[0] for side in (height, width))
    size = 4 * maps.width * rows * columns * count * len(FLIPS[config.data.flips])
    return (
        f"of {count} images up to {size / 1e9:.2f} GB in {config.engine.feature_cache}, "
        f"of whose disk {SPARE_BYTES / 2**30:g} GiB stay free"
    )


def train(prepared: Prepared, log: Log = print, progress: bool = True) -> list[Record]:
    """Train, or go on from the checkpoint, and choose what validation images decide.

    The artefact and metrics.jsonl follow each record.

    Raises:
        InputError: the loss is not finite.
    """
    config, folder, model = prepared.config, prepared.folder, prepared.model
    write_atomically(folder.config, to_yaml(config).encode())
    begin = time.perf_counter()
    images, cache = prepared.images(prepared.split.train), config.engine.feature_cache
    source = MapSource(model.maps, images, cache)
    device = model.maps.method.backbone.device
    targets = prepared.kind.targets(prepared.split.train, prepared.canvas, device)
    records = fit(
        model, source, targets, config.train, config.data.flips,
        checkpoint=folder.checkpoint,
        on_record=lambda found: _keep(prepared, found),
        progress=progress,
    )  # fmt: skip
    val = prepared.split.val
    prepared.kind.decide(model, prepared.kind.outputs(model, prepared.images(val), val), val)
    log(f"trained in {time.perf_counter() - begin:.0f} s; testing on {len(prepared.split.test)}")
    return records


def test(prepared: Prepared, log: Log = print) -> tuple[dict[str, Any], Any]:
    """Metrics of the test images, and the model's outputs on them."""
    images, begin = prepared.split.test, time.perf_counter()
    found = prepared.kind.outputs(prepared.model, prepared.images(images), images)
    seconds = time.perf_counter() - begin
    metrics = prepared.kind.metrics(prepared.model, found, images)
    return {**metrics, "seconds_per_image": seconds / len(images)}, found


def write(
    prepared: Prepared, records: list[Record], metrics: dict[str, Any], found: Any
) -> dict[str, Any]:
    """Write the artefact and the files of a finished run; returns the contents of result.json."""
    config, folder, model, split = prepared.config, prepared.folder, prepared.model, prepared.split
    _keep(prepared, records, figures=metrics)
    result = {
        **metrics,
        **prepared.diagnosis,
        **({"notice": NOTICE} if prepared.medical else {}),
        "tunable_parameters": sum(p.numel() for p in model.tunable_parameters().values()),
        "stored_parameters": sum(t.numel() for t in model.artifact_tensors().values()),
        "artefact_bytes": folder.prompt.stat().st_size,
        "trained": True,
        "train_seconds": sum(record["seconds"] for record in records),
        "kind": config.kind,
        "method": config.method.name,
        "backbone": config.backbone.name,
        "fingerprint": model.maps.method.backbone.fingerprint()[:16],
        "data": config.data.root.name,
        "layout": prepared.layout,
        "shots": config.data.shots,
        "shots_per": "image",
        "num_train": len(split.train),
        "seed": config.data.seed,
        "config_hash": config.hash,
        "split_hash": split.hash,
        "version": package_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
    for name, content in prepared.kind.files(model, found, split.test).items():
        write_atomically(folder.path / name, content)
    write_atomically(folder.result, json.dumps(result, indent=2).encode())
    folder.checkpoint.unlink(missing_ok=True)
    return result


def _keep(prepared: Prepared, records: list[Record], **details: Any) -> None:
    config = prepared.config
    artefact.save(
        prepared.model,
        prepared.folder.prompt,
        config.method.name,
        config.method.options,
        data=config.data.model_dump(mode="json", exclude={"root", "patients"}),
        medical=prepared.medical,
        split_hash=prepared.split.hash,
        config_hash=config.hash,
        **details,
    )
    write_atomically(prepared.folder.metrics, json_lines(records))
