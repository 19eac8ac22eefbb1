"""Artefacts as earlier versions wrote them: which there are, and how a new one is written.

    PYTHONPATH=.:tests python tests/stored.py

writes those of methods and variants that have none yet. It never overwrites: the files say what
earlier versions computed, which no later version may change.
"""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from tiny import NAMES, clip, fixed, images, vit
from torch.utils.data import DataLoader, TensorDataset

import vpt
from vpt import methods

FOLDER = Path(__file__).parent / "golden" / "artifacts"
BACKBONES = {"vit": lambda: fixed(vit(embed_dim=16)), "clip": lambda: fixed(clip(embed_dim=64))}
TEMPLATES = ["a photo of a {}.", "art of the {}."]
VARIANTS = {  # whose tensors or metadata differ from the method's defaults
    "gated": ("vpt_deep", {"gated": True}),
    "crossfit": ("vpt_deep", {"head": "crossfit"}),
    "recipe": ("vpt_deep", {"gated": True, "head": "crossfit"}),
    "project": ("vpt_deep", {"project": 5}),
    "layers": ("vpt_deep", {"layers": [1], "position": "append"}),
    "shallow_gated": ("vpt_shallow", {"gated": True, "project": 5}),
    "pruned": ("kv_prompts", {"prune_tokens": 0.3, "prune_segments": 0.2, "gated": True}),
    "kmeans": ("self_prompts", {"pooling": "kmeans"}),
    "patch": ("pixel_prompts", {"shape": "patch"}),
    "lora_crossfit": ("lora", {"head": "crossfit"}),
    "class_specific": ("coop", {"class_specific": True, "num_tokens": 3}),
    "front": ("coop", {"position": "front", "num_tokens": 3}),
    "middle": ("coop", {"position": "middle", "init": "a photo of a"}),
    "free_context": ("cocoop", {"init": None, "num_tokens": 3}),
    "templates": ("zero_shot", {"templates": TEMPLATES}),
    "chosen": ("zero_shot", {"choose": "best", "templates": TEMPLATES}),
    "weighted": ("zero_shot", {"choose": "weighted", "templates": TEMPLATES}),
    "multilabel": ("vpt_deep", {"multilabel": True}),
    "coop_multilabel": ("coop", {"multilabel": True}),
    "zero_shot_multilabel": ("zero_shot", {"multilabel": True}),
    "decision": ("vpt_deep", {}),
}
DETAILS = {
    "decision": {
        "precision": "fp32",
        "figures": {"accuracy": 0.5},
        "decision": {
            "multilabel": False,
            "temperature": 1.5,
            "thresholds": {NAMES[0]: 0.3},
            "quantiles": dict.fromkeys(NAMES, 0.7),
            "refer_below": 0.5,
        },
    }
}


def cases():
    """Name → method and options."""
    return {name: (name, {}) for name in methods.names()} | VARIANTS


def metadata(path):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["vpt"])


def trained(kind, method, options):
    """A model of which no step or solver left a tensor as it was drawn."""
    torch.manual_seed(1)
    model = vpt.attach(BACKBONES[kind](), method, class_names=NAMES, **options)
    before = {name: tensor.clone() for name, tensor in model.tunable_parameters().items()}
    inputs, labels = images(8), torch.tensor([0, 1, 2, 2, 0, 1, 1, 0])
    inputs[range(8), labels] += 2  # a colour tells the class
    if not model.target.exclusive:
        labels = torch.stack([labels == 0, labels > 0, labels != 1], 1).long()
    data = DataLoader(TensorDataset(inputs, labels), 4)
    vpt.fit(model, data, config={"epochs": 4, "lr": 0.05, "schedule": "constant"})
    still = [
        n for n, tensor in model.tunable_parameters().items() if torch.equal(tensor, before[n])
    ]
    assert not still, still
    return model.eval()


@torch.no_grad()
def without_a_say(model):
    """Stored tensors that change no logit by more than the test tolerates."""
    logits, silent = model(images()), []
    for name, tensor in model.artifact_tensors().items():
        kept = tensor.clone()
        tensor.add_(0.1 * torch.randn_like(tensor))
        if (model(images()) - logits).abs().max() < 1e-4 * logits.abs().max():
            silent.append(name)
        tensor.copy_(kept)
    # of later solving only; of a choice that a small change leaves as it is
    return set(silent) - {"penalties", "keys"}


def write():
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, (method, options) in cases().items():
        for kind in BACKBONES:
            path = FOLDER / f"{name}_{kind}.safetensors"
            if path.exists():
                continue
            try:
                model = trained(kind, method, options)
            except vpt.InputError as error:
                print(f"{path.name}: {error}")
                continue
            assert not (silent := without_a_say(model)), silent
            with torch.no_grad():
                logits = model(images()).tolist()
            vpt.save(model, path, logits=logits, **DETAILS.get(name, {}))
            print(f"wrote {path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    write()
