"""Kinds of dense runs: on boxes, on masks."""

from typing import Any

from vpt.dense.detection import Detection
from vpt.dense.segmentation import Segmentation

KINDS: dict[str, Any] = {"detect": Detection(), "segment": Segmentation()}
