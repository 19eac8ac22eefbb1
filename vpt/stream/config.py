"""The configuration of a stream: a run's, and which tasks come one after another."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveInt

from vpt import resources
from vpt.config import Published, RunConfig, Strict, Text, load_run

Strategy = Literal["sequential", "per_task", "joint", "rehearsal"]


class StreamSettings(Strict):
    """Which tasks come one after another, and what learns them."""

    tasks: PositiveInt = 5  # groups of the data's classes
    # folders or files (below `data.root`, where that is given) or cards, each a task; classes of
    # the same name are the same class. None: the tasks are groups of one data set's classes
    data: list[Text] | None = Field(None, min_length=2)
    shuffle: bool = True  # classes are grouped in an order drawn by `data.seed`; False: in theirs
    # sequential: one model goes on from task to task; per_task: a model each; joint: a new one on
    # all tasks so far, as an upper reference; rehearsal: sequential, with stored images
    strategy: Strategy = "sequential"
    memory: PositiveInt = 20  # of rehearsal: images a class
    # choose and report: of every other class alone, so that settings are chosen on one half of the
    # classes and results are of the other
    half: Literal["choose", "report"] | None = None


class StreamConfig(RunConfig):
    """A run whose data come as a stream of tasks."""

    stream: StreamSettings = StreamSettings()
    published: list[Published] = Field([])  # of this stream

    @property
    def folder(self) -> Path:
        """`out`, or runs/stream-STRATEGY-METHOD-DATA-seedSEED."""
        data = self.data.name or (self.data.root.stem if self.data.root else "tasks")
        name = f"stream-{self.stream.strategy}-{self.method.name}-{data}-seed{self.data.seed}"
        return self.out or Path("runs") / name


def load_stream(config: str, overrides: Sequence[str] = ()) -> StreamConfig:
    """The configuration of a stream, a path or a name under configs/stream or configs/run.

    Raises:
        InputError: as `load_run`.
    """
    known = config in resources.names("configs/stream")
    return load_run(config, overrides, StreamConfig, "configs/stream" if known else "configs/run")
