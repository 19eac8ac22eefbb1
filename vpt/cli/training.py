"""Train, test and predict."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from vpt.cli.app import Artefact, Overrides, app, first_process, say
from vpt.errors import InputError


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("quickstart"),
    seeds: Annotated[int, typer.Option(min=1, help="Repeat with this many seeds.")] = 1,
) -> None:
    """Adapt the embedded tiny CLIP to handwritten digits with six methods, offline."""
    from vpt.quickstart import quickstart

    quickstart(out, seeds)


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="A path, or a name from `vpt list configs`.")],
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option(help="Continue an interrupted run.")] = False,
) -> None:
    """Adapt a backbone to labelled images: vpt train vpt_deep data.root=IMAGES."""
    from vpt.config import load_run
    from vpt.run import run

    _print_metrics(run(load_run(config, overrides or []), resume=resume, log=say))


@app.command(name="eval")
def evaluate(
    artefact: Artefact,
    overrides: Overrides = None,
    every: Annotated[
        bool, typer.Option("--all", help="All of data.root is test data the prompt never saw.")
    ] = False,
    other_classes: Annotated[
        bool, typer.Option(help="Of data it was not trained on, such as data.class_half=new.")
    ] = False,
) -> None:
    """Test an artefact on the held-out images of its data, or on other labelled images."""
    from vpt.inference import evaluate

    options = {"every": every, "other_classes": other_classes}
    _print_metrics(evaluate(artefact, overrides or [], **options, log=say))


@app.command()
def predict(
    artefact: Artefact,
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    checkpoint: Annotated[
        str | None, typer.Option(help="The backbone's weights, where they have moved.")
    ] = None,
    classes: Annotated[
        list[str] | None,
        typer.Option(help="A class in place of its own, or a file of them, a line each; repeat."),
    ] = None,
) -> None:
    """Classify images."""
    from vpt.inference import predict

    names = _names(classes) if classes else None
    for number, prediction in enumerate(predict(artefact, images, checkpoint, names, log=say)):
        if number == 0 and "notice" in prediction:
            say(prediction["notice"])
        print(json.dumps(prediction) if as_json else "\t".join(_columns(prediction)))


def _names(classes: list[str]) -> list[str]:
    """The names among `classes`, and the lines of the files among them."""
    found: list[str] = []
    for name in classes:
        try:
            lines = (
                Path(name).read_text("utf-8-sig").splitlines() if Path(name).is_file() else [name]
            )
        except ValueError:
            raise InputError(f"{name}: not a text in UTF-8: give a class a line") from None
        found += [line.strip() for line in lines if line.strip()]
    return found


def _columns(prediction: dict[str, Any]) -> list[str]:
    """A prediction as text: path, class and probability, then what else was decided."""
    if "labels" in prediction:
        probabilities = prediction["probabilities"]
        labels = [f"{name} {probabilities[name]:.3f}" for name in prediction["labels"]]
        return [prediction["path"], ", ".join(labels) or "none"]
    columns = [prediction["path"], prediction["class"], f"{prediction['probability']:.3f}"]
    for key in ("called", "set"):
        if key in prediction:
            columns.append(f"{key}: {', '.join(prediction[key]) or 'none'}")
    return columns + ["refer"] * prediction.get("refer", False)


def _print_metrics(metrics: dict[str, Any]) -> None:
    if first_process():
        for name, value in metrics.items():
            _print_metric(name, value)


def _print_metric(name: str, value: Any) -> None:
    if isinstance(value, dict) and any(isinstance(part, dict) for part in value.values()):
        for key, part in value.items():
            _print_metric(f"{name}.{key}", part)
    elif value != {}:
        print(f"{name:20} {_text(value)}")


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(part)}" for key, part in value.items())
    if isinstance(value, list):
        return "–".join(map(_text, value))
    return f"{value:.4f}" if isinstance(value, float) else str(value)
