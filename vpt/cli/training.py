"""Train, test and predict."""

import json
from collections import Counter
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
    """Adapt the embedded tiny CLIP to digits in ink with seven methods, offline."""
    from vpt.quickstart import quickstart

    quickstart(out, seeds)


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="A path, or a name from `vpt list configs`.")],
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option(help="Continue an interrupted run.")] = False,
) -> None:
    """Adapt a backbone to labelled images: vpt train vpt_deep data.root=IMAGES.

    Or to several data sets at once: vpt train multitask tasks.NAME.root=IMAGES
    """
    from vpt.config import kind_of, load_run

    if kind_of(config):
        from vpt.dense.config import load_dense
        from vpt.dense.run import run as run_dense

        settings = load_dense(config, overrides or [])
        _print_metrics(run_dense(settings, resume=resume, log=say))
        return
    from vpt import multitask
    from vpt.run import run

    loaded = load_run(config, overrides or [])
    do = multitask.run if loaded.tasks else run
    _print_metrics(do(loaded, resume=resume, log=say))


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
    from vpt.dense.artefact import kind_of

    options = {"every": every}
    if kind_of(artefact):
        from vpt.dense.inference import evaluate

        if other_classes:
            raise InputError(f"--other-classes: {artefact} is no classifier: drop it")
    else:
        from vpt.inference import evaluate

        options["other_classes"] = other_classes
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
    out: Annotated[
        Path, typer.Option(help="Of boxes and masks: folder for them and for drawn images.")
    ] = Path("predicted"),
) -> None:
    """Classify images, or find objects in them, as the artefact was trained to."""
    from vpt.dense.artefact import kind_of

    names = _names(classes) if classes else None
    if kind_of(artefact):
        from vpt.dense.inference import predict as predict_dense

        if names:
            raise InputError(f"--classes: {artefact} finds the classes that trained it: drop it")
        predictions = predict_dense(artefact, images, out, checkpoint, log=say)
    else:
        from vpt.inference import predict

        predictions = predict(artefact, images, checkpoint, names, log=say)
    for number, prediction in enumerate(predictions):
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
    if "objects" in prediction:
        counts = Counter(each["class"] for each in prediction["objects"])
        found = ", ".join(f"{name} {count}" for name, count in counts.items())
        return [prediction["path"], found or "none", prediction["drawn"]]
    if "mask" in prediction:
        found = [f"{name} {part:.1%}" for name, part in prediction["proportions"].items()]
        count = [f"{prediction['count']} objects"] if "count" in prediction else []
        return [prediction["path"], ", ".join([*found, *count]), prediction["mask"]]
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
