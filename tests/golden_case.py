"""Loads a case of reference numbers from tests/golden (see its README for where they come from)."""

import json
from pathlib import Path

import open_clip
import safetensors.torch
import torch
from timm.models.vision_transformer import VisionTransformer

GOLDEN = Path(__file__).parent / "golden"


def golden_json(name):
    """A reference file that holds no tensors."""
    return json.loads((GOLDEN / f"{name}_a.json").read_text())


def cases(file):
    """Names of the cases with tensors that `file` of a reference implementation made."""
    names = sorted(path.stem.removesuffix("_a") for path in GOLDEN.glob("*.safetensors"))
    return [name for name in names if file in golden_json(name)["source"]["files"]]


class Case:
    """Tensors and configuration of one case, and its backbone."""

    def __init__(self, name):
        self.config = golden_json(name)
        self.tensors = safetensors.torch.load_file(GOLDEN / f"{name}_a.safetensors")

    def __getitem__(self, name):
        return self.tensors[name]

    def under(self, prefix):
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}

    def backbone(self):
        kwargs = self.config["backbone"]["kwargs"]
        state = self.under("backbone.")
        if "vision_cfg" in kwargs:
            model = open_clip.CLIP(**kwargs)
            embedding = torch.zeros_like(model.token_embedding.weight)
            embedding[self["token_rows.ids"].long()] = self["token_rows.weight"]
            state["token_embedding.weight"] = embedding
        else:
            model = VisionTransformer(**kwargs)
        model.load_state_dict(state)
        return model


def assert_close(actual, expected, relative=2e-5):
    """Largest difference relative to the largest expected entry."""
    error = (actual.detach() - expected).abs().max() / expected.abs().max().clamp(min=1e-12)
    assert error <= relative, f"relative error {error:.2e} > {relative:.0e}"
