"""Names in plots: in an installed font that has their letters, else as numbers."""

import logging
from collections.abc import Sequence
from functools import cache

from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font
from matplotlib.text import Text

_BOXES = "Last Resort"  # matplotlib's own font, with a box for every letter

# A font that comes in no regular weight has the letters all the same
logging.getLogger("matplotlib.font_manager").addFilter(lambda r: "font weight" not in str(r.msg))


def labels(names: Sequence[str]) -> list[str]:
    """`names` as a plot can show them: `#3` for the third where no installed font has its letters.

    Draw them through `letter`, and put `legend` beside the plot.
    """
    _, lacking = _families("".join(names))
    return [
        f"#{number}" if lacking & set(name) else name for number, name in enumerate(names, start=1)
    ]


def legend(names: Sequence[str]) -> list[str]:
    """A line of text for each name that `labels` replaces by a number."""
    pairs = zip(labels(names), names, strict=True)
    return [f"{label} {name}" for label, name in pairs if label != name]


def letter(figure: Figure) -> Figure:
    """`figure`, its texts in fonts that have their letters."""
    texts = figure.findobj(Text)
    families, _ = _families("".join(text.get_text() for text in texts))
    for text in texts if families else ():
        text.set_family([*text.get_family(), *families])
    return figure


@cache
def _families(text: str) -> tuple[list[str], set[str]]:
    """Font families that `text` needs beside the default one, and its letters that none has."""
    lacking = set(text) - {"\n"} - _letters(None)
    families = []
    for family in sorted({font.name for font in fontManager.ttflist}) if lacking else ():
        if not family.startswith(_BOXES) and lacking & (own := _letters(family)):
            families.append(family)
            lacking -= own
    return families, lacking


def _letters(family: str | None) -> set[str]:
    """All letters of a family's regular font; None: of the default family."""
    try:
        font = get_font(findfont(FontProperties(family=family)))
    except (OSError, RuntimeError):  # a file that is no font, or one of bitmaps
        return set()
    return set(map(chr, font.get_charmap())) if font.scalable else set()
