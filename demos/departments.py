"""Many departments on one backbone: each has its prompt, and one batch answers all of them.

python demos/departments.py trains four on handwritten digits, offline, then asks each of them, and
all of them, about images.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import vpt

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
DEPARTMENTS = {  # name → method, class names, and the class of each digit
    "parity": ("vpt_deep", ["even", "odd"], [0, 1] * 5),
    "size": ("linear_probe", ["small", "large"], [0] * 5 + [1] * 5),
    "loops": ("vpt_shallow", ["none", "one", "two"], [1, 0, 0, 0, 1, 0, 1, 0, 2, 1]),
    "reader": ("ss_text", WORDS, list(range(10))),
}


def main() -> None:
    """Train the departments' prompts, then fill a bank with them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shots", type=int, default=20, help="training images of each digit")
    shots = parser.parse_args().shots

    backbone = vpt.backbones.load("tiny_clip")
    images, digits = pictures(backbone)
    train = torch.cat([(digits == digit).nonzero()[:shots, 0] for digit in range(10)])
    held = torch.ones(len(digits)).index_fill(0, train, 0).nonzero()[:400, 0]
    bank = vpt.PromptBank(backbone)
    with TemporaryDirectory() as folder:
        for name, (method, classes, of_digit) in DEPARTMENTS.items():
            labels = torch.tensor(of_digit)[digits]
            model = vpt.attach(backbone, method, class_names=classes)
            loader = DataLoader(TensorDataset(images[train], labels[train]), 32, shuffle=True)
            vpt.fit(model, loader, config={"epochs": 10, "lr": 5e-3})
            bank.add(name, vpt.save(model, Path(folder) / f"{name}.safetensors"), pinned=True)

    # each image goes to another department: one pass of the backbone
    asked = [list(bank)[number % len(bank)] for number in range(8)]
    logits = bank(images[held[:8]], asked)
    for digit, name, row in zip(digits[held[:8]], asked, logits, strict=True):
        print(f"a {digit} to {name}: {bank.task(name).class_names[row.argmax()]}")

    # one image goes to all departments: it is embedded once
    (every,) = bank(images[held[:1]], [list(bank)])
    answers = {
        n: bank.task(n).class_names[row.argmax()] for n, row in zip(bank, every, strict=True)
    }
    print(f"a {digits[held[0]]} to all:", answers)

    for name, (_, _, of_digit) in DEPARTMENTS.items():
        labels = torch.tensor(of_digit)[digits[held]]
        found = torch.stack(bank(images[held], [name] * len(held))).argmax(1)
        print(f"{name}: accuracy {(found == labels).float().mean():.1%}")
    size = sum(parameter.nbytes for parameter in backbone.parameters())
    print(f"{bank.num_bytes / 1e3:.0f} kB of prompts beside {size / 1e6:.0f} MB of weights")


def pictures(backbone: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """All of scikit-learn's digits as the backbone takes them, shuffled, and their labels."""
    data = load_digits()
    grey = torch.from_numpy(data.images * (255 / 16)).round().to(torch.uint8)
    grey = grey.repeat_interleave(4, 1).repeat_interleave(4, 2)  # 8 to 32 pixels
    order = torch.randperm(len(grey), generator=torch.Generator().manual_seed(0))
    images = backbone.preprocess.normalize(grey[..., None].expand(-1, -1, -1, 3))
    return images[order], torch.from_numpy(data.target)[order]


if __name__ == "__main__":
    main()
