"""`vpt demo`: a page that shows what prompts do, and trains new ones."""

import os
import signal
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import Any

from vpt import backbones
from vpt.errors import InputError
from vpt.page.desk import Desk
from vpt.page.examples import COLOURS, SHAPES, draw, train_tasks
from vpt.progress import Log
from vpt.serve.server import load_backbone


def demo(
    folder: Path | None, port: int = 7860, checkpoint: str | None = None, log: Log = print
) -> None:
    """Show the page on loopback until SIGTERM or SIGINT; then delete what was uploaded.

    Args:
        folder: holds NAME.safetensors of each task, and gets those trained in the page; None:
            tasks on drawings, made now for the embedded tiny CLIP, which are deleted at the end.
        port: 0 is any that is free.
        checkpoint: the backbone's weights, where they have moved.
        log: takes lines for the user.

    Raises:
        InputError: Gradio is missing; nothing in `folder` that can be shown; no such port.
    """
    for sign in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(sign, _stop)
    with TemporaryDirectory(prefix="vpt-demo-") as scratch:
        # Gradio reads these when it is imported
        os.environ |= {"GRADIO_TEMP_DIR": f"{scratch}/uploads", "GRADIO_ANALYTICS_ENABLED": "False"}
        os.environ |= {"HF_HUB_OFFLINE": "1"}
        gradio, layout = _import()
        if folder is None:
            folder, backbone = Path(scratch) / "tasks", backbones.load("tiny_clip")
            log("training three prompts on drawings")
            train_tasks(folder, Path(scratch) / "drawings")
            kept = "New prompts are deleted too: `vpt demo FOLDER` keeps them in FOLDER."
        else:
            backbone, kept = load_backbone(folder, checkpoint), "New prompts go to FOLDER and stay."
        desk = Desk(folder, Path(scratch) / "training", backbone)
        for name, reason in desk.refused.items():
            log(f"{name}: left out: {reason}")
        if not desk.names:
            raise InputError(f"{folder}: none of its artefacts can be shown")
        page = layout.layout(desk, _examples(Path(scratch) / "examples"), kept)
        try:
            _, url, _ = page.launch(
                server_name="127.0.0.1",
                server_port=port or None,
                share=False,
                quiet=True,
                footer_links=[],
                prevent_thread_lock=True,
                max_file_size="20mb",
                ssr_mode=False,
                theme=gradio.themes.Default(),
            )
        except OSError as error:
            raise InputError(f"port {port}: {error}: give another --port") from None
        log(f"the page is on {url}")
        try:
            Event().wait()
        except (KeyboardInterrupt, SystemExit):
            log("stopped; uploads are deleted")
        finally:
            page.close(verbose=False)


def _stop(*_: Any) -> None:
    raise SystemExit


def _import() -> tuple[Any, Any]:
    try:
        import gradio

        from vpt.page import layout
    except ModuleNotFoundError as error:
        raise InputError(
            f"vpt demo needs {error.name}: pip install 'visual-prompt-tuning[demo]'"
        ) from None
    return gradio, layout


def _examples(folder: Path) -> list[str]:
    """Drawings to try."""
    folder.mkdir()
    paths = []
    for shape, colour in zip(SHAPES, COLOURS, strict=True):
        path = folder / f"{shape}-{colour}.png"
        draw(shape, colour, seed=-1).save(path)
        paths.append(str(path))
    return paths
