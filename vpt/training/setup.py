"""The model and the loader of a run, from what was read."""

from typing import Any

from torch.utils.data import DataLoader

from vpt import methods
from vpt.backbones import Backbone
from vpt.config import RunConfig
from vpt.data.fewshot import Split
from vpt.data.loaders import make_loader
from vpt.data.sources import Source
from vpt.methods import Method


def attach(backbone: Backbone, source: Source, config: RunConfig) -> Method:
    """The model of `config` before training; raises as `methods.attach`."""
    return methods.attach(
        backbone,
        config.method.name,
        class_names=source.class_names,
        target=source.target,
        **method_options(config, source),
    )


def method_options(config: RunConfig, source: Source) -> dict[str, Any]:
    """The method's options; templates, where it takes them, are the data's unless given."""
    options = config.method.options
    if "templates" in methods.find(config.method.name).Options.model_fields:
        options = {"templates": source.templates, **options}
    return options


def training_loader(model: Method, source: Source, split: Split, config: RunConfig) -> DataLoader:
    """Shuffled batches of all training images for `model`."""
    return make_loader(
        split.train,
        model.backbone.preprocess,
        config.train.batch_size,
        train=True,
        augment="none" if model.solved else source.augment,
        seed=config.train.seed,
        workers=config.data.workers,
    )
