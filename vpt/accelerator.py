"""Device, precision and processes, by accelerate."""

import os
from typing import Literal

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.state import AcceleratorState, PartialState

Precision = Literal["auto", "fp32", "bf16"]


def processes() -> PartialState:
    """The processes of this run, started by `torchrun` or `accelerate launch`."""
    return PartialState(cpu=_several_on_cpu())


def _several_on_cpu() -> bool:
    # accelerate joins processes without a GPU only where it is told to stay on the CPU
    return "LOCAL_RANK" in os.environ and not torch.accelerator.is_available()


def make_accelerator(precision: Precision = "auto", compile: bool = False) -> Accelerator:
    """An Accelerator; `auto` is bf16 autocast on a GPU that has it, else float32.

    What it prepares goes through `torch.compile` with `compile`.

    A batch is split over the processes, so that `batch_size` means the same on any number of
    GPUs. A last batch that does not fill it is padded with images of the first.
    """
    bf16 = precision == "bf16" or (
        precision == "auto" and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    )
    # one process may fit several models, each in its own precision
    AcceleratorState._reset_state()
    return Accelerator(
        cpu=_several_on_cpu(),
        mixed_precision="bf16" if bf16 else "no",
        dynamo_backend="inductor" if compile else "no",
        dataloader_config=DataLoaderConfiguration(split_batches=True),
    )
