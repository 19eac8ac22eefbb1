"""The page in a real browser, which asks nobody else for anything."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vpt.page.examples import draw

BROWSER = "/usr/bin/chromium"
pytest.importorskip("gradio", reason="BROWSER TESTS: gradio is missing (the extra `demo`)")
playwright = pytest.importorskip(
    "playwright.sync_api", reason="BROWSER TESTS: playwright is missing"
)
pytestmark = pytest.mark.skipif(
    not Path(BROWSER).exists(), reason=f"BROWSER TESTS: {BROWSER} is missing"
)
WAIT = 120_000  # ms, at most


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("temporary")
    command = [sys.executable, "-m", "vpt.cli", "demo", "--port", "0"]
    process = subprocess.Popen(
        command, env=os.environ | {"TMPDIR": str(folder)}, stderr=subprocess.PIPE, text=True
    )
    for line in process.stderr:
        if found := re.search(r"http://127\.0\.0\.1:\d+", line):
            break
    else:
        raise AssertionError(f"it ended with {process.wait()}")
    yield found[0], folder, process
    process.kill()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(server, browser):
    url, _, _ = server
    opened = browser.new_page(viewport={"width": 1280, "height": 1000})
    foreign = []

    def watch(route):
        if route.request.url.startswith((f"{url}/", "data:", "blob:")):
            return route.continue_()
        foreign.append(route.request.url)
        return route.abort()

    opened.route("**/*", watch)
    opened.set_default_timeout(WAIT)
    opened.goto(url)
    opened.wait_for_selector("#predict")
    yield opened
    assert not foreign
    opened.close()


@pytest.fixture
def star(tmp_path):
    path = tmp_path / "star.png"
    draw("star", "red", 3).save(path)
    return path


def upload(page, file):
    page.locator("#image input[type=file]").set_input_files(file)
    page.locator("#image img").wait_for()


def choose(page, box, option):
    page.locator(f"#{box} input").click()
    page.get_by_role("option", name=option, exact=True).click()


def test_an_image_is_predicted_and_compared_after_a_swap(page, star):
    upload(page, star)
    page.click("#predict")
    page.get_by_text("kB, ready in").first.wait_for()
    choose(page, "task", "shapes")
    choose(page, "other", "zero-shot")
    page.click("#predict")
    page.get_by_text("No prompt.").wait_for()
    assert page.get_by_text("triangle").count() >= 2


def test_an_error_is_one_line_in_the_page(page, tmp_path):
    page.click("#predict")
    page.get_by_text("Upload an image, or take an example.").wait_for()


def test_a_prompt_is_trained_and_used_at_once(page, star, tmp_path):
    page.get_by_role("tab", name="Train a prompt").click()
    for shape in ("star", "circle"):
        files = []
        for seed, colour in enumerate(("red", "green", "blue", "yellow")):
            files.append(tmp_path / f"{shape}{seed}.png")
            draw(shape, colour, seed).save(files[-1])
        page.fill("#class textarea, #class input", shape)
        page.locator("#files input[type=file]").set_input_files(files)
        page.locator("#files").get_by_text(files[-1].stem).first.wait_for()
        page.click("#add")
        page.locator("#classes").get_by_text(f"{shape}: 4 images").wait_for()
    page.fill("#name textarea, #name input", "mine")
    page.click("#train")
    page.wait_for_function(
        "document.querySelector('#progress textarea').value.includes('did not train it')"
    )
    page.get_by_role("tab", name="Try prompts").click()
    assert page.locator("#task input").input_value() == "mine"
    upload(page, star)
    page.click("#predict")
    page.get_by_text("kB, ready in").first.wait_for()
    assert page.get_by_text("star").first.is_visible()


def test_it_can_be_used_by_keyboard(page):
    reached = set()
    for _ in range(25):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate(
                "(document.activeElement.closest('[id=task],[id=other],[id=predict]') || {}).id"
            )
        )
    assert {"task", "other", "predict"} <= reached


def test_uploads_are_deleted_when_it_is_stopped(server):
    _, folder, process = server
    assert any(folder.rglob("*.png"))
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert not any(folder.iterdir())
