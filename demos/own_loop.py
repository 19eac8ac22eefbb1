"""One's own training loop around a prompted model: python demos/own_loop.py, offline.

`vpt.attach` gives an nn.Module; only its tunable parameters train, the backbone is unchanged.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import vpt


def main() -> None:
    """Train VPT-deep by AdamW with a cosine, and compare with the untrained head."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--shots", type=int, default=16, help="training images of each digit")
    args = parser.parse_args()
    torch.manual_seed(1)

    backbone = vpt.backbones.load("tiny_clip")
    data = load_digits()
    grey = torch.from_numpy(data.images * (255 / 16)).round().to(torch.uint8)
    grey = grey.repeat_interleave(4, 1).repeat_interleave(4, 2)  # 8 to 32 pixels
    images = backbone.preprocess.normalize(grey[..., None].expand(-1, -1, -1, 3))
    labels = torch.from_numpy(data.target)
    train = torch.cat([(labels == digit).nonzero()[: args.shots, 0] for digit in range(10)])
    held = torch.ones(len(labels)).index_fill(0, train, 0).nonzero()[:400, 0]
    loader = DataLoader(TensorDataset(images[train], labels[train]), 32, shuffle=True)
    test = DataLoader(TensorDataset(images[held], labels[held]), 64)

    model = vpt.attach(backbone, "vpt_deep", num_classes=10, num_tokens=8, head="random")
    tunable = model.tunable_parameters()
    print("trains:", {name: tuple(parameter.shape) for name, parameter in tunable.items()})
    optimizer = torch.optim.AdamW(tunable.values(), lr=1e-2, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * len(loader))
    print(f"untrained: accuracy {vpt.evaluate(model, test)['accuracy']:.1%}")
    for epoch in range(args.epochs):
        model.train()
        total = 0.0
        for batch, truth in loader:
            loss, _ = model.loss(batch, truth)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() / len(loader)
        print(f"epoch {epoch + 1}: loss {total:.3f}")
    print(f"trained: accuracy {vpt.evaluate(model, test)['accuracy']:.1%}")


if __name__ == "__main__":
    main()
