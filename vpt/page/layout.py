"""The page itself, in Gradio: predict and compare with prompts, train a new one."""

import queue
import threading
from collections.abc import Iterator
from typing import Any

import gradio as gr

from vpt.errors import InputError
from vpt.page.desk import Desk, Shown

HEAD = """# One backbone, many prompts
The backbone stays as it is; a prompt of some kilobytes makes it answer another question."""
PRIVACY = """Uploads stay on this machine, in a folder of their own until the page is stopped, which
deletes them. """


def layout(desk: Desk, examples: list[str], kept: str) -> gr.Blocks:
    """The page of `desk`.

    Args:
        desk: what answers.
        examples: image files to try.
        kept: says where new prompts go.
    """
    first = desk.names[0]
    with gr.Blocks(title="vpt demo", analytics_enabled=False) as page:
        gr.Markdown(HEAD)
        with gr.Tab("Try prompts"), gr.Row():
            with gr.Column():
                task = gr.Dropdown(desk.names, value=first, label="Prompt", elem_id="task")
                other = gr.Dropdown(
                    desk.others(first), value=None, label="Compare with", elem_id="other"
                )
                image = gr.Image(
                    type="filepath", sources=["upload"], label="Image", elem_id="image"
                )
                ask = gr.Button("Predict", variant="primary", elem_id="predict")
                gr.Examples(examples, image, label="Examples", cache_examples=False)
            left, right = _answer("Prompt", True), _answer("Compared with", False)
        with gr.Tab("Train a prompt"):
            gr.Markdown(
                "Add each class with a few images, then train: candidates are compared on your "
                "images, and the best is used at once. A quarter of the images only test it."
            )
            classes = gr.State({})
            with gr.Row():
                label = gr.Textbox(label="Class", max_length=60, elem_id="class")
                files = gr.File(
                    file_count="multiple",
                    file_types=["image"],
                    label="Images of the class",
                    elem_id="files",
                )
                add = gr.Button("Add class", elem_id="add")
            listed = gr.Markdown("No classes yet.", elem_id="classes")
            name = gr.Textbox(label="Name of the prompt", max_length=60, elem_id="name")
            start = gr.Button("Train", variant="primary", elem_id="train")
            said = gr.Textbox(label="Progress", lines=8, interactive=False, elem_id="progress")
        gr.Markdown(PRIVACY + kept)

        def show(file: str | None, of: str, against: str | None) -> list[Any]:
            if file is None:
                raise gr.Error("Upload an image, or take an example.", print_exception=False)
            with _said():
                shown = desk.show(file, of)
                beside = desk.show(file, of, against) if against else None
            return [*_values(shown), *_values(beside), gr.update(visible=beside is not None)]

        def compare(of: str) -> dict[str, Any]:
            return gr.update(choices=desk.others(of), value=None)

        def add_class(known: dict, text: str, paths: list[str] | None) -> list[Any]:
            text = text.strip()
            if not text or not paths:
                raise gr.Error("Give the class a name, and images.", print_exception=False)
            known = {**known, text: [*known.get(text, []), *paths]}
            lines = [f"- {_plain(each)}: {len(kept)} images" for each, kept in known.items()]
            return [known, "\n".join(lines), "", None]

        def train(text: str, known: dict) -> Iterator[list[Any]]:
            lines: queue.Queue[str | None] = queue.Queue()
            ended: dict[str, Any] = {}

            def work() -> None:
                try:
                    ended["reached"] = desk.train(text, known, lines.put)
                except Exception as error:
                    ended["error"] = error
                lines.put(None)

            threading.Thread(target=work, daemon=True).start()
            log: list[str] = []
            while (line := lines.get()) is not None:
                log.append(line)
                yield ["\n".join(log), gr.skip(), gr.skip(), gr.skip()]
            with _said():
                if "error" in ended:
                    raise ended["error"]
            log.append(ended["reached"])
            new = text.strip()
            yield [
                "\n".join(log),
                gr.update(choices=desk.names, value=new),
                gr.update(choices=desk.others(new), value=None),
                {},
            ]

        ask.click(show, [image, task, other], [*left[1:], *right[1:], right[0]])
        task.change(compare, task, other)
        add.click(add_class, [classes, label, files], [classes, listed, label, files])
        start.click(train, [name, classes], [said, task, other, classes])
    return page


def _answer(title: str, visible: bool) -> list[Any]:
    """The column of one answer, and its parts."""
    with gr.Column(visible=visible) as column:
        bars = gr.Label(label=title, num_top_classes=5)
        verdict = gr.Markdown()
        heat = gr.Image(
            label="Red speaks for the class, blue against it",
            interactive=False,
            type="pil",
            buttons=["fullscreen"],
        )
        facts = gr.Markdown()
    return [column, bars, verdict, heat, facts]


def _values(shown: Shown | None) -> tuple[Any, ...]:
    return tuple(shown) if shown else (None, "", None, "")


class _said:
    """Shows bad input as the page's error, in one line."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, _: Any) -> None:
        if isinstance(error, InputError):
            raise gr.Error(str(error), print_exception=False) from None


def _plain(text: str) -> str:
    return "".join(f"\\{sign}" if sign in r"\`*_{}[]<>()#+-.!|$" else sign for sign in text)
