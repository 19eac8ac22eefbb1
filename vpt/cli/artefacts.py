"""Explain, export and import artefacts."""

from pathlib import Path
from typing import Annotated

import typer

from vpt.cli.app import Artefact, app, say


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
    Where class texts are read, a third map has each patch's cosine to the text.
    """
    from vpt.explain import explain_context, explain_images

    if not images:
        for name, rows in explain_context(artefact, checkpoint, out).items():
            for row in rows:
                chance = f"{row['distances'][0]:.3f}, of random vectors {row['random']:.3f}"
                verdict = "near words" if row["word_like"] else "hardly nearer to words than chance"
                print(f"{name}\t{' '.join(row['words'])}\t{chance}: {verdict}")
        print(f"more, such as class embeddings before and after: {out}/")
        return
    for number, record in enumerate(explain_images(artefact, images, out, checkpoint, log=say)):
        if number == 0 and "notice" in record:
            say(record["notice"])
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

    print(f"wrote {import_file(method, file, overrides or [], out, log=say)}")
