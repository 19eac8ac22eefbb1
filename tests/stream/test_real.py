"""Streams of real images on a real backbone: the order that docs/continual.md states."""

import json
import os
import tarfile
from pathlib import Path

import pytest

from vpt.stream.config import load_stream
from vpt.stream.run import run_stream

REAL = Path(os.environ.get("VPT_REAL_DATA", "nowhere"))
TAR, WEIGHTS = (
    REAL / "caltech97_128px.tar",
    REAL / "vit_tiny_patch16_224.augreg_in21k_ft_in1k.fp16.safetensors",
)
SETTINGS = {
    "class_means": [],
    "ranpac": [],
    "linear_probe": ["stream.strategy=joint"],
}


@pytest.mark.slow
@pytest.mark.skipif(not WEIGHTS.is_file(), reason="needs VPT_REAL_DATA")
def test_class_means_are_below_ranpac(tmp_path):
    with tarfile.open(TAR) as archive:
        archive.extractall(tmp_path / "images", filter="data")
    (root,) = {path.parent.parent for path in (tmp_path / "images").rglob("*.jpg")}
    final = {}
    for method, settings in SETTINGS.items():
        given = [
            "backbone.name=vit_tiny_patch16_224.augreg_in21k_ft_in1k",
            f"backbone.checkpoint={WEIGHTS}",
            f"data.root={root}",
            "data.duplicates=ignore",
            "stream.tasks=10",
            "stream.half=report",
            f"engine.feature_cache={os.environ.get('FEATURES', tmp_path / 'features')}",
            f"out={tmp_path / method}",
        ]
        result = run_stream(load_stream(method, [*given, *settings]), progress=False)
        final[method] = result["final_accuracy"]
        print(json.dumps({method: result}))
    assert final["class_means"] < final["ranpac"] <= final["linear_probe"] + 0.02
