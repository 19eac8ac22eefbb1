"""Prompts against a head alone on boxes: arms × images × seeds, differences with intervals.

    python demos/dense/bccd.py BCCD OUT backbone.checkpoint=vit.safetensors [key=value ...]

Finished run folders in OUT are kept and unfinished ones continued, so that it may be killed and
started again.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from vpt.dense.compare import paired_difference
from vpt.dense.config import load_dense
from vpt.dense.pyramid import HEAD_ONLY
from vpt.dense.run import run

ARMS = [HEAD_ONLY, "vpt_deep", "random_prompts", "bias_tuning", "lora", "full_finetune"]
SHOTS, SEEDS = (10, 50, 205), (1, 2, 3)


def main(root: str, out: str, *overrides: str) -> None:
    """Run what is not finished, then print the table of what is."""
    for seed in SEEDS:
        for shots in SHOTS:
            for arm in ARMS:
                keys = [f"data.root={root}", f"data.shots={shots}", f"data.seed={seed}"]
                keys += [f"train.seed={seed}", f"method.name={arm}", "data.flips=both"]
                folder = Path(out) / f"{arm}-{shots}-{seed}"
                config = load_dense("detect", [*overrides, *keys, f"out={folder}"])
                run(config, resume=True, progress=False)
    table(Path(out))


def table(out: Path) -> None:
    """AP and AP50 in %, mean over seeds, and AP50 minus the head's, of all and of each class."""
    print("|images|arm|seeds|AP|AP50|AP50 − head alone (95 % interval)|of each class|seconds|")
    print("|---|---|---|---|---|---|---|---|")
    for shots in SHOTS:
        for arm in ARMS:
            runs = [path.parent for path in sorted(out.glob(f"{arm}-{shots}-*/result.json"))]
            if not runs:
                continue
            results = [json.loads((run / "result.json").read_text()) for run in runs]
            ap, ap50, seconds = (
                statistics.mean(result[key] for result in results)
                for key in ("ap", "ap50", "train_seconds")
            )
            both = [(run, out / run.name.replace(arm, HEAD_ONLY)) for run in runs]
            both = [pair for pair in both if (pair[1] / "result.json").is_file()]
            gain, each = "", ""
            if arm != HEAD_ONLY and both:
                found = paired_difference(*zip(*both, strict=True))
                gain = said(found)
                each = "; ".join(f"{name} {said(own)}" for name, own in found["per_class"].items())
            print(
                f"|{shots}|`{arm}`|{len(runs)}|{100 * ap:.1f}|{100 * ap50:.1f}|{gain}|{each}|"
                f"{seconds:.0f}|",
                flush=True,
            )


def said(found: dict[str, Any]) -> str:
    """A difference of AP50 and its interval, in points."""
    low, high = (100 * bound for bound in found["ap50_interval"])
    return f"{100 * found['ap50']:+.1f} ({low:+.1f} to {high:+.1f})"


if __name__ == "__main__":
    main(*sys.argv[1:])
