"""Image files decoded once before work on them: those that can't be read, and grey ranges."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from vpt.config import Window
from vpt.data.images import read_pixels, reason
from vpt.data.pixels import Range, fits
from vpt.errors import InputError


@dataclass(frozen=True)
class Survey:
    """Files that were decoded once.

    `broken` holds why each that can't be read can't, `grey` the lowest and highest value of each
    grey image with more than 8 bits.
    """

    files: list[Path]
    broken: dict[Path, str]
    grey: dict[Path, Range]

    @property
    def readable(self) -> list[Path]:
        """The files that are not broken, in order."""
        return [path for path in self.files if path not in self.broken]

    def through(self, grey: Range | None, log: Callable[[str], None]) -> "Survey":
        """The files as they are read through a grey range; says which images it does not fit.

        Without a range, images with values that need one are broken too.
        """
        broken, odd = dict(self.broken), []
        highest = max((high for _, high in self.grey.values()), default=0)
        # 8 bits where 12 are expected, or 12 where 16 are
        dark = grey is not None and grey[0] < highest <= grey[0] + (grey[1] - grey[0]) / 15
        for path, (low, high) in self.grey.items():
            if grey is None and not (low >= 0 and high <= 65535):
                broken[path] = f"grey values {low:g} to {high:g} are not within 0 to 65535"
            elif grey is None or dark or not fits((low, high), grey):
                odd.append(f"first {path}, of {low:g} to {high:g}")
        if odd:
            wrong = (
                f"do not fit the training images' grey values, {grey[0]:g} to {grey[1]:g}"
                if grey
                else "have more than 8 bits, whose range no training image tells: 0 to 65535 (or, "
                "within it, 0 to 1) is taken"
            )
            log(f"{len(odd)} of {len(self.files)} images {wrong}: {odd[0]}")
        return replace(self, broken=broken)

    def check(self) -> None:
        """Refuses broken files.

        Raises:
            InputError: names the first three, and says how many there are.
        """
        if self.broken:
            bad = [f"{path} ({why})" for path, why in self.broken.items()]
            more = ", …" if len(bad) > 3 else ""
            raise InputError(
                f"{len(bad)} of {len(self.files)} images can't be read: {', '.join(bad[:3])}{more}:"
                " replace or remove them"
            )


def survey_images(
    paths: Sequence[Path],
    windows: tuple[Window, ...] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Survey:
    """Decode every file once, JPEG at 1/8 scale; `progress(done, total)` after each."""
    broken, grey = {}, {}
    with ThreadPoolExecutor() as pool:  # Pillow's decoders release the GIL
        found = pool.map(partial(_survey, windows), paths)
        for done, (path, (problem, values)) in enumerate(zip(paths, found, strict=True), start=1):
            if problem:
                broken[path] = problem
            if values:
                grey[path] = values
            if progress:
                progress(done, len(paths))
    return Survey(list(paths), broken, grey)


def check_images(
    paths: Sequence[Path],
    windows: tuple[Window, ...] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Survey:
    """`survey_images` of files that must all be readable.

    Raises:
        InputError: names the first three that can't be read, and says how many there are.
    """
    survey = survey_images(paths, windows, progress)
    survey.check()
    return survey


def _survey(windows: tuple[Window, ...] | None, path: Path) -> tuple[str | None, Range | None]:
    """Why a file can't be read, and the values of a deep grey image."""
    any_range = (0, 65535)  # all values are read through a range, and clipped
    try:
        return None, read_pixels(path, least=1, windows=windows, grey=any_range)[1]
    except InputError:
        raise
    except Exception as error:
        return reason(error), None
