"""Tasks that come one after another."""

from typing import Annotated

import typer

from vpt.cli.app import Overrides, app, say


@app.command()
def stream(
    config: Annotated[str, typer.Argument(help="A method, a path, or a name in configs/stream.")],
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option(help="Continue an interrupted stream.")] = False,
) -> None:
    """Learn tasks one after another: vpt stream ranpac data.root=IMAGES stream.tasks=5.

    The classes of one data set come in groups, or with stream.data=[A,B] each
    folder or card is a task. Test images carry no task id.
    """
    from vpt.stream.config import load_stream
    from vpt.stream.run import run_stream

    result = run_stream(load_stream(config, overrides or []), resume=resume, log=say)
    if "notice" in result:
        say(result["notice"])
    print("after  accuracy on each task, %")
    for number, row in enumerate(result["accuracy_matrix"], 1):
        print(f"{number:5}  {' '.join(f'{100 * value:5.1f}' for value in row)}")
    _print("", result)
    for name in ("known_task", "without_prompts"):
        if name in result:
            _print(f"{name} ", result[name])
    if "router_accuracy" in result:
        print(f"router_accuracy        {result['router_accuracy'][-1]:.4f}")
    print(f"megabytes a task       {result['megabytes'][-1]:.2f}")
    print(f"megabytes_between      {result['megabytes_between_tasks']:.2f}")
    print(f"seconds a task         {sum(result['seconds']) / len(result['seconds']):.1f}")
    print(f"passes an image        {result['passes']:.2f}")
    print(f"stored images          {result['stored_images']}")
    for each in result.get("published", []):
        print(f"published              {each['accuracy']:.4f} {each['method']}, {each['backbone']}")


def _print(prefix: str, metrics: dict[str, float]) -> None:
    for name in ("final_accuracy", "mean_accuracy", "forgetting"):
        print(f"{prefix + name:22} {metrics[name]:.4f}")
