"""The command line. Heavy imports wait until a command needs them, so `--help` is instant."""

import json
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from vpt.errors import InputError
from vpt.resources import package_version

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as data.shots=16.")
]
Artefact = Annotated[Path, typer.Argument(help="A prompt.safetensors that `vpt train` wrote.")]


def _version(wanted: bool) -> None:
    if wanted:
        print(package_version())
        raise typer.Exit


class Engine(StrEnum):
    """Executor of a suite's runs."""

    local = "local"
    ray = "ray"


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Learnable prompts for frozen vision transformers and CLIP."""


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

    _print_metrics(run(load_run(config, overrides or []), resume=resume, log=_say))


@app.command(name="eval")
def evaluate(
    artefact: Artefact,
    overrides: Overrides = None,
    every: Annotated[
        bool, typer.Option("--all", help="All of data.root is test data the prompt never saw.")
    ] = False,
) -> None:
    """Test an artefact on the held-out images of its data, or on other labelled images."""
    from vpt.inference import evaluate

    _print_metrics(evaluate(artefact, overrides or [], every=every, log=_say))


@app.command()
def predict(
    artefact: Artefact,
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    checkpoint: Annotated[
        str | None, typer.Option(help="The backbone's weights, where they have moved.")
    ] = None,
) -> None:
    """Classify images."""
    from vpt.inference import predict

    for number, prediction in enumerate(predict(artefact, images, checkpoint, log=_say)):
        if number == 0 and "notice" in prediction:
            _say(prediction["notice"])
        print(json.dumps(prediction) if as_json else "\t".join(_columns(prediction)))


@app.command()
def bench(
    suite: Annotated[
        str, typer.Argument(help="A path, a name of `vpt list suites`, speed, serve, recipe.")
    ],
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results.", show_default="bench/SUITE")
    ] = None,
    engine: Annotated[
        Engine, typer.Option(help="Processes of this machine, or Ray tasks (`ray start`).")
    ] = Engine.local,
    resume: Annotated[bool, typer.Option(help="Do what is not finished in the folder.")] = False,
    cpus_per_run: Annotated[int, typer.Option(min=1, help="Cores for a run without a GPU.")] = 1,
    gpus_per_run: Annotated[float, typer.Option(min=0.01, max=1, help="Fraction of a GPU.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="speed: interleaved repetitions.")] = 5,
    small: Annotated[bool, typer.Option(help="speed, serve: tiny towers, to try it.")] = False,
    run: Annotated[bool, typer.Option(help="speed: also a whole CoOp run, minutes.")] = False,
    shots: Annotated[
        list[int] | None,
        typer.Option(min=1, help="recipe: images a class; repeat it.", show_default="5, 16"),
    ] = None,
) -> None:
    """Run data sets × methods × shots × seeds: vpt bench fgvc root=DIR.

    With `speed`, time the engine against prompts as tokens instead; with
    `serve`, a server under load; with `recipe`, `vpt train vpt_deep` with
    these keys, in forward passes of its training images: vpt bench recipe
    data.root=IMAGES --shots 5.
    """
    if suite == "recipe":
        from vpt.bench import recipe

        recipe.bench(overrides or [], shots or [5, 16])
        return
    if suite == "speed":
        from vpt.bench.speed_table import bench

        if overrides:
            raise InputError(f"{overrides[0]}: speed takes no KEY=VALUE: drop it")
        bench(out or Path("bench"), rounds, small, run)
        return
    if suite == "serve":
        from vpt.bench.serving import bench

        bench(out or Path("bench"), small)
        return
    from vpt.bench.run_suite import run_suite

    failed = run_suite(
        suite,
        overrides or [],
        out or Path("bench") / Path(suite).stem,
        engine=engine.value,
        resume=resume,
        cpus=cpus_per_run,
        gpus=gpus_per_run,
    )
    if failed:
        raise typer.Exit(1)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Holds run folders, at any depth.")],
    out: Annotated[Path | None, typer.Option(help="Instead of FOLDER/report.")] = None,
) -> None:
    """Compare runs: mean ± std over seeds, plots, one HTML page, CSV and LaTeX."""
    from vpt.report import report

    print(report(folder, out or folder / "report", log=_say))


@app.command()
def explain(
    artefact: Artefact,
    images: Annotated[
        list[Path] | None,
        typer.Argument(help="Images or folders; without, the words of a context."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the plots.")] = Path("explained"),
    checkpoint: Annotated[
        str | None, typer.Option(help="The backbone's weights, where they have moved.")
    ] = None,
) -> None:
    """Show which patches a prediction rests on, or which words a context is near to.

    Each image gets a plot: red patches speak for the class, blue ones
    against it. Its deletion area is the mean probability while patches are
    blurred, most salient first; a map that tells something is below random.
    """
    from vpt.explain import explain_context, explain_images

    if not images:
        for name, rows in explain_context(artefact, checkpoint).items():
            for words in rows:
                print(f"{name}\t{' '.join(words)}")
        return
    for number, record in enumerate(explain_images(artefact, images, out, checkpoint, log=_say)):
        if number == 0 and "notice" in record:
            _say(record["notice"])
        areas = f"deletion {record['deletion_area']:.3f}, random {record['random_area']:.3f}"
        print(f"{record['path']}\t{record['class']}\t{areas}\t{record['figure']}")


@app.command()
def export(
    artefact: Artefact,
    onnx: Annotated[bool, typer.Option("--onnx", help="As an ONNX file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Such as backbone.checkpoint=vit.pth."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The file; otherwise the artefact's name with .onnx.")
    ] = None,
) -> None:
    """Write backbone and prompt as one file that serves without this package.

    Its input `images` is float32 (batch, 3, height, width), any batch,
    resized and normalised as `preprocess` in the file's metadata says. Its
    output `logits` is float32 (batch, classes), in the order of
    `class_names` there. ONNX Runtime's logits are checked against torch's.
    """
    from vpt.export import export, load

    path = out or artefact.with_suffix(".onnx")
    files, difference = export(load(artefact, overrides or []), path)
    size = sum(file.stat().st_size for file in files) / 1e6
    names = " and ".join(map(str, files))
    print(f"wrote {names}: {size:.1f} MB, logits within {difference:.0e} of torch's")


@app.command(name="import")
def import_(
    method: Annotated[str, typer.Argument(metavar="coop|cocoop|kgcoop|maple|promptsrc|vpt")],
    file: Annotated[Path, typer.Argument(help="A model.pth.tar-N, or of vpt a prompt_epN.pth.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="backbone.name=, and data.root= for names."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The artefact; otherwise METHOD.safetensors beside FILE.")
    ] = None,
) -> None:
    """Take over a prompt that the official code trained; nothing in FILE is run.

    Class names are read from the texts in FILE, or are those of data.root,
    which FILE must agree with. A file of KMnP/vpt holds no head: it is solved
    on the images of data.root.
    """
    from vpt.imports import import_file

    print(f"wrote {import_file(method, file, overrides or [], out, log=_say)}")


@app.command()
def serve(
    folder: Annotated[Path, typer.Argument(help="Its NAME.safetensors are the tasks.")],
    limits: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as queue=64.")
    ] = None,
    host: Annotated[str, typer.Option(help="Other than this machine needs --tokens.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    tokens: Annotated[
        Path | None, typer.Option(help="YAML: token, tasks and admin of each tenant.")
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="The backbone's weights, where they have moved.")
    ] = None,
) -> None:
    """Serve a folder of artefacts over HTTP, all on one backbone in memory.

    SIGHUP reads the folder again; SIGTERM answers what was accepted first.
    """
    try:
        from vpt.serve.server import serve
    except ModuleNotFoundError as error:
        raise InputError(
            f"vpt serve needs {error.name}: pip install 'visual-prompt-tuning[serve]'"
        ) from None

    serve(folder, host, port, tokens, checkpoint, limits or [], log=_say)


@app.command(name="list")
def list_(
    what: Annotated[str, typer.Argument(metavar="methods|datasets|backbones|configs|suites")],
) -> None:
    """Show what is there: methods, datasets, backbones, configs or suites."""
    from vpt.catalog import catalog

    for name, description in catalog(what):
        print(f"{name:28} {description}")


def main() -> None:
    """Run the command line; bad input is one line on stderr and exit code 1."""
    try:
        app(prog_name="vpt")
    except InputError as error:
        print(f"vpt: {error}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:
        sys.exit(141)
    except OSError as error:  # a folder that can't be written, a full disk
        print(f"vpt: {error.filename or 'files'}: {error.strerror or error}", file=sys.stderr)
        sys.exit(1)


def _first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"  # as torchrun and accelerate launch number them


def _say(line: str) -> None:
    if _first_process():
        print(line, file=sys.stderr)


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
    if _first_process():
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


if __name__ == "__main__":
    main()
