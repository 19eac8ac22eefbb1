"""Progress for the terminal: lines, and one rich bar over a whole training."""

from collections.abc import Callable, Sequence
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

Log = Callable[[str], None]  # takes lines for the user


class TrainingBar:
    """One bar over the stages of a training, with the time left; silent with `show=False`.

    Batches move it. Their number is an estimate, so the end of each epoch and stage sets it right.
    """

    def __init__(self, stages: Sequence[tuple[str, int]], show: bool) -> None:
        """`stages`: what each is called, and about how many batches it reads."""
        self._stages, self._size, self.done = list(stages), 0, 0
        self._start = 0
        self.total = sum(size for _, size in stages)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[metrics]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not show,
        )
        self._task = self._bar.add_task("training", total=self.total, metrics="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, failed: object, *error: object) -> None:
        if failed is None:
            self._move(self.total)
        self._bar.stop()

    def next_stage(self) -> None:
        """The stage before is over, however many batches it had."""
        self._start += self._size
        name, self._size = self._stages.pop(0)
        self._move(self._start, description=name, metrics="")

    def tick(self) -> None:
        """A batch was read."""
        self._move(min(self.done + 1, self._start + self._size))

    def update(self, history: Sequence[dict[str, Any]], epochs: int) -> None:
        """Show how many of the stage's epochs are done, and the last one's loss and accuracy."""
        metrics = ""
        if history:
            metrics = f"loss {history[-1]['loss']:.3f}  accuracy {history[-1]['accuracy']:.1%}"
        self._move(self._start + self._size * len(history) // epochs, metrics=metrics)

    def _move(self, done: int, **shown: str) -> None:
        self.done = done
        self._bar.update(self._task, completed=done, **shown)
