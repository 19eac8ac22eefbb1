"""Prompts against a head alone on boxes: arms × images × seeds, each difference with its interval.

    python demos/dense/bccd.py BCCD OUT backbone.checkpoint=vit.safetensors [key=value ...]

Finished run folders in OUT are kept and unfinished ones continued, so that it may be killed and
started again.
"""

import json
import statistics
import sys
from pathlib import Path

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
    """AP50 and AP in %, mean over seeds, and AP50 minus the head's by seed."""
    print("|images|arm|seeds|AP|AP50|AP50 − head alone, by seed (95 % interval)|seconds|")
    print("|---|---|---|---|---|---|---|")
    for shots in SHOTS:
        for arm in ARMS:
            folders = sorted(out.glob(f"{arm}-{shots}-*/result.json"))
            results = [json.loads(path.read_text()) for path in folders]
            if not results:
                continue
            ap, ap50, seconds = (
                statistics.mean(result[key] for result in results)
                for key in ("ap", "ap50", "train_seconds")
            )
            said = []
            for path in folders:
                base = out / path.parent.name.replace(arm, HEAD_ONLY)
                if arm != HEAD_ONLY and (base / "result.json").is_file():
                    found = paired_difference(path.parent, base)
                    low, high = (100 * bound for bound in found["ap50_interval"])
                    said.append(f"{100 * found['ap50']:+.1f} ({low:+.1f} to {high:+.1f})")
            print(
                f"|{shots}|`{arm}`|{len(results)}|{100 * ap:.1f}|{100 * ap50:.1f}|"
                f"{', '.join(said)}|{seconds:.0f}|",
                flush=True,
            )


if __name__ == "__main__":
    main(*sys.argv[1:])
