"""The prompt card: what an artefact is for, how good it was, and how to use it."""

import json
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader

from vpt.folder import RunFolder
from vpt.run import NOTICE

SHOWN = ("accuracy", "balanced_accuracy", "macro_f1", "auroc", "auprc", "ece")
NAMES = 50  # of classes that a card lists


def write_card(
    name: str,
    repository: str | None,
    metadata: dict[str, Any],
    run: RunFolder,
    sha256: str,
    licence: str | None,
) -> str:
    """A README.md in the Hub's form; `vpt` in its front matter is what `pull` checks.

    Args:
        name: its title.
        repository: where it will be on the Hub.
        metadata: of the artefact.
        run: whose result.json has the intervals, if it is that of the artefact.
        sha256: of the artefact's file.
        licence: by the Hub's names.
    """
    front = {
        **({"license": licence} if licence else {}),
        "library_name": "visual-prompt-tuning",
        "pipeline_tag": "image-classification",
        "tags": ["visual-prompt-tuning", "prompt-tuning", metadata["method"]],
        "vpt": {"sha256": sha256, "fingerprint": metadata["backbone"]["fingerprint"]},
    }
    data = metadata.get("data", {})
    environment = Environment(
        loader=PackageLoader("vpt.hub", "."), trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["code"] = _code
    return environment.get_template("card.md").render(
        front=yaml.safe_dump(front, sort_keys=False).strip(),
        name=name,
        place=repository or "FOLDER",
        file=f"{name}.safetensors",
        licence=licence,
        backbone=metadata["backbone"],
        method=metadata["method"],
        options={k: v for k, v in metadata["options"].items() if not isinstance(v, list)},
        data=data,
        shots=data.get("shots"),
        classes=metadata["class_names"],
        shown=NAMES,
        metrics=_metrics(metadata, run),
        num_test=metadata.get("figures", {}).get("num_test"),
        decision=metadata.get("decision"),
        notice=NOTICE if metadata.get("medical") else None,
        version=metadata["version"],
    )


def _metrics(metadata: dict[str, Any], run: RunFolder) -> list[tuple[str, str, str]]:
    """Name, value and 95 % interval of each metric that was measured."""
    figures, beside = metadata.get("figures", {}), {}
    if figures and run.result.is_file():
        result = json.loads(run.result.read_text())
        if result.get("config_hash") == metadata.get("config_hash"):
            beside = result
    rows = []
    for key in SHOWN:
        value, interval = figures.get(key), beside.get(f"{key}_interval")
        if isinstance(value, float):
            span = "–".join(f"{end:.3f}" for end in interval) if interval else ""
            rows.append((key.replace("_", " "), f"{value:.3f}", span))
    return rows


def _code(value: Any) -> str:
    """`value` as code, whatever marks are in it."""
    text = " ".join(str(value).split()).replace("`", "'")
    return f"`{text}`"
