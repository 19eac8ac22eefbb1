"""A made-up ultrasound cohort with a rare class: drawn, learned from and reported, offline.

    python demos/medical/synthetic.py [--out DIR] [--patients 400]

Every image is drawn here, from noise and ellipses, and says SYNTHETIC; no patient exists.
"""

import argparse
import csv
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter
from study import Study, write_report

SIDE = 96
PROPORTIONS = {"normal": 0.6, "cyst": 0.32, "tumour": 0.08}  # of patients
IMAGES = 4  # of a patient, at most


def draw_cohort(folder: Path, patients: int, seed: int = 0) -> Path:
    """Images of `patients` and the table path,label,patient of them; returns the table."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(patients):
        label = rng.choice(list(PROPORTIONS), p=list(PROPORTIONS.values()))
        gain, depth = rng.uniform(0.7, 1.2), rng.uniform(1.0, 2.2)  # of this patient's scans
        for scan in range(rng.integers(1, IMAGES + 1)):
            path = Path(label) / f"patient{number:04}_{scan}.png"
            (folder / label).mkdir(parents=True, exist_ok=True)
            draw_scan(label, gain, depth, rng).save(folder / path)
            rows.append([path, label, f"patient{number:04}"])
    table = folder / "cohort.csv"
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([["path", "label", "patient"], *rows])
    return table


def draw_scan(label: str, gain: float, depth: float, rng: np.random.Generator) -> Image.Image:
    """Speckle in layers that darkens with depth, and what the label says in it.

    A cyst is round, black and bright behind; a tumour is ragged, dark and shadows what is behind.
    """
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    layers = 1 + 2 * gaussian_filter(rng.normal(size=SIDE), 4)
    bent = np.clip(y + 0.03 * np.sin(5 * x + rng.uniform(0, 6)), 0, 0.99)
    echo = layers[(bent * SIDE).astype(int)]
    if label != "normal":
        middle_x, middle_y = rng.uniform(0.3, 0.7), rng.uniform(0.3, 0.6)
        radius = rng.uniform(0.1, 0.18)
        angle = np.arctan2(y - middle_y, x - middle_x)
        ragged = 0.25 * np.sin(rng.integers(5, 9) * angle + rng.uniform(0, 6))
        edge = radius * (1 + (ragged if label == "tumour" else 0))
        inside = np.hypot(x - middle_x, y - middle_y) < edge
        behind = (abs(x - middle_x) < 0.8 * radius) & (y > middle_y) & ~inside
        echo = np.where(behind, echo * (1.5 if label == "cyst" else 0.6), echo)
        echo = np.where(inside, 0.08 if label == "cyst" else 0.35, echo)
    speckle = gaussian_filter(rng.rayleigh(size=(SIDE, SIDE)), (0.7, 1.4))
    scan = 90 * gain * np.clip(echo, 0, None) * speckle * np.exp(-depth * 0.6 * y)
    image = Image.fromarray(np.clip(scan, 0, 255).astype(np.uint8))
    ImageDraw.Draw(image).text((2, SIDE - 17), "SYNTHETIC", fill=255, font_size=14)
    return image


def main() -> None:
    """Draw, learn, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("medical-synthetic"))
    parser.add_argument("--patients", type=int, default=400)
    arguments = parser.parse_args()
    table = draw_cohort(arguments.out / "cohort", arguments.patients)
    study = Study(
        title="SYNTHETIC ultrasound cohort, with a rare tumour",
        folder=arguments.out,
        method="vpt_deep",
        baselines=("zero_shot", "linear_probe", "random_prompts"),
        settings=[
            "backbone.name=tiny_clip",
            f"data.root={table}",
            "data.templates=['an ultrasound scan of {}.']",
            "data.shots=12",
            "data.calibration=0.3",
            "data.duplicates=warn",
            "decision.sensitivity.tumour=0.9",
        ],
        note="SYNTHETIC: every image was drawn by a program; no patient exists.",
    )
    print(write_report([study], arguments.out / "report.html"))


if __name__ == "__main__":
    main()
