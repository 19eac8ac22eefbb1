"""Names of parts, shared by layouts of users' own files."""

import re

from vpt.data.images import Samples

_PARTS = {
    "train": r"train(ing)?|trn",
    "val": r"val(id(ation|ate)?)?|dev(el(opment)?)?|eval(uation)?",
    "test": r"test(ing)?|tst|(hold|held)out",
}


def part_of(name: str) -> str | None:
    """The part that `name` is a usual spelling of, such as `Training` or `test_set`."""
    letters = re.sub(r"[\W\d_]", "", name.lower())
    for part, spelling in _PARTS.items():
        if re.fullmatch(rf"({spelling})(set|split|data|dataset|images|imgs|samples)?", letters):
            return part
    return None


def train_and_test(parts: dict[str, Samples]) -> dict[str, Samples]:
    """Parts train + test (+ val), or all where nothing is held out."""
    if "test" in parts:
        return parts
    if "val" in parts:  # train/ and val/ alone, as in ImageNet: what is held out is the test
        return {"train": parts["train"], "test": parts["val"]}
    return {"all": parts["train"]}
