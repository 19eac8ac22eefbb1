"""A prompt from a few images a class: python demos/few_shot.py flowers/ --out flowers.safetensors.

The folder holds one folder of images a class. Some of each train, the others test once.
"""

import argparse
import random
from collections import defaultdict
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder

import vpt


def main() -> None:
    """Train, test and save a prompt."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path("prompt.safetensors"))
    parser.add_argument("--shots", type=int, default=16, help="training images of each class")
    parser.add_argument("--method", default="vpt_deep")
    parser.add_argument("--backbone", default="tiny_clip", help="vit_b16, openai_clip_b32, …")
    args = parser.parse_args()

    backbone = vpt.backbones.load(args.backbone)
    crop, normalize = backbone.preprocess.crop(), backbone.preprocess.normalize
    data = ImageFolder(args.folder, lambda image: normalize(torch.from_numpy(crop(image))))
    train, test = split(data.targets, args.shots)

    options, config = vpt.recipe(args.method)
    model = vpt.attach(backbone, args.method, class_names=data.classes, **options)
    vpt.fit(model, DataLoader(Subset(data, train), config.batch_size, shuffle=True), config=config)
    found = vpt.evaluate(model, DataLoader(Subset(data, test), config.batch_size))
    path = vpt.save(model, args.out)
    print(f"{len(train)} images trained, {len(test)} tested: accuracy {found['accuracy']:.1%}")
    print(f"wrote {path}: {path.stat().st_size / 1e3:.0f} kB")


def split(labels: list[int], shots: int) -> tuple[list[int], list[int]]:
    """Numbers of training images, `shots` of each class drawn at random, and of all others."""
    of_class = defaultdict(list)
    for number, label in enumerate(labels):
        of_class[label].append(number)
    train = [n for own in of_class.values() for n in random.Random(1).sample(own, shots)]
    return train, sorted(set(range(len(labels))) - set(train))


if __name__ == "__main__":
    main()
