"""PneumoniaMNIST and BreastMNIST with an ImageNet ViT-Ti, each beside its baselines.

    python demos/medical/medmnist.py [--out DIR] [--data DIR] [--weights FILE]

`--data` holds pneumoniamnist.npz and breastmnist.npz, by default the folder $VPT_REAL_DATA. The
weights are `vit_tiny_patch16_224.augreg_in21k_ft_in1k`: a file of them in that folder, else timm
downloads them.
"""

import argparse
import os
from pathlib import Path

from study import Study, write_report

STUDIES = {  # data set → the class to find, shots, calibration images
    "pneumoniamnist": ("pneumonia", 100, 400),
    "breastmnist": ("malignant tumor", 50, 150),
}


def main() -> None:
    """Learn, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("medical-medmnist"))
    parser.add_argument("--data", type=Path, default=os.environ.get("VPT_REAL_DATA"))
    parser.add_argument("--weights", type=Path)
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error("give --data=DIR, or set VPT_REAL_DATA")
    arguments.data = Path(arguments.data)
    found = sorted(arguments.data.glob("vit_tiny_patch16_224.augreg_in21k_ft_in1k*.safetensors"))
    weights = arguments.weights or next(iter(found), None)
    studies = [
        Study(
            title=name,
            folder=arguments.out / name,
            method="vpt_deep",
            baselines=("linear_probe", "random_prompts"),
            settings=[
                "backbone.name=vit_tiny_in21k_ft_in1k",
                *([f"backbone.checkpoint={weights}"] if weights else []),
                f"data.name={name}",
                f"data.root={arguments.data / name}.npz",
                f"data.shots={shots}",
                f"data.calibration={calibration}",
                f"decision.sensitivity.{positive}=0.9",
            ],
        )
        for name, (positive, shots, calibration) in STUDIES.items()
    ]
    print(write_report(studies, arguments.out / "report.html"))


if __name__ == "__main__":
    main()
