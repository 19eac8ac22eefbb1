"""Device, precision and processes, by accelerate."""

from typing import Literal

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.state import AcceleratorState

Precision = Literal["auto", "fp32", "bf16"]


def make_accelerator(precision: Precision = "auto") -> Accelerator:
    """An Accelerator; `auto` is bf16 autocast on a GPU that has it, else float32.

    A batch is split over the processes, so that a run means the same on any number of GPUs.
    """
    bf16 = precision == "bf16" or (
        precision == "auto" and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    )
    # one process may fit several models, each in its own precision
    AcceleratorState._reset_state()
    return Accelerator(
        mixed_precision="bf16" if bf16 else "no",
        dataloader_config=DataLoaderConfiguration(split_batches=True),
    )
