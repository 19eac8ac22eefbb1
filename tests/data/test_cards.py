import re
from collections import Counter
from typing import get_args

import pytest

from vpt import resources
from vpt.config import Augment
from vpt.data.cards import load_card, plain_card
from vpt.errors import InputError

NAMES = resources.names("datasets")
GENERIC = {"folder", "csv", "npz"}
DIGEST = re.compile(r"md5:[0-9a-f]{32}|sha256:[0-9a-f]{64}")
VALID = {
    "title": "Pets",
    "source": "https://example.org",
    "licence": "CC BY 4.0",
    "get": "Give data.root=DIR.",
    "layout": "folder",
    "split": "official",
    "num_classes": "2",
    "classes": "[cat, dog]",
}


@pytest.fixture
def write_card(tmp_path, monkeypatch):
    """Writes datasets/pets.yaml, the valid card with `changes`, and makes it the only card."""
    monkeypatch.setattr(resources, "folder", lambda name: tmp_path)

    def write(**changes):
        lines = (f"{key}: {value}\n" for key, value in (VALID | changes).items())
        (tmp_path / "pets.yaml").write_text("".join(lines))

    return write


@pytest.mark.parametrize("name", NAMES)
class TestEveryCard:
    def test_says_what_it_is_and_how_to_get_it(self, name):
        card = load_card(name)
        for field in ("title", "source", "licence", "get", "split"):
            assert getattr(card, field).strip(), field
        assert "data.root" in card.get
        assert card.augment in get_args(Augment)

    def test_classes_agree_with_their_number(self, name):
        card = load_card(name)
        assert (card.num_classes is None) == (name in GENERIC)
        if card.classes is not None:
            assert len(set(card.classes)) == card.num_classes
        if card.layout in {"digits", "notebook", "npz"} and name not in GENERIC:
            assert card.classes is not None  # the files carry numbers only

    def test_each_template_holds_one_class_name(self, name):
        card = load_card(name)
        assert card.templates
        for template in card.templates:
            assert template.count("{}") == 1
            assert template.format("cat") == template.replace("{}", "cat")

    def test_checksums_are_digests_of_files_below_root(self, name):
        for file, digest in load_card(name).checksums.items():
            assert DIGEST.fullmatch(digest), file
            assert not file.startswith(("/", "..")), file

    def test_names_a_split_file_and_an_image_folder_where_its_layout_has_them(self, name):
        card = load_card(name)
        assert bool(card.split_file) == (card.layout == "zhou")
        assert bool(card.images) == (card.layout in {"zhou", "fgvc"})
        if card.split_file:
            assert re.fullmatch(r"split_zhou_\w+\.json", card.split_file)
            assert card.split_file in card.get

    def test_says_how_many_images_its_published_parts_have(self, name):
        card = load_card(name)
        if card.layout in {"zhou", "fgvc"} or (card.layout == "npz" and name not in GENERIC):
            assert card.num_images.keys() == {"train", "val", "test"}
            official = re.search(r"([\d,]+) train, ([\d,]+) val, ([\d,]+) test", card.split)
            if official:
                numbers = [int(number.replace(",", "")) for number in official.groups()]
                assert list(card.num_images.values()) == numbers


def test_vtab_is_19_tasks_in_3_groups():
    cards = {name: load_card(name) for name in NAMES if name.startswith("vtab_")}
    assert Counter(card.group for card in cards.values()) == {
        "natural": 7,
        "specialized": 4,
        "structured": 8,
    }
    for card in cards.values():
        assert (card.layout, card.augment) == ("vtab", "none")
        assert (card.num_images["train"], card.num_images["val"]) == (800, 200)
    assert sum(load_card(name).group == "fgvc" for name in NAMES) == 5


def test_a_layout_of_ones_own_needs_none():
    card = plain_card("boxes")
    assert (card.layout, card.num_classes, card.classes, card.medical) == (
        "boxes",
        None,
        None,
        False,
    )
    assert "data.root=PATH" in card.get


def test_the_medmnist_cards_know_all_four_sizes():
    for name in (name for name in NAMES if name.endswith("mnist")):
        sizes = [f"{name}{size}.npz" for size in ("", "_64", "_128", "_224")]
        assert list(load_card(name).checksums) == sizes


def test_unknown_name_says_the_nearest():
    with pytest.raises(InputError, match=r"did you mean 'oxford_pets'\?"):
        load_card("oxford_pet")


def test_the_written_card_is_valid(write_card):
    write_card()
    assert load_card("pets").classes == ["cat", "dog"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"license": "MIT"}, "unknown key 'license'; did you mean 'licence'"),
        ({"num_classes": "many"}, "num_classes='many'"),
        ({"num_classes": "0"}, "num_classes=0"),
        ({"layout": "zip"}, "layout='zip'"),
        ({"layout": "foldr"}, "layout='foldr': no such layout; did you mean 'folder'"),
        ({"layout": "_files"}, "layout='_files'"),
        ({"classes": "[cat, dog, hen]"}, "3 classes, but num_classes=2"),
    ],
)
def test_a_broken_card_is_one_line_that_names_the_file(write_card, tmp_path, changes, message):
    write_card(**changes)
    with pytest.raises(InputError) as caught:
        load_card("pets")
    assert message in str(caught.value)
    assert str(tmp_path / "pets.yaml") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_key_is_named(write_card, tmp_path):
    write_card()
    path = tmp_path / "pets.yaml"
    path.write_text(path.read_text().replace("title: Pets\n", ""))
    with pytest.raises(InputError, match="title is missing"):
        load_card("pets")
