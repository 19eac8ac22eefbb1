"""MMRL: MMRL++ with maps apart, nothing mixed and a projection anew (Guo and Gu 2025, CVPR)."""

from pydantic import Field, PositiveInt

from vpt.methods import mmrlpp


class Options(mmrlpp.Options):
    """Options of MMRL; its paper chooses `weight` for each data set, this is one."""

    rank: PositiveInt | None = None
    projection_rank: PositiveInt | None = None
    beta: float = Field(1.0, gt=0, le=1)


class MMRL(mmrlpp.MMRLpp):
    """Representation tokens that overwrite those of the block before."""

    Options = Options
