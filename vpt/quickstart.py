"""`vpt quickstart`: seven methods on digits in ink, offline, with one table and one plot."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from vpt import artifact
from vpt.config import RunConfig, load_run
from vpt.data.fewshot import split_data
from vpt.data.sources import open_source
from vpt.evaluation.evaluate import confusion, outputs
from vpt.evaluation.lettering import labels as shown
from vpt.evaluation.plots import save
from vpt.files import write_atomically
from vpt.folder import RunFolder
from vpt.run import run

METHODS = {  # run configuration notebook_… → what the table calls it
    "zero_shot": "hand-written prompt",
    "tip_adapter": "Tip-Adapter (no training)",
    "coop": "CoOp",
    "zs_lp": "ZS-LP",
    "class_means": "class means (no training)",
    "linear_probe": "linear probe",
    "vpt_deep": "VPT-deep",
}
WORDS = {"zero_shot", "tip_adapter", "coop", "zs_lp"}  # start from the class names
SHOTS = 4
NEXT = """Next, on your own images (one folder a class):
  vpt train auto data.root=IMAGES
  vpt predict runs/auto-IMAGES-16shot-seed1/prompt.safetensors IMAGE.jpg
  vpt list methods | datasets | backbones | configs"""


def quickstart(out: Path, seeds: int = 1) -> None:
    """Run every method with seeds 1 to `seeds` into `out`; runs that are there are not repeated."""
    console = Console()
    configs = {
        (method, seed): load_run(
            f"notebook_{method}",
            [f"data.seed={seed}", f"train.seed={seed}", f"out={out}/{method}-seed{seed}"],
        )
        for method in METHODS
        for seed in range(1, seeds + 1)
    }
    results = {}
    for step, ((method, seed), config) in enumerate(configs.items(), start=1):
        console.print(f"[{step}/{len(configs)}] {METHODS[method]}, seed {seed}", highlight=False)
        results[method, seed] = run(config, resume=True, log=lambda line: None)
    rows = [_summary(m, [results[m, s] for s in range(1, seeds + 1)]) for m in METHODS]
    summary = {"data": "notebook_digits", "backbone": "tiny_clip", "shots": SHOTS}
    summary |= {"seeds": seeds, "rows": rows}
    write_atomically(out / "result.json", json.dumps(summary, indent=2).encode())
    _draw(rows, configs["zero_shot", 1], configs["vpt_deep", 1], out / "figure.png")
    console.print(_table(rows, seeds))
    console.print(f"Artefacts, result.json and figure.png are in {out}/\n\n{NEXT}", highlight=False)


def _summary(method: str, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    accuracies = [result["accuracy"] for result in results]
    return {
        "method": method,
        "accuracy": mean(accuracies),
        "accuracy_std": stdev(accuracies) if len(accuracies) > 1 else None,
        "tunable_parameters": results[0]["tunable_parameters"],
        "train_seconds": mean(result["train_seconds"] for result in results),
    }


def _table(rows: Sequence[dict[str, Any]], seeds: int) -> Table:
    title = f"Digits in ink on ruled paper, {SHOTS} images a class, embedded tiny CLIP"
    table = Table(title=f"{title}, {seeds} seeds" if seeds > 1 else title)
    table.add_column("method", no_wrap=True)
    table.add_column("starts from")
    table.add_column("test accuracy", justify="right", no_wrap=seeds > 1)
    for column in ("tunable parameters", "seconds to train"):
        table.add_column(column, justify="right")
    for row in rows:
        spread = f" ± {row['accuracy_std']:.1%}" if row["accuracy_std"] is not None else ""
        table.add_row(
            METHODS[row["method"]],
            "words" if row["method"] in WORDS else "images",
            f"{row['accuracy']:.1%}{spread}",
            f"{row['tunable_parameters']:,}",
            f"{row['train_seconds']:.1f}",
        )
    return table


def _draw(rows: Sequence[dict[str, Any]], before: RunConfig, after: RunConfig, path: Path) -> None:
    """Accuracy of all methods, two confusion matrices, and digits that the prompt put right."""
    split = split_data(open_source(before.data), before.data)
    predictions = {}
    for config in (before, after):
        model = artifact.load(RunFolder(config.out).prompt)
        predictions[config.method.name], labels = outputs(model, split.test)
    names = shown(model.class_names)

    figure = Figure(figsize=(13, 7.5), layout="constrained")
    grid = figure.add_gridspec(2, 3, height_ratios=[3, 1])
    axes = figure.add_subplot(grid[0, 0])
    bars = axes.barh(
        [METHODS[row["method"]] for row in rows],
        [100 * row["accuracy"] for row in rows],
        xerr=[100 * (row["accuracy_std"] or 0) for row in rows],
        color=["#b0b0b0" if row["tunable_parameters"] == 0 else "#3b7dd8" for row in rows],
    )
    axes.bar_label(bars, fmt="%.1f", padding=4)
    axes.invert_yaxis()
    axes.set(
        xlim=(0, 112), xlabel="test accuracy, %", title=f"digits in ink, {SHOTS} images a class"
    )
    axes.spines[["top", "right"]].set_visible(False)
    for column, (method, logits) in enumerate(predictions.items(), start=1):
        axes = figure.add_subplot(grid[0, column])
        axes.imshow(confusion(logits, labels).numpy(), cmap="Blues")
        axes.set(title=f"confusion, {method}", xlabel="predicted", ylabel="true")
        axes.set_xticks(range(len(names)), names, rotation=60, ha="right")
        axes.set_yticks(range(len(names)), names)
    first, second = (logits.argmax(-1) for logits in predictions.values())
    mended = torch.nonzero((first != labels) & (second == labels)).flatten().numpy()
    chosen = np.random.default_rng(0).permutation(mended)[:10]
    strip = grid[1, :].subgridspec(1, 10)
    for column, index in enumerate(chosen):
        axes = figure.add_subplot(strip[0, column])
        axes.imshow(split.test.read(index), interpolation="nearest")
        axes.set_axis_off()
        axes.set_title(f"{names[first[index]]} → {names[second[index]]}", fontsize=9)
    figure.suptitle(
        "What prompts add to the embedded tiny CLIP "
        f"(bottom: zero-shot → {METHODS[after.method.name]})"
    )
    save(figure, path, model.class_names)
