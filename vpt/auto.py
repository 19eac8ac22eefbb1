"""`vpt train auto`: methods compared on held-out training images, cheapest first; one is chosen."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil, inf
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, set_seed
from scipy.stats import ttest_1samp
from torch import Tensor

from vpt import methods
from vpt.accelerator import processes
from vpt.backbones import Backbone
from vpt.config import RunConfig, TrainConfig, compose
from vpt.data.fewshot import Split
from vpt.data.sources import Source
from vpt.errors import InputError
from vpt.evaluation.decision import best_temperature
from vpt.files import write_atomically
from vpt.folder import RunFolder
from vpt.progress import Log, TrainingBar
from vpt.training.features import predict_cached
from vpt.training.fit import fit
from vpt.training.setup import attach, training_loader
from vpt.training.training_set import TrainingSet

WITH_TEXT = [  # cheapest first
    *("ss_text", "ss_text_plus", "zero_shot", "linear_probe", "tip_adapter_f"),
    *("clap", "prolip", "coop", "vpt_deep"),
]
WITHOUT_TEXT = ["linear_probe", "vpt_deep"]
PRIOR = ["ss_text", "linear_probe"]  # where no image can be held out
SAFE = ["linear_probe", "ss_text"]  # left only for one that is better beyond chance
PROMPTS = {"coop": 200, "vpt_deep": 40}  # training images from which they are tried
BETTER = 0.05  # level of the one-sided test that one is better than SAFE
SPLITS = 5
ENOUGH = 1000  # held-out images that suffice; splits after that many are left out
HOPELESS = 0.01  # level of the one-sided test that a candidate is worse than the best
WARM_UP = 0.05  # of a candidate's time, before its pace is judged

Part = tuple[np.ndarray, np.ndarray, np.ndarray]  # to learn from, to hold out, columns left out


@dataclass(eq=False)
class Candidate:
    """A run that may be chosen, and what held-out images say of it.

    Attributes:
        setting: its configuration.
        losses: log loss of each held-out image, at the temperature that is best for all of them.
        accuracy: proportion of them that is right.
        seconds: taken to try it.
        dropped: why it cannot be chosen; None: it can.
    """

    setting: RunConfig
    losses: list[float] = field(default_factory=list)
    accuracy: float | None = None
    seconds: float = 0.0
    dropped: str | None = None

    @property
    def name(self) -> str:
        """The method's name."""
        return self.setting.method.name

    @property
    def record(self) -> dict[str, Any]:
        """Its entry in result.json."""
        log_loss = float(np.mean(self.losses)) if self.losses else None
        found = {"log_loss": log_loss, "accuracy": self.accuracy, "seconds": self.seconds}
        return {**found, "dropped": self.dropped} if self.dropped else found

    @property
    def line(self) -> str:
        """Its line for the user."""
        if self.dropped:
            return f"{self.name} is dropped after {self.seconds:.1f} s: {self.dropped}"
        log_loss = self.record["log_loss"]
        return f"{self.name}: log loss {log_loss:.3f}, {self.accuracy:.1%}, {self.seconds:.1f} s"


class _Dropped(Exception):
    """Says why a candidate is not tried any further."""


def settings(
    config: RunConfig, backbone: Backbone | None = None, count: float = inf
) -> list[RunConfig]:
    """The runs to choose from, cheapest first: the given candidates, or those that fit.

    Args:
        config: of an auto run.
        backbone: None: one with a text tower.
        count: number of training images.

    Raises:
        InputError: an unknown candidate, or one that does not fit; an option of the method, which
            is not chosen yet.
    """
    if config.method.options:
        key = next(iter(config.method.options))
        raise InputError(f"method.{key}: auto chooses the method: give its name as method.name")
    names, text = config.auto.candidates, backbone is None or hasattr(backbone, "encode_texts")
    if names is None:
        names = WITH_TEXT if text else WITHOUT_TEXT
        names = [name for name in names if count >= PROMPTS.get(name, 0)]
    for name in names:
        if methods.find(name).reads_text and not text:
            raise InputError(f"auto.candidates: {name} needs a CLIP, such as clip_b32_openai")
    given = {
        "backbone": config.backbone.model_dump(),
        "data": config.data.model_dump(),
        # the comparison says whether training helps: a judge of its own would judge twice
        "train": {**config.train.model_dump(exclude_defaults=True), "folds": None},
        "engine": config.engine.model_dump(),
    }
    return [compose(name, given, where=f"auto.candidates: {name}") for name in names]


@dataclass(frozen=True, eq=False)
class Comparison:
    """Cross-validation of candidates, all on the same splits of the training images.

    Attributes:
        backbone: of all.
        source: the data.
        split: of it; no test image is read.
        folder: of the run; keeps what is found for a run that goes on, and image features.
        show: a bar of each candidate that takes gradient steps.
    """

    backbone: Backbone
    source: Source
    split: Split
    folder: RunFolder
    show: bool

    def choose(
        self, settings: Sequence[RunConfig], minutes: float, log: Log
    ) -> tuple[Candidate, list[Candidate]]:
        """The candidate with the lowest log loss on held-out images, and all of them.

        They are tried in their order. One is dropped as soon as the images held out so far say that
        it is worse than the best before it (paired t-test at the level HOPELESS), or its pace that
        it could not be tried, and trained on all images, within `minutes`; the first is always
        tried. The first of SAFE that the best does not beat at the level BETTER is chosen in its
        place. Where nothing can be held out, the first of PRIOR is.

        Raises:
            InputError: no candidate can be trained.
        """
        known, parts = self._known(), self._parts()
        tried = [Candidate(setting, **known.get(setting.method.name, {})) for setting in settings]
        if not parts:
            chosen = min(tried, key=lambda each: [*PRIOR, each.name].index(each.name))
            log(f"auto: too few images a class to hold any out: {chosen.name} is chosen unseen")
            return chosen, tried
        for candidate in tried:
            if candidate.name not in known:
                best = _best(tried)
                left = 60 * minutes - sum(each.seconds for each in tried)
                if best:  # whose training may follow
                    left -= best.seconds / len(parts)
                self._try(candidate, parts, best, left if best else inf)
                self._keep(tried)
            log(f"auto: {candidate.line}")
        best = _best(tried)
        if best is None:
            raise InputError(f"auto: no candidate can be trained, first {tried[0].line}")
        chosen = self._safe(tried, best, parts) or best
        log(f"auto: {chosen.name} is chosen")
        return chosen, tried

    def _safe(
        self, tried: Sequence[Candidate], best: Candidate, parts: Sequence[Part]
    ) -> Candidate | None:
        """The first of SAFE that `best` does not beat beyond chance; None: it beats them."""
        for name in SAFE:
            for each in tried:
                usable = each.name == name and each.losses and not each.dropped
                if usable and self._chance(np.array(each.losses), best, parts) >= BETTER:
                    return each
        return None

    def _parts(self) -> list[Part]:
        """The splits: fewer than SPLITS where classes have fewer images, or ENOUGH are held out."""
        train, parts, count = self.split.train, [], 0
        for seen, held in train.target.splits(train.labels, train.patients, SPLITS):
            held, unlearned = train.target.comparable(train.labels, seen, held)
            if len(held) and count < ENOUGH:
                parts.append((seen, held, unlearned))
                count += len(held)
        return parts

    def _try(
        self, candidate: Candidate, parts: Sequence[Part], best: Candidate | None, left: float
    ) -> None:
        """Cross-validate `candidate`, for at most `left` seconds."""
        begin = time.monotonic()
        try:
            self._cross_validate(candidate, parts, best, left)
        except (InputError, _Dropped) as reason:
            candidate.dropped = str(reason)
        candidate.seconds = time.monotonic() - begin

    def _cross_validate(
        self, candidate: Candidate, parts: Sequence[Part], best: Candidate | None, left: float
    ) -> None:
        setting, config = candidate.setting, candidate.setting.train
        set_seed(config.seed)
        model = attach(self.backbone, self.source, setting)
        loader = training_loader(model, self.source, self.split, setting)
        images = TrainingSet(loader, model.target, len(model.class_names))
        features = setting.engine.feature_cache or self.folder.features
        # a part is too short to pay for compiling
        engine = setting.engine.model_copy(update={"compile": False, "feature_cache": features})
        start = {name: tensor.clone() for name, tensor in model.artifact_tensors().items()}
        stages = [
            (f"{candidate.name}, {number} of {len(parts)}", num_steps(config, len(seen)))
            for number, (seen, _, _) in enumerate(parts, 1)
        ]
        stages.append(("on all images", num_steps(config, len(images.labels))))
        outputs: list[tuple[Tensor, Tensor]] = []
        with _Pace(stages, self.show and not model.solved, left) as pace:
            for number, (seen, held, unlearned) in enumerate(parts, 1):
                pace.next_stage()
                pace.check()
                fit(model, images.part(seen, True), config=config, engine=engine, progress=pace)
                tested = images.part(held, learn=False)
                logits, labels = predict_cached(model, tested, config.precision, features)
                logits[:, unlearned] = 0
                outputs.append((logits, labels))
                model.make_room(start)
                model.load_state_dict(start, strict=False)
                losses = self._losses(outputs)
                if best and number < len(parts):
                    p = self._chance(losses, best, parts[:number])
                    if p < HOPELESS:
                        raise _Dropped(
                            f"worse than {best.name} on the first {len(losses)} held-out images "
                            f"(p = {p:.1g})"
                        )
        logits, labels = (torch.cat(tensors) for tensors in zip(*outputs, strict=True))
        candidate.losses = losses.tolist()
        candidate.accuracy = model.target.num_correct(logits, labels).item() / len(labels)

    def _losses(self, outputs: Sequence[tuple[Tensor, Tensor]]) -> np.ndarray:
        """Log loss of each image (N,), at the temperature that is best for all."""
        logits, labels = (torch.cat(tensors) for tensors in zip(*outputs, strict=True))
        if not logits.isfinite().all():
            raise _Dropped("its logits are not finite")
        target = self.split.train.target
        scaled = logits.double() / best_temperature(target, logits, labels)
        return target.losses(scaled, labels).numpy()

    def _chance(self, losses: np.ndarray, best: Candidate, parts: Sequence[Part]) -> float:
        """Probability that losses of images held out in `parts` exceed the best's so by chance."""
        worse = losses - best.losses[: len(losses)]
        if self.split.train.patients:  # images of one patient are not independent
            held = np.concatenate([held for _, held, _ in parts])
            names = [self.split.train.patients[position] for position in held]
            _, patient = np.unique(names, return_inverse=True)
            worse = np.bincount(patient, worse) / np.bincount(patient)
        if len(worse) < 2 or not worse.any():
            return 1.0
        return float(ttest_1samp(worse, 0, alternative="greater").pvalue)

    def _known(self) -> dict[str, dict[str, Any]]:
        """Findings of an interrupted run on the same images, by the candidate's name."""
        if not self.folder.candidates.is_file():
            return {}
        kept = json.loads(self.folder.candidates.read_text())
        return kept["candidates"] if kept["split_hash"] == self.split.hash else {}

    def _keep(self, tried: Sequence[Candidate]) -> None:
        found = {
            each.name: {name: value for name, value in vars(each).items() if name != "setting"}
            for each in tried
            if each.losses or each.dropped
        }
        kept = {"split_hash": self.split.hash, "candidates": found}
        if processes().is_main_process:
            write_atomically(self.folder.candidates, json.dumps(kept).encode())


class _Pace(TrainingBar):
    """The bar of a candidate, which drops it if it would take longer than `left` seconds."""

    def __init__(self, stages: Sequence[tuple[str, int]], show: bool, left: float) -> None:
        super().__init__(stages, show)
        self.left, self.begin = left, time.monotonic()
        self.first: tuple[float, int] | None = None  # when a batch was read first, and its number

    def tick(self) -> None:
        """A batch was read."""
        super().tick()
        if self.first is None:  # features, which are computed once, come before
            self.first = time.monotonic(), self.done
        self.check()

    def check(self) -> None:
        """Drop the candidate if its time is up, or will be by its pace."""
        now = time.monotonic()
        needed = now - self.begin
        if self.first and now - self.first[0] > WARM_UP * self.left and self.done > self.first[1]:
            pace = (now - self.first[0]) / (self.done - self.first[1])
            needed += pace * (self.total - self.done)
        (needed,) = broadcast_object_list([needed])  # all processes go on together, or none
        if needed >= self.left:
            raise _Dropped(f"it needs {needed:.0f} s, and {max(self.left, 0):.0f} s are left")


def num_steps(config: TrainConfig, count: int) -> int:
    """Number of steps of a training on `count` images."""
    batches = ceil(count / config.batch_size)
    return batches * max(config.epochs, ceil(config.min_steps / batches))


def _best(tried: Sequence[Candidate]) -> Candidate | None:
    compared = [candidate for candidate in tried if candidate.losses and not candidate.dropped]
    return min(compared, key=lambda candidate: np.mean(candidate.losses), default=None)
