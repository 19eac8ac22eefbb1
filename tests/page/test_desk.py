"""What the page does, without the page."""

import pytest
import tiny

import vpt
from vpt import backbones
from vpt.page.desk import ZERO_SHOT, Desk
from vpt.page.examples import COLOURS, SHAPES, draw, train_tasks, write_folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    train_tasks(folder, tmp_path_factory.mktemp("drawings"))
    return folder


@pytest.fixture
def desk(tasks, tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    for path in tasks.glob("*.safetensors"):
        (folder / path.name).write_bytes(path.read_bytes())
    return Desk(folder, tmp_path / "training", backbones.load("tiny_clip"))


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "star.png"
    draw("star", "red", 5).save(path)
    return path


def test_a_task_is_shown_beside_another_and_beside_zero_shot(desk, picture):
    assert desk.names == ["colours", "shapes", "shapes-probe"]
    assert desk.others("shapes") == [ZERO_SHOT, "colours", "shapes-probe"]
    shapes, colours = desk.show(picture, "shapes"), desk.show(picture, "shapes", "colours")
    assert set(shapes.probabilities) == set(SHAPES)
    assert max(colours.probabilities, key=colours.probabilities.get) == "red"
    zero = desk.show(picture, "colours", ZERO_SHOT)
    assert set(zero.probabilities) == set(COLOURS)
    assert zero.facts == "No prompt."
    assert "kB" in shapes.facts
    assert zero.heat.getbbox()


def test_a_prompt_is_trained_and_used_and_nothing_stays_but_it(desk, tmp_path):
    write_folder(tmp_path / "mine", 2)
    classes = {name: sorted((tmp_path / "mine" / name).iterdir()) for name in ("circle", "star")}
    lines = []
    said = desk.train("mine", classes, lines.append)
    assert "of 4 images that did not train it are right" in said
    assert lines
    assert "mine" in desk.names
    assert not (tmp_path / "training").exists()
    shown = desk.show(classes["star"][0], "mine")
    assert max(shown.probabilities, key=shown.probabilities.get) == "star"


@pytest.mark.parametrize(
    ("name", "labels", "count", "words"),
    [
        ("../up", ("a", "b"), 3, "give a short name"),
        ("mine", ("../up", "b"), 3, "give a short name"),
        ("shapes", ("a", "b"), 3, "there is a prompt of this name"),
        ("mine", ("a",), 3, "at least two classes"),
        ("mine", ("a", "b"), 1, "give at least 2 of each class"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    desk, picture, tmp_path, name, labels, count, words
):
    before = desk.names
    with pytest.raises(vpt.InputError, match=words) as caught:
        desk.train(name, {label: [picture] * count for label in labels}, print)
    assert "\n" not in str(caught.value)
    assert desk.names == before
    assert not (tmp_path / "training").exists()


def test_a_file_that_is_no_image_is_named(desk, tmp_path, picture):
    text = tmp_path / "note.png"
    text.write_text("no image")
    with pytest.raises(vpt.InputError, match=r"note.png: no known image format"):
        desk.show(text, "shapes")
    with pytest.raises(vpt.InputError, match=r"note.png: no known image format"):
        desk.train("mine", {"a": [picture, text], "b": [picture] * 2}, print)


def test_tasks_of_another_backbone_are_left_out(desk):
    vpt.save(tiny.attach(tiny.vit()), desk.folder / "other.safetensors")
    again = Desk(desk.folder, desk.scratch, desk.backbone)
    assert list(again.refused) == ["other"]
