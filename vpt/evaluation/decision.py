"""From logits to decisions: calibrated, at wanted error rates, and referred where unsure.

All is fitted on calibration images, which are neither trained on nor tested on, and comes to a few
numbers that an artefact carries.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from scipy.optimize import minimize_scalar
from sklearn.metrics import roc_curve
from torch import Tensor

from vpt.config import DecisionConfig, Strict
from vpt.errors import InputError, nearest
from vpt.evaluation.bootstrap import class_rates, intervals, metric_intervals, proportion_interval
from vpt.progress import Log
from vpt.targets import Target

LEAST_CALIBRATION = 19  # images a class; with fewer, a 95 % prediction set holds every class
NEVER = 2.0  # a threshold above every probability


class Decision(Strict):
    """Temperature, thresholds and sets as fitted; probabilities are of logits / temperature."""

    multilabel: bool = False  # for versions that know no other target
    temperature: float = 1.0
    thresholds: dict[str, float] = Field({})  # class → the least probability at which it is called
    quantiles: dict[str, float] = Field({})  # class → 1 - the least probability in a prediction set
    refer_below: float | None = None  # images whose largest probability is less are referred

    def probabilities(self, target: Target, logits: Tensor) -> Tensor:
        """Calibrated probabilities (N, C), float64, of logits (N, C)."""
        return target.probabilities(logits.double() / self.temperature)

    def describe(
        self, target: Target, logits: Tensor, class_names: Sequence[str]
    ) -> dict[str, Any]:
        """The decision on the logits (C,) of one image: see `Target.describe`.

        Where they were fitted, with `set`: the prediction set, and `refer`.
        """
        row = self.probabilities(target, logits[None])
        probabilities = dict(zip(class_names, row[0].tolist(), strict=True))
        described = target.describe(probabilities, self.thresholds)
        if self.quantiles:
            members = self.sets(row, class_names)[0].nonzero().flatten()
            described["set"] = [class_names[index] for index in members]
        if self.refer_below is not None:
            described["refer"] = row.max().item() < self.refer_below
        return described

    def sets(self, probabilities: Tensor, class_names: Sequence[str]) -> Tensor:
        """Prediction sets as bool (N, C)."""
        most = [self.quantiles[name] for name in class_names]
        return 1 - probabilities <= torch.tensor(most, dtype=torch.float64)


def check_decision(
    config: DecisionConfig, target: Target, labels: Tensor, class_names: Sequence[str]
) -> None:
    """Refuses what the `labels` of the calibration images can't give.

    Raises:
        InputError: a class that is not there, is named twice, or is that of all or no images;
            sets or referring where an image is not of one class.
    """
    if (config.alpha or config.coverage) and not target.exclusive:
        raise InputError("decision.alpha and decision.coverage need data with one class an image")
    truth = target.truth(labels, len(class_names))
    for rate in ("sensitivity", "specificity"):
        for name in getattr(config, rate):
            where = f"decision.{rate}.{name}"
            if name not in class_names:
                raise InputError(f"{where}: no such class{nearest(name, class_names)}")
            if rate == "specificity" and name in config.sensitivity:
                raise InputError(f"{where}: it has a wanted sensitivity too: drop one")
            positives = int(truth[:, class_names.index(name)].sum())
            if positives in (0, len(labels)):
                raise InputError(
                    f"{where}: {positives} of {len(labels)} calibration images are of this class: "
                    "a threshold needs some of it and some of others"
                )


def fit_decision(
    config: DecisionConfig,
    target: Target,
    logits: Tensor,
    labels: Tensor,
    class_names: Sequence[str],
    log: Log = print,
) -> Decision:
    """The decision that `config` asks for, from logits (N, C) and labels of calibration images.

    Temperature: that of least log-loss (Guo et al. 2017). Thresholds: the highest with at least
    the wanted sensitivity, or the lowest with at least the wanted specificity, ties counted. Sets:
    class-conditional split conformal prediction with the score 1 - probability (Vovk 2012). Refer:
    the highest bound that leaves at least the wanted coverage.

    `check_decision` says whether it can be had.
    """
    temperature = _temperature(target, logits, labels, log) if config.temperature else 1.0
    decision = Decision(multilabel=target.name == "multilabel", temperature=temperature)
    probabilities = decision.probabilities(target, logits)
    truth = target.truth(labels, len(class_names))
    fitted: dict[str, Any] = {"thresholds": _thresholds(config, probabilities, truth, class_names)}
    if config.alpha:
        fitted["quantiles"] = _quantiles(probabilities, labels, config.alpha, class_names, log)
    if config.coverage:
        confidence = probabilities.amax(1).sort(descending=True).values
        fitted["refer_below"] = confidence[math.ceil(config.coverage * len(labels)) - 1].item()
    return decision.model_copy(update=fitted)


def achieved(
    decision: Decision,
    target: Target,
    logits: Tensor,
    labels: Tensor,
    class_names: Sequence[str],
    patients: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Metrics of `decision` on test logits (N, C) and their labels.

    ECE before and after calibration; of each threshold its sensitivity and specificity; of the
    prediction sets their mean size and each class's coverage; of referring, the proportion of
    images decided and the accuracy on them. Proportions come with 95 % intervals, resampling
    `patients`.
    """
    probabilities = decision.probabilities(target, logits)
    truth = target.truth(labels, len(class_names))
    found: dict[str, Any] = {
        "temperature": decision.temperature,
        "ece_before": target.calibration_error(logits, labels),
        "ece_after": target.calibration_error(logits.double() / decision.temperature, labels),
    }
    if decision.thresholds:
        columns = [class_names.index(name) for name in decision.thresholds]
        least = torch.tensor(list(decision.thresholds.values()), dtype=torch.float64)
        rates = class_rates(truth[:, columns], probabilities[:, columns] >= least, patients)
        found["thresholds"] = {
            name: {"threshold": threshold, **rate}
            for (name, threshold), rate in zip(decision.thresholds.items(), rates, strict=True)
        }
    if decision.quantiles:
        sets = decision.sets(probabilities, class_names)
        rates = class_rates(truth, sets, patients)
        found["set_size"] = sets.sum(1).double().mean().item()
        found["set_coverage"] = {
            name: {"coverage": rate["sensitivity"], "interval": rate["sensitivity_interval"]}
            for name, rate in zip(class_names, rates, strict=True)
        }
    if decision.refer_below is not None:
        decided = probabilities.amax(1) >= decision.refer_below
        right = decided & (probabilities.argmax(1) == labels)

        def statistic(weights: Tensor) -> Tensor:
            kept = weights @ decided.to(weights)
            return torch.stack([kept / weights.sum(1), weights @ right.to(weights) / kept], 1)

        coverage, accuracy = statistic(torch.ones(1, len(labels), dtype=torch.float64))[0].tolist()
        bounds = intervals(statistic, len(labels), patients)
        everything = torch.ones_like(decided)
        found["refer"] = {
            "coverage": coverage,
            "coverage_interval": proportion_interval(coverage, bounds[0], everything, patients),
            "accuracy": accuracy if coverage else None,
            "accuracy_interval": proportion_interval(accuracy, bounds[1], decided, patients),
        }
    return found


def resampled_metrics(
    target: Target,
    logits: Tensor,
    labels: Tensor,
    class_names: Sequence[str],
    patients: Sequence[str] | None,
    decision: Decision | None,
) -> dict[str, Any]:
    """95 % intervals of the metrics, and, where there is one, what the decision achieves."""
    found = metric_intervals(target, logits, labels, class_names, patients)
    if decision is not None:
        found["decision"] = achieved(decision, target, logits, labels, class_names, patients)
    return found


def best_temperature(target: Target, logits: Tensor, labels: Tensor) -> float:
    """The divisor of logits (N, C) that gives the lowest log loss (Guo et al. 2017).

    Between e^-10, where all are right, and e^10, where all are guessed.
    """

    def log_loss(log_temperature: float) -> float:
        return target.loss(logits.double() / math.exp(log_temperature), labels).item()

    return math.exp(minimize_scalar(log_loss, bounds=(-10, 10), method="bounded").x)


def _temperature(target: Target, logits: Tensor, labels: Tensor, log: Log) -> float:
    if target.num_correct(logits, labels) == len(labels):
        # the log loss falls for ever as the temperature nears 0
        log(f"all {len(labels)} calibration images are right: the temperature stays at 1")
        return 1.0
    temperature = best_temperature(target, logits, labels)
    if temperature > math.exp(9):  # only the bound keeps it finite
        log(
            "warning: on the calibration images the model is no better than guessing: the "
            "temperature makes all probabilities alike"
        )
    return temperature


def _thresholds(
    config: DecisionConfig, probabilities: Tensor, truth: Tensor, class_names: Sequence[str]
) -> dict[str, float]:
    found = {}
    for rate in ("sensitivity", "specificity"):
        for name, wanted in getattr(config, rate).items():
            column = class_names.index(name)
            # falling thresholds, at each of which ties are called together
            false, hit, thresholds = roc_curve(
                truth[:, column], probabilities[:, column], drop_intermediate=False
            )
            good = hit >= wanted if rate == "sensitivity" else 1 - false >= wanted
            chosen = thresholds[good][0 if rate == "sensitivity" else -1]
            found[name] = min(float(chosen), NEVER)
    return found


def _quantiles(
    probabilities: Tensor, labels: Tensor, alpha: float, class_names: Sequence[str], log: Log
) -> dict[str, float]:
    least = max(LEAST_CALIBRATION, math.ceil(1 / alpha) - 1)
    found = {}
    for index, name in enumerate(class_names):
        scores = (1 - probabilities[labels == index, index]).sort().values
        count = len(scores)
        if count < least:
            log(
                f"warning: {name}: {count} calibration images, fewer than {least}: its prediction "
                "sets may hold too much or too little"
            )
        rank = count + 1 - math.floor(alpha * (count + 1))  # ⌈(1 - alpha)(count + 1)⌉
        found[name] = scores[rank - 1].item() if rank <= count else 1.0  # 1: in every set
    return found
