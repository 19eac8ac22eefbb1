"""README and docs: short, and without a link to nowhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("demos/**/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_relative_link_has_a_file(page):
    links = re.findall(r"\]\(([^)#]+)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


def test_the_readme_stays_short():
    assert len((ROOT / "README.md").read_text().split()) <= 1000


def test_the_file_map_names_what_is_there():
    map_ = (ROOT / "README.md").read_text().partition("## File map")[2]
    paths = re.findall(r"`((?:vpt|configs|datasets|tests|demos)/[\w./]*)`", map_)
    assert len(paths) > 10
    assert not [path for path in paths if not (ROOT / path).exists()]
