"""Progress for the terminal: lines, and a rich bar over epochs."""

from collections.abc import Callable, Sequence
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Log = Callable[[str], None]  # takes lines for the user


class EpochBar:
    """Shows the last record's loss and accuracy; silent with `show=False`."""

    def __init__(self, epochs: int, show: bool) -> None:
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[metrics]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not show,
        )
        self._task = self._bar.add_task("", total=epochs, metrics="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def update(self, history: Sequence[dict[str, Any]]) -> None:
        """Show the epochs done and their last metrics."""
        metrics = ""
        if history:
            metrics = f"loss {history[-1]['loss']:.3f}  accuracy {history[-1]['accuracy']:.1%}"
        self._bar.update(self._task, completed=len(history), metrics=metrics)
