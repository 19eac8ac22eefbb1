"""Typed run configuration: YAML files, then `key=value` overrides; unknown keys are errors."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from omegaconf import OmegaConf
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    model_validator,
)

from vpt import resources
from vpt.digests import content
from vpt.errors import InputError
from vpt.settings import apply_overrides, changes_of, merge, read_yaml, to_text, validate

Run = TypeVar("Run", bound="RunConfig")
Text = Annotated[str, BeforeValidator(lambda value: str(value) if type(value) is int else value)]
File = Annotated[Path, BeforeValidator(lambda value: str(value) if type(value) is int else value)]
Task = Annotated[Text, Field(pattern=r"^\w[\w .-]*$")]  # names a file
Sampling = Literal["balanced", "natural"]
Augment = Literal["none", "crop", "crop_flip"]
Parts = Literal["train-test", "train-val", "trainval-test"]
Values = Annotated[list[Any], Field(min_length=1)]
Recipe = Literal["default", "paper"]
Half = Literal["base", "new"]
FileStem = Annotated[str, Field(pattern=r"^[\w-]+$")]
Window = Literal["lung", "mediastinum", "abdomen", "liver", "bone", "brain", "stroke"]
Patterns = Annotated[
    list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
]
Windows = Annotated[tuple[Window, ...], Field(min_length=3, max_length=3)]
AUTO = "auto"  # in the place of a method's name
Seed = Annotated[int, Field(ge=0, lt=2**31)]  # NumPy takes no others


class Strict(BaseModel):
    """A section of a configuration: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class BackboneConfig(Strict):
    """The frozen model: a name under configs/backbone, of timm or of open_clip."""

    name: str
    checkpoint: str | None = None  # a local file, or a hub tag; None: the name's own default


class BackbonePreset(BackboneConfig):
    """A file under configs/backbone: what the card of its weights says."""

    options: dict[str, Any] = {}  # of timm.create_model, where they differ from the architecture's
    preprocess: dict[str, Any] = {}  # of timm's pretrained_cfg, likewise
    terms: str | None = None  # licence and address of weights that you have to ask for


class DataConfig(Strict):
    """The labelled images, and how many of each class train."""

    name: str | None = None  # a card under datasets/; None: recognised from `root`
    root: File | None = None
    shots: PositiveInt | None = 16  # images a class; None: all
    shots_per: Literal["image", "patient"] = "image"  # patient: so many, with all their images
    # held out of the training part: a number or proportion of patients, or of images where no
    # patients are known
    calibration: PositiveInt | Annotated[float, Field(gt=0, lt=1)] | None = None
    # balanced: so many of each class; natural: as many in sum, of whatever class
    sampling: Sampling = "balanced"
    seed: Seed = 1
    split: Parts = "train-test"  # what trains, and what tests
    # class names in label order; where they are the data's own in another order, labels follow
    classes: list[Text] | None = None
    # base: the first half of the classes in label order, rounded up; new: the others; None: all
    class_half: Half | None = None
    templates: list[str] | None = None  # instead of the card's
    augment: Augment | None = None  # None: the card's
    # patterns of paths, folders or names, of files to leave out, and of those to keep although they
    # look like masks or other things that are no data; None: the card's
    exclude: Patterns | None = None
    include: Patterns | None = None
    skip_broken: bool = False  # images that can't be read are left out; False: they are refused
    windows: Windows | None = None  # of CT, as channels; None: the files' own
    workers: NonNegativeInt = 0
    # test images that look like training images: said, refused, or not looked for;
    # None: refused where patients are known, else said
    duplicates: Literal["warn", "stop", "ignore"] | None = None


class MethodConfig(BaseModel):
    """A method's name and its own options, which the method itself checks."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str

    @property
    def options(self) -> dict[str, Any]:
        """All keys but the name."""
        return dict(self.model_extra or {})


class TrainConfig(Strict):
    """Settings of training. `lr` is used as it is: no hidden scaling by the batch size."""

    epochs: PositiveInt = 100
    min_steps: NonNegativeInt = 0  # with few images, more epochs, until they have so many steps
    batch_size: PositiveInt = 32
    optimizer: Literal["sgd", "adamw"] = "adamw"
    lr: float = Field(1e-3, gt=0)
    weight_decay: float = Field(1e-4, ge=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)  # of adamw
    # cosine: linear warm-up from 0, then to 0 (KMnP/vpt). dassl: `warmup_lr` during warm-up, then
    # a cosine whose period is all epochs (Dassl). constant: `lr` throughout.
    schedule: Literal["cosine", "dassl", "constant"] = "cosine"
    warmup_epochs: NonNegativeInt = 10
    warmup_lr: float = Field(1e-5, ge=0)
    # a file under vpt/losses: cross_entropy; class_balanced: classes weighted by their effective
    # number of images (Cui et al. 2019); logit_adjusted: in training, logits plus the classes' log
    # proportions (Menon et al. 2021)
    loss: str = "cross_entropy"
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on a GPU that has it
    # 2 or more: cross-validate on the training images first, and leave the method as it starts
    # where training does not make it better; None: always train
    folds: int | None = Field(None, ge=2)
    # of each augmented image where a method leaves the image tower alone (CoOp): None, the exact
    # choice, computes each epoch's own; so many are computed once, and epochs take turns
    views: PositiveInt | None = None
    seed: Seed = 1


Proportion = Annotated[float, Field(gt=0, lt=1)]


class DecisionConfig(Strict):
    """Settings of the decision: fitted on calibration images, stored, and used by `predict`."""

    temperature: bool = False  # divides logits, so that probabilities are frequencies
    # class → the sensitivity (or specificity) wanted of calling it at a threshold of its own
    sensitivity: dict[Text, Proportion] = Field({})
    specificity: dict[Text, Proportion] = Field({})
    alpha: Proportion | None = None  # of each class, so many at most miss their prediction set
    # proportion of images decided; the least certain others are referred
    coverage: Proportion | None = None


class EngineConfig(Strict):
    """Settings of computing prompts; every choice gives the same numbers.

    Only the masks of a dropout differ where it is compiled.
    """

    # True: prompts as tokens, the reference path
    exact_tokens: bool = False
    compile: bool = False  # the training step, by torch.compile
    checkpointing: bool = False  # blocks run again in the backward pass: slower, less memory
    feature_cache: File | None = None  # folder for image features of later runs; None: memory only


class AutoConfig(Strict):
    """Settings of `vpt train auto`, which compares methods on held-out training images."""

    candidates: list[str] | None = Field(None, min_length=1)  # None: those that fit the backbone
    minutes: float = Field(10, gt=0)  # for the comparison and the training after it


class Expected(Strict):
    """The result that a run configuration should give, measured by its author."""

    accuracy: float = Field(ge=0, le=1)
    within: float = Field(gt=0, le=1)
    measured_on: str


class Published(Strict):
    """A paper's result, to stand beside ours."""

    method: str
    backbone: str
    accuracy: float = Field(ge=0, le=1)
    source: str  # paper and table
    shots: PositiveInt | None = None  # None: all training images


class RunConfig(Strict):
    """One run: config → data → backbone → method → training → artefact and metrics."""

    backbone: BackboneConfig
    # where the method's own settings are from: configs/method, or configs/paper as it was published
    recipe: Recipe = "default"
    data: DataConfig = DataConfig()
    # task → its own keys of `data`, over those above: prompts of several data sets learned at once
    tasks: dict[Task, DataConfig] = Field({})
    method: MethodConfig
    train: TrainConfig = TrainConfig()
    decision: DecisionConfig = DecisionConfig()
    engine: EngineConfig = EngineConfig()
    # name: keys of `data` where the artefact is tested too, without training: put over the run's
    # own, or with a `name` or `root` another data set. {new: {class_half: new}}
    tests: dict[FileStem, dict[str, Any]] = {}
    auto: AutoConfig | None = None  # of the method `auto` alone: the one to train is to be chosen
    # an artefact that prompts and contexts start from, or auto:DIR, the one of a folder that fits
    # the training images best; None: as the method draws them
    init_from: Text | None = None
    out: File | None = None  # run folder; None: runs/METHOD-DATA-SHOTSshot-seedSEED
    expected: Expected | None = None

    @model_validator(mode="before")
    @classmethod
    def _complete_tasks(cls, values: Any) -> Any:
        tasks = values.get("tasks")
        if isinstance(tasks, dict) and all(isinstance(own, dict) for own in tasks.values()):
            shared = values.get("data") or {}
            return {**values, "tasks": {name: merge(shared, own) for name, own in tasks.items()}}
        return values

    @property
    def hash(self) -> str:
        """Names the run: changes with every setting that can change its result."""
        workers = {"workers", "duplicates"}
        without = {"data": workers, "tasks": {"__all__": workers}, "engine": {"feature_cache"}}
        exclude: dict[str, Any] = dict.fromkeys(("out", "expected", "tests", "published"), True)
        exclude |= without
        settings = self.model_dump(mode="json", exclude=exclude)
        changed = self.model_dump(mode="json", exclude=exclude, exclude_defaults=True)
        counted: dict[str, Any] = {}
        for name, value in settings.items():
            if name in _FIRST_KEYS:
                counts = _FIRST_KEYS[name] | changed.get(name, {}).keys()
                counted[name] = {key: value[key] for key in value if key in counts}
            elif name in {"recipe", "method"}:
                counted[name] = value
            elif name == "init_from" and value:  # by content, wherever the files lie
                counted[name] = content(value)
            elif name in changed:
                counted[name] = changed[name]
        return hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()[:16]


# The keys of version 0.1 by section, which always count in the hash, as the method's do. Another,
# which came later, counts only where it is not its default, so that earlier runs keep their hash.
_FIRST_KEYS: dict[str, set[str]] = {
    "backbone": {"name", "checkpoint"},
    "data": {
        *("name", "root", "shots", "shots_per", "calibration", "sampling", "seed", "split"),
        *("classes", "templates", "augment", "windows"),
    },
    "train": {
        *("epochs", "min_steps", "batch_size", "optimizer", "lr", "weight_decay", "momentum"),
        *("schedule", "warmup_epochs", "warmup_lr", "loss", "precision", "folds", "views", "seed"),
    },
    "decision": {"temperature", "sensitivity", "specificity", "alpha", "coverage"},
    "engine": {"exact_tokens", "compile", "checkpointing"},
}


class SuiteConfig(Strict):
    """Data sets × methods × shots × seeds on one backbone.

    A method with a `grid` is first run with every combination of its values on the first seed, with
    `data.split=train-val`; the best by validation accuracy is tested with all seeds.
    """

    backbone: BackboneConfig
    data: list[str] = Field(min_length=1)  # cards under datasets/
    root: File | None = None  # holds the data sets
    path: str = "{}"  # a data set's place below root; {} is its card's name
    methods: list[str] = Field(min_length=1)
    shots: list[PositiveInt | None] = Field([16], min_length=1)
    seeds: list[Seed] = Field([1, 2, 3], min_length=1)
    split: Literal["train-test", "trainval-test"] = "train-test"
    class_half: Half | None = None  # as in `data`, of all runs
    tests: dict[FileStem, dict[str, Any]] = {}  # as of a run; a data set named lies below root
    engine: EngineConfig = EngineConfig()
    settings: dict[str, dict[str, Any]] = {}  # METHOD[/DATA]: keys of its runs
    grid: dict[str, dict[str, dict[str, Values]]] = {}  # METHOD: section: key: values
    published: dict[str, list[Published]] = {}  # group of data sets: its means


def load_run(
    config: str,
    overrides: Sequence[str] = (),
    kind: type[Run] = RunConfig,  # type: ignore[assignment]
    folder: str = "configs/run",
) -> Run:
    """The run configuration `config`, a path or a name under `folder`, with `key=value`s.

    The method's own recipe comes first, from configs/method or, with `recipe=paper`, configs/paper;
    then the file, then the overrides. An override of `method.name` drops what the file says for the
    method that it replaces.

    Raises:
        InputError: no such file, not YAML, an unknown key or a value out of its range.
    """
    path = _find(folder, config)
    file = read_yaml(path)
    if "kind" in file:
        raise InputError(f"{path}: kind={file.kind} is no run of a classifier: see vpt.dense")
    changes = changes_of(kind, overrides)
    chosen, named = _method_name(changes), _method_name(file)
    if chosen is not None and chosen != named:
        for section in ("recipe", "method", "train", "auto", "expected"):
            file.pop(section, None)
    method = named if chosen is None else chosen
    if not method or not isinstance(method, str):
        raise InputError(f"{path}: method.name is missing: give method.name=NAME")
    return compose(method, file, changes, where=config, kind=kind)


def compose(
    method: str,
    *settings: Any,
    where: str,
    kind: type[Run] = RunConfig,  # type: ignore[assignment]
) -> Run:
    """The recipe of `method` with each of `settings` put over it.

    Raises:
        InputError: no such method or recipe, an unknown key or a value out of its range.
    """
    chosen = merge({}, *settings)
    if method != AUTO and chosen.get("auto") is not None:
        raise InputError(f"{where}: auto.… is of `vpt train auto`, not of {method}: drop it")
    if method == AUTO:
        recipe = read_yaml(resources.find("configs/run", AUTO))
    else:
        recipe = _recipe(method, chosen.get("recipe"))
    return validate(kind, merge(recipe, chosen), where)


def recipe(method: str, recipe: Recipe = "default") -> tuple[dict[str, Any], TrainConfig]:
    """The settings that `vpt train METHOD` has, for `vpt.attach` and `vpt.fit`.

    But for the batch size and the augmentation, which are your loader's.

    Returns:
        Options of the method, and how it is trained.

    Raises:
        InputError: no such method, or no such recipe of it.
    """
    if recipe not in get_args(Recipe):
        raise InputError(f"recipe={recipe!r}: give {' or '.join(get_args(Recipe))}")
    file: Any = OmegaConf.to_container(_recipe(method, recipe))
    options = MethodConfig(**file["method"]).options
    return options, validate(TrainConfig, file.get("train", {}), where=method)


def _recipe(method: str, recipe: Any) -> Any:
    folder = "configs/paper" if recipe == "paper" else "configs/method"
    return read_yaml(resources.find(folder, method))


def load_suite(suite: str, overrides: Sequence[str] = ()) -> SuiteConfig:
    """The suite `suite`, a path or a name under configs/suite, with `key=value`s.

    Raises:
        InputError: as `load_run`.
    """
    file = read_yaml(_find("configs/suite", suite))
    return validate(SuiteConfig, apply_overrides(SuiteConfig, file, overrides), where=suite)


def to_yaml(config: Strict) -> str:
    """The resolved configuration; as a file, `vpt train PATH` or `vpt bench PATH` repeats it."""
    return to_text(config.model_dump(mode="json"))


def find_config(config: str) -> Path:
    """The file of a run's configuration: a path, or a name under configs/run."""
    return _find("configs/run", config)


def kind_of(config: str) -> str | None:
    """The `kind` that a run's configuration names: detect, segment; None: it trains a classifier.

    Raises:
        InputError: no such file, or not YAML.
    """
    return read_yaml(find_config(config)).get("kind")


def _find(folder: str, config: str) -> Path:
    path = Path(config)
    return path if path.suffix in {".yaml", ".yml"} else resources.find(folder, config)


def _method_name(settings: Mapping[str, Any]) -> Any:
    section = settings.get("method")
    return section.get("name") if isinstance(section, Mapping) else None
