"""Accuracy matrix of a stream → final and mean accuracy, and forgetting."""

from collections.abc import Sequence

Rows = Sequence[Sequence[float]]  # after task l, the accuracies on tasks 0 to l, or more


def final_accuracy(rows: Rows) -> float:
    """Mean over tasks after the last one, each task counting alike."""
    return _mean(rows[-1][: len(rows)])


def mean_accuracy(rows: Rows) -> float:
    """Mean over the stages of the mean over the tasks so far."""
    return _mean([_mean(row[: number + 1]) for number, row in enumerate(rows)])


def forgetting(rows: Rows) -> float:
    """Mean fall from each earlier task's best accuracy before the last stage to that after it.

    The standard definition (Chaudhry et al. 2018), below 0 where tasks gain; 0 for one task.
    """
    last = len(rows) - 1
    falls = [max(row[task] for row in rows[task:last]) - rows[last][task] for task in range(last)]
    return _mean(falls) if falls else 0.0


def summary(rows: Rows) -> dict[str, float]:
    """All three, by name."""
    return {each.__name__: each(rows) for each in (final_accuracy, mean_accuracy, forgetting)}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
