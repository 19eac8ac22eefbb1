"""Linear head by gradient steps on frozen features, which prompts trained alike have to beat."""

from typing import Literal

from vpt.methods._linear import LinearOptions, LinearReadout


class Options(LinearOptions):
    """Options of the linear head."""

    head: Literal["probe", "random"] = "random"


class LinearHead(LinearReadout):
    """The linear read-out alone."""

    Options = Options
    frozen_features = True
    starts_small = True
