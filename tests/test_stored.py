"""What earlier versions wrote keeps its meaning: artefacts, run configurations, stopped runs."""

import pytest
import torch
from golden_case import assert_close
from stored import BACKBONES, FOLDER, cases, metadata
from tiny import images

import vpt
from vpt import methods

ARTEFACTS = sorted(FOLDER.glob("*.safetensors"))


def load(path):
    return vpt.load(path, BACKBONES[path.stem.rpartition("_")[2]]())


@pytest.mark.parametrize("path", ARTEFACTS, ids=lambda path: path.stem)
@torch.no_grad()
def test_an_artefact_gives_the_logits_it_gave(path):
    model = load(path)
    expected = torch.tensor(model.metadata["logits"])
    assert_close(model(images()), expected, 1e-5)
    assert_close(model.fold()(images()), expected, 2e-5)
    model.backbone.exact_tokens = True
    assert_close(model(images()), expected, 2e-5)


def test_every_method_and_variant_has_one():
    """Of a new method, `tests/stored.py` writes it."""
    stored = {path.stem.rpartition("_")[0] for path in ARTEFACTS}
    assert stored >= cases().keys()
    assert {metadata(path)["method"] for path in ARTEFACTS} >= set(methods.names())
