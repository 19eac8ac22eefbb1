"""A client of the server, of the standard library alone.

Start the server on a folder of artefacts, such as those of `vpt train` and the other demos:

    pip install 'visual-prompt-tuning[serve]'
    vpt serve PROMPTS                        # http://127.0.0.1:8000

then `python demos/client.py` lists its tasks, and `python demos/client.py --task pets cat.jpg` asks
one of them about images. Where the server wants a token, it is taken from $VPT_TOKEN.
"""

import argparse
import json
import mimetypes
import os
import sys
import time
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote
from urllib.request import Request, urlopen

ATTEMPTS = 5


def main() -> None:
    """List the tasks, or have images classified."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path, nargs="*")
    parser.add_argument("--task", help="the department to ask")
    parser.add_argument("--server", default="http://127.0.0.1:8000")
    arguments = parser.parse_args()
    if arguments.images and not arguments.task:
        parser.error("--task: which of the server's tasks are the images for?")
    try:
        if arguments.images:
            for path in arguments.images:
                answer = predict(arguments.server, arguments.task, path)
                print(f"{path}: {describe(answer)}")
        else:
            for task in ask(f"{arguments.server}/v1/tasks"):
                print(f"{task['task']} ({task['method']}): {', '.join(task['class_names'])}")
    except HTTPError as error:  # its body is {"error": "one line"}
        sys.exit(f"{error.code}: {json.load(error)['error']}")
    except URLError as error:
        sys.exit(f"{arguments.server}: {error.reason}: is `vpt serve` running?")


def predict(server: str, task: str, path: Path) -> dict[str, Any]:
    """The server's answer on the image file at `path`."""
    kind = mimetypes.guess_type(path)[0] or "application/octet-stream"
    url = f"{server}/v1/tasks/{quote(task, safe='')}/predict"
    return ask(url, path.read_bytes(), kind)


def ask(url: str, body: bytes | None = None, kind: str | None = None) -> Any:
    """The JSON at `url`, or in return for `body`; again later, while the server is full."""
    headers = {"Content-Type": kind} if kind else {}
    if token := os.environ.get("VPT_TOKEN"):
        headers["Authorization"] = f"Bearer {token}"
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with urlopen(Request(url, body, headers), timeout=60) as reply:
                return json.load(reply)
        except HTTPError as error:
            if error.code != 429 or attempt == ATTEMPTS:
                raise
            time.sleep(int(error.headers["Retry-After"]))


def describe(answer: dict[str, Any]) -> str:
    """The decision on an image, in words: what the artefact has been calibrated for is there."""
    (image,) = answer["images"]
    names = image["labels"] if "labels" in image else [image["class"]]
    parts = [f"{name} {image['probabilities'][name]:.1%}" for name in names] or ["nothing"]
    if len(image.get("set", [])) > 1:
        parts.append(f"one of {', '.join(image['set'])}")
    if image.get("refer"):
        parts.append("refer to a person")
    if not answer["calibrated"]:
        parts.append("not calibrated")
    return "; ".join([*parts, *filter(None, [answer.get("notice")])])


if __name__ == "__main__":
    main()
