"""The bank: one frozen backbone and the prompts of many tasks, chosen for each image."""

from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from vpt import artifact, backbones, targets
from vpt.backbones.base import Backbone, Prompts
from vpt.data.transforms import Preprocess
from vpt.errors import InputError, nearest
from vpt.evaluation.decision import Decision
from vpt.methods import Method
from vpt.serve._loaded import Loaded, read_out
from vpt.targets import Target


@dataclass(frozen=True)
class Task:
    """A department's prompt, as its artefact's header describes it."""

    name: str
    class_names: list[str]
    metadata: dict[str, Any]
    target: Target
    decision: Decision


class PromptBank:
    """Many tasks' artefacts on one backbone: `bank(images, tasks)` answers all in one pass.

    Safe to use from several threads. A task is loaded when it is first asked for. With `max_bytes`
    those not asked for longest are forgotten, but for pinned ones, until what all tasks hold beside
    the backbone is within it; they are loaded again when asked for.

    Attributes:
        backbone: frozen, in memory once.
    """

    def __init__(self, backbone: nn.Module, max_bytes: int | None = None) -> None:
        """A bank without tasks.

        Args:
            backbone: a timm vision transformer, an open_clip CLIP, or `vpt.backbones.load(...)`.
            max_bytes: of all tasks; None: no bound.
        """
        self.backbone: Backbone = backbones.adapt(backbone)
        self.max_bytes = max_bytes
        with torch.no_grad():
            self._pooled = self.backbone.pooled(self._blank())
        self._entries: dict[str, _Entry] = {}
        self._recent: OrderedDict[_Entry, int] = OrderedDict()  # bytes; the last asked for last
        self._lock = Lock()
        self._stacked: tuple[list[Loaded | None], Prompts | None] = [], None  # of the last batch

    @property
    def preprocess(self) -> Preprocess:
        """How an image becomes the backbone's input; a task has its own `grey_range`."""
        return self.backbone.preprocess

    def add(self, name: str, artefact: str | Path, pinned: bool = False) -> None:
        """Add a task: the artefact's header is read and checked, its tensors when first asked for.

        A pinned one is loaded now, and kept.

        Raises:
            InputError: a name that is taken; as `artifact.read_metadata`; an artefact of another
                backbone or preprocessing.
        """
        entry = self._open(name, artefact, pinned)
        with self._lock:
            if name in self._entries:
                raise InputError(
                    f"task {name}: already in the bank: replace it, or remove it first"
                )
            self._entries[name] = entry
        self._touch([entry])

    def replace(self, name: str, artefact: str | Path) -> None:
        """Exchange a task's artefact; calls under way keep the old one.

        Raises:
            InputError: as `add`; no such task.
        """
        old = self._find(name)
        entry = self._open(name, artefact, old.pinned)
        if old.loaded:
            entry.load(self.backbone, self._pooled)
        with self._lock:
            self._forget(self._entries.get(name, old))
            self._entries[name] = entry
        self._touch([entry])

    def remove(self, name: str) -> None:
        """Remove a task; calls under way keep it.

        Raises:
            InputError: no such task.
        """
        entry = self._find(name)
        with self._lock:
            self._forget(self._entries.pop(name, entry))

    def load(self, name: str) -> None:
        """Load a task now, so that the first call need not wait.

        Raises:
            InputError: no such task; as `artifact.load`; an artefact that was changed since `add`.
        """
        entry = self._find(name)
        entry.load(self.backbone, self._pooled)
        self._touch([entry])

    def task(self, name: str) -> Task:
        """Description of a task.

        Raises:
            InputError: no such task; says the nearest name.
        """
        return self._find(name).task

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._entries))

    @property
    def num_bytes(self) -> int:
        """Bytes that the loaded tasks hold beside the backbone."""
        with self._lock:
            return sum(self._recent.values())

    @torch.no_grad()
    def __call__(
        self, images: Tensor, tasks: Sequence[str | Sequence[str]]
    ) -> list[Tensor | list[Tensor]]:
        """Logits (C,) of each image by its task; of an image with several tasks a list of them.

        All run in one pass, in which an image's blocks before the first prompts run once; a method
        that changes weights or pixels, or picks prompts by the image, has a pass of its own.

        Args:
            images: (B, 3, H, W), normalised as `preprocess` says.
            tasks: for each image a task's name, or several.

        Raises:
            InputError: no such task; as `load`; another number of images than of `tasks`.
        """
        if len(images) != len(tasks):
            raise InputError(
                f"{len(images)} images, but {len(tasks)} tasks: give each image its own"
            )
        asked = [[names] if isinstance(names, str) else list(names) for names in tasks]
        entries = {name: self._find(name) for names in asked for name in names}
        loaded = {name: entry.load(self.backbone, self._pooled) for name, entry in entries.items()}
        self._touch(entries.values())
        pairs = [(image, loaded[name]) for image, names in enumerate(asked) for name in names]
        logits: dict[tuple[int, Loaded], Tensor] = {}
        together = [pair for pair in dict.fromkeys(pairs) if pair[1].shares_pass]
        if together:
            logits |= self._one_pass(images, together)
        for task in dict.fromkeys(task for _, task in pairs if not task.shares_pass):
            own = [image for image, other in dict.fromkeys(pairs) if other is task]
            rows = task.model(images[own])
            logits |= {(image, task): row for image, row in zip(own, rows, strict=True)}
        found = [[logits[image, loaded[n]] for n in names] for image, names in enumerate(asked)]
        return [f[0] if isinstance(t, str) else f for f, t in zip(found, tasks, strict=True)]

    def _one_pass(
        self, images: Tensor, pairs: Sequence[tuple[int, Loaded]]
    ) -> dict[tuple[int, Loaded], Tensor]:
        """Logits of images and tasks that share a pass; an image without prompts runs once."""
        prompted = [(image, task if task.prompts else None) for image, task in pairs]
        samples = {sample: row for row, sample in enumerate(dict.fromkeys(prompted))}
        order = [image for image, _ in samples]
        index = torch.tensor(order, device=images.device)
        index = None if order == [*range(len(images))] else index
        pooled = self.backbone.pooled(images, self._prompts([task for _, task in samples]), index)
        features = self.backbone.project(pooled)
        rows = dict(zip(pairs, (samples[sample] for sample in prompted), strict=True))
        own: dict[Loaded, list[int]] = {}
        for image, task in pairs:
            own.setdefault(task, []).append(image)
        groups: dict[tuple, list[Loaded]] = {}
        for task, its_images in own.items():
            groups.setdefault((task.form, len(its_images)), []).append(task)
        found = {}
        for alike in groups.values():
            members = [[(image, task) for image in own[task]] for task in alike]
            chosen = torch.tensor([[rows[pair] for pair in each] for each in members])
            inputs = pooled if alike[0].reads_pooled else features
            logits = read_out(alike, inputs[chosen.to(inputs.device)])
            for each, of_task in zip(members, logits, strict=True):
                found |= dict(zip(each, of_task, strict=True))
        return found

    def _prompts(self, tasks: Sequence[Loaded | None]) -> Prompts | None:
        """Prompts of a batch of samples of these tasks; None: without."""
        distinct = sorted(set(tasks), key=id)
        if len(distinct) == 1:
            return distinct[0] and distinct[0].prompts
        known, stacked = self._stacked
        if known != distinct:
            stacked = Prompts.stack([task and task.prompts for task in distinct])
            self._stacked = distinct, stacked
        number = {task: place for place, task in enumerate(distinct)}
        return stacked.take([number[task] for task in tasks])

    def _blank(self) -> Tensor:
        size, channels = self.preprocess.image_size, self.preprocess.channels
        weight = next(self.backbone.parameters())
        return weight.new_zeros(1, channels, size, size)

    def _find(self, name: str) -> "_Entry":
        try:
            return self._entries[name]
        except KeyError:
            hint = nearest(name, self) if self._entries else ": the bank is empty"
            raise InputError(f"no task {name!r}{hint}") from None

    def _open(self, name: str, artefact: str | Path, pinned: bool) -> "_Entry":
        metadata = artifact.read_metadata(artefact)
        method, target = artifact.find_kinds(artefact, metadata)
        artifact.check_weights(artefact, metadata, self.backbone)
        theirs = metadata["preprocess"] | {"grey_range": None}
        if Preprocess.from_dict(theirs) != self.preprocess.model_copy(update={"grey_range": None}):
            raise InputError(
                f"{artefact}: trained with another preprocessing than the bank's backbone has: "
                "give it a bank of its own"
            )
        artifact.check_answer(artefact, metadata, self.backbone)
        names, decision = metadata["class_names"], Decision(**metadata.get("decision", {}))
        task = Task(name, names, metadata, targets.find(target), decision)
        entry = _Entry(Path(artefact), method, task, pinned)
        if pinned:
            entry.load(self.backbone, self._pooled)
        return entry

    def _touch(self, entries: Collection["_Entry"]) -> None:
        """Note that loaded tasks were asked for, and forget others for which there is no room."""
        with self._lock:
            for entry in entries:
                if entry.loaded and self._entries.get(entry.task.name) is entry:
                    self._recent[entry] = entry.loaded.num_bytes
                    self._recent.move_to_end(entry)
            if self.max_bytes is None:
                return
            total = sum(self._recent.values())
            for entry, size in list(self._recent.items()):
                if total > self.max_bytes and not entry.pinned:
                    self._forget(entry)
                    total -= size

    def _forget(self, entry: "_Entry") -> None:
        self._recent.pop(entry, None)
        entry.loaded = None
        self._stacked = [], None


@dataclass(eq=False)
class _Entry:
    """One version of a task; `loaded` is None until it is asked for."""

    path: Path
    method: str
    task: Task
    pinned: bool
    loaded: Loaded | None = None
    lock: Lock = field(default_factory=Lock)

    def load(self, backbone: Backbone, pooled: Tensor) -> Loaded:
        """The task at work, loaded by the first who asks."""
        with self.lock:
            loaded = self.loaded = self.loaded or Loaded(self._read(backbone), backbone, pooled)
        return loaded

    def _read(self, backbone: Backbone) -> Method:
        """The method; on a view of its own of a backbone whose weights it changes."""
        tensors, metadata = artifact.read(self.path)
        if metadata != self.task.metadata:
            raise InputError(
                f"{self.path}: changed since task {self.task.name} was added: replace it"
            )
        if any(name.startswith("backbone.") for name in tensors):
            backbone = backbones.adapt(backbone)
        return artifact.build(self.path, tensors, metadata, backbone, self.method, self.task.target)
